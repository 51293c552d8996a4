"""Inputs of language models: finds the tokens among them, and makes inputs with other tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lbyl.errors import InputError
from lbyl.runtime.inputs import ExampleInputs


def token_ids(inputs: ExampleInputs) -> Int[Tensor, "batch tokens"] | None:
    """The tokens among the inputs: ``input_ids``, or the first integer tensor with two axes; None if there is none."""
    named = inputs.kwargs.get("input_ids")
    candidates = [named] if isinstance(named, Tensor) else inputs.tensors()
    for tensor in candidates:
        if tensor.dtype in (torch.int32, torch.int64) and tensor.dim() == 2 and tensor.numel():
            return tensor
    return None


def like_example(inputs: ExampleInputs, ids: Int[Tensor, "batch tokens"]) -> ExampleInputs:
    """The example inputs with other tokens, and with masks and positions of the new tokens' shape.

    Raises:
        InputError: another input has a value for each token, and its meaning is unknown.
    """
    example = token_ids(inputs)
    assert example is not None
    shape = example.shape

    def made(name: str, value: Any) -> Any:
        if value is example:
            return ids
        if not isinstance(value, Tensor) or value.shape[:2] != shape:
            return value
        if name in _MADE:
            return _MADE[name](ids).to(value.dtype)
        if bool((value == value.flatten()[0]).all()):
            return value.flatten()[:1].expand(ids.shape).clone()
        raise InputError(f"{name} has a value for each token, and those of other texts are unknown; use lbyl.Data")

    args = tuple(made(f"input {index}", value) for index, value in enumerate(inputs.args))
    return replace(inputs, args=args, kwargs={name: made(name, value) for name, value in inputs.kwargs.items()})


_MADE = {
    "attention_mask": torch.ones_like,
    "token_type_ids": torch.zeros_like,
    "position_ids": lambda ids: torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).clone(),
    "labels": torch.clone,
}


def longest_text(model: nn.Module, wanted: int) -> int:
    """``wanted``, or the model's number of positions if smaller, minus two that RoBERTa does not use for tokens."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(wanted, most - 2) if isinstance(most, int) and most > 6 else wanted
