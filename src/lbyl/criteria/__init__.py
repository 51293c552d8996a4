"""Which channels matter: one small class a criterion.

A criterion is anything with a ``score`` method; pass an instance to :func:`lbyl.compress`, or add a file here
and its name to ``CRITERIA``.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lbyl.criteria.geometric_median import GeometricMedian
from lbyl.criteria.l1 import L1
from lbyl.criteria.l2 import L2
from lbyl.criteria.random import Random
from lbyl.errors import InputError


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


CRITERIA: dict[str, type[Criterion]] = {"l1": L1, "l2": L2, "gm": GeometricMedian, "random": Random}


def resolve_criterion(criterion: str | Criterion) -> Criterion:
    """A criterion by name, or the object itself.

    Raises:
        InputError: an unknown name, or an object without ``score``.
    """
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise InputError(f"unknown criterion {criterion!r}; choose one of {', '.join(CRITERIA)}")
        return CRITERIA[criterion]()
    if not isinstance(criterion, Criterion):
        raise InputError(f"criterion {criterion!r} has no score(filters, generator) method")
    return criterion


__all__ = ["CRITERIA", "L1", "L2", "Criterion", "GeometricMedian", "Random", "resolve_criterion"]
