"""What every criterion has: a score for each channel."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lbyl.errors import InputError
from lbyl.runtime.registry import make


@runtime_checkable
class Criterion(Protocol):
    """Scores channels; the lowest scores go first.

    A class whose score is the p-norm of the filter may say so by a ``norm_order`` of p: its scores are then summed up
    without a float64 copy of all weights. Classes derived from it have to say so again.
    """

    def score(
        self, filters: Float[Tensor, "channels fan_in"], generator: torch.Generator
    ) -> Float[Tensor, " channels"]:
        """Scores of the channels, given one flattened filter a row."""
        ...


def resolve_criterion(criterion: str | Criterion) -> Criterion:
    """A criterion by name, or the object itself.

    Raises:
        InputError: an unknown name, or an object without ``score``.
    """
    if isinstance(criterion, str):
        criterion = make("criterion", criterion)
    if isinstance(criterion, type) or not isinstance(criterion, Criterion):
        hint = f"; pass an object, {criterion.__name__}()" if isinstance(criterion, type) else ""
        raise InputError(f"criterion {criterion!r} has no score(filters, generator) method{hint}")
    return criterion
