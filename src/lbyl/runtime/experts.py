"""Lets experts of transformers multiply in one call for all of them, whichever way the user has chosen for them.

A loop over experts depends on which of them get a token, and one matrix for each token takes much memory. One call for
all experts gives the same outputs, and can be traced and observed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CHOICE = "_experts_implementation_internal"
_GROUPED = "grouped_mm"


def choose_grouped(modules: Iterable[nn.Module]) -> None:
    """Give experts a configuration of their own that asks for grouped products, where their weights allow these.

    The caller puts back the modules' attributes afterwards, as `lbyl.runtime.contexts.undisturbed` does.
    """
    for module in modules:
        config: Any = vars(module).get("config")
        if config is None or not hasattr(module, "is_transposed") or getattr(config, _CHOICE, _GROUPED) == _GROUPED:
            continue
        stacked = [weight for weight in module._parameters.values() if weight is not None and weight.dim() == 3]
        if stacked and all(_aligned(weight) for weight in stacked):
            own = copy.copy(config)
            setattr(own, _CHOICE, _GROUPED)
            module.config = own  # pyright: ignore[reportAttributeAccessIssue]


def _aligned(weight: torch.Tensor) -> bool:
    """Whether PyTorch's grouped products take a weight: no float64, and rows of a multiple of 16 bytes."""
    size = weight.element_size()
    return size <= 4 and weight.shape[1] * size % 16 == 0 and weight.shape[2] * size % 16 == 0


@contextmanager
def looped(module: nn.Module) -> Iterator[None]:
    """Let experts run as their class says: in a loop over experts, each with its tokens in their order."""
    config: Any = vars(module).get("config")
    if config is None or not hasattr(config, _CHOICE):
        yield
        return
    own = copy.copy(config)
    setattr(own, _CHOICE, "eager")
    module.config = own  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        module.config = config
