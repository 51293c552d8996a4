"""Says in a configuration of transformers which rotary frequencies a model has whose heads lost pairs of channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lbyl.graph.heads import FREQUENCIES, rotaries_of

_CLOSE = 1e-5
"""Largest relative difference of frequencies that are the same, computed in float32 in two ways."""


def other_frequencies(model: nn.Module, config: Any) -> bool:
    """Whether a model that is built from this configuration would rotate with other frequencies.

    Only modules that are built from a configuration of this class alone are compared.
    """
    for path, frequencies in rotaries_of(model):
        built = None if frequencies.is_meta else _built(model.get_submodule(path), config)
        if built is not None and not _same(built, frequencies):
            return True
    return False


def said_as_factors(model: nn.Module, config: Any) -> Mapping[str, Any] | None:
    """Settings of rotary positions that give the model's frequencies; None if its configuration gives them already.

    The type "longrope" divides each frequency ``theta^(-2 i / size)`` by a factor of its own, here the same for short
    and long texts, so that any frequencies can be said.

    Args:
        model: the model.
        config: its configuration, which says the size of heads.
    """
    old = getattr(config, "rope_parameters", None)
    if not isinstance(old, Mapping) or "rope_theta" not in old or not other_frequencies(model, config):
        return None
    path, frequencies = next(iter(rotaries_of(model)))
    size = 2 * len(frequencies)
    plain = float(old["rope_theta"]) ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    factors = (plain / frequencies.double().cpu()).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": old["rope_theta"],
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": float(getattr(model.get_submodule(path), "attention_scaling", 1.0)),
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def _built(module: nn.Module, config: Any) -> Tensor | None:
    if type(getattr(module, "config", None)) is not type(config):
        return None
    kind: Any = type(module)
    try:
        with torch.device("cpu"):
            return dict(kind(copy.deepcopy(config)).named_buffers()).get(FREQUENCIES[0])
    except Exception:  # a model's own code may raise anything
        return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether frequencies are equal, as far as the less precise type of both can tell."""
    rough = max((t.dtype for t in (a, b)), key=lambda dtype: torch.finfo(dtype).eps)
    close = max(_CLOSE, torch.finfo(rough).eps)
    return a.shape == b.shape and torch.allclose(
        a.to(rough).double().cpu(), b.to(rough).double().cpu(), rtol=close, atol=torch.finfo(rough).tiny
    )
