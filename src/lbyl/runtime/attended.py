"""Positions that an attention mask excludes, such as padding: statistics leave these positions out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lbyl.runtime.inputs import ExampleInputs

Attended = Mapping[tuple[int, int], Bool[Tensor, " positions"]]
"""The positions that count in token sequences, by (number of sequences, length). Without an entry, all of them do."""


def attended_positions(model: nn.Module, inputs: ExampleInputs) -> Attended:
    """The positions that the attention masks among the inputs allow.

    A shape has no entry if masks of that shape differ. An example is an encoder and a decoder that read sequences of
    the same shape: then the shape of a layer's input does not tell which mask belongs to it.
    """
    named = _by_name(model, inputs)
    masks: dict[tuple[int, int], list[Tensor]] = {}
    for name, value in named.items():
        if not isinstance(value, Tensor) or value.dim() != 2 or value.is_floating_point():
            continue
        shape = value.shape[0], value.shape[1]
        if name.endswith("attention_mask"):
            masks.setdefault(shape, []).append(value.bool())
        elif name.startswith("decoder_"):
            masks.setdefault(shape, []).append(torch.ones_like(value, dtype=torch.bool))
    return {
        shape: found[0].flatten()
        for shape, found in masks.items()
        if not bool(found[0].all()) and all(torch.equal(found[0], other) for other in found[1:])
    }


def _by_name(model: nn.Module, inputs: ExampleInputs) -> Mapping[str, Any]:
    """The inputs by the names of the model's arguments, where these are known."""
    try:
        return inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments | dict(inputs.kwargs)
    except (TypeError, ValueError):
        return inputs.kwargs


def at_attended(attended: Attended, tensor: Tensor) -> Tensor:
    """The rows of a tensor at the positions that count, or the tensor itself where all positions count.

    Channels are the last axis. Positions are the first two axes, or one axis if they were flattened.
    """
    if not attended or tensor.dim() not in (2, 3):
        return tensor
    if tensor.dim() == 3:
        mask = attended.get((tensor.shape[0], tensor.shape[1]))
        return tensor if mask is None else tensor.flatten(0, 1)[mask.to(tensor.device)]
    mask = next((mask for mask in attended.values() if len(mask) == len(tensor)), None)
    return tensor if mask is None else tensor[mask.to(tensor.device)]
