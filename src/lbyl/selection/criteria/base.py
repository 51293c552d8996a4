"""What every criterion has: a score for each channel."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lbyl.errors import InputError
from lbyl.runtime.registry import make
from lbyl.selection.view import ChannelView


@runtime_checkable
class Criterion(Protocol):
    """Scores channels; the lowest scores go first.

    A class whose score is the p-norm of the filter may say so by a ``norm_order`` of p: its scores are then summed up
    without a float64 copy of all weights. Classes derived from it have to say so again.

    A criterion that looks at more than filters is a :class:`SeeingCriterion`.
    """

    def score(
        self, filters: Float[Tensor, "channels fan_in"], generator: torch.Generator
    ) -> Float[Tensor, " channels"]:
        """Scores of the channels, given one flattened filter a row."""
        ...


class SeeingCriterion(Protocol):
    """Scores channels by what reads them, and by what passes through them.

    ``sees`` says how much has to be known:

    * ``"consumers"``: the weights with which consumers read the channels; no input is run.
    * ``"squares"``: these, and the mean and the mean square of every column of every consumer, measured on probes.
    * ``"products"``: these, and the second moments of all pairs of columns.
    """

    sees: ClassVar[str]

    def score(self, view: ChannelView) -> Float[Tensor, " channels"]:
        """Scores of the channels in view."""
        ...


def needs_probes(criterion: object) -> bool:
    """Whether a criterion looks at what passes through the channels."""
    return getattr(criterion, "sees", "filters") in ("squares", "products")


def resolve_criterion(criterion: str | Criterion | SeeingCriterion) -> Criterion | SeeingCriterion:
    """A criterion by name, or the object itself.

    Raises:
        InputError: an unknown name, a class in place of an instance, an object without ``score``, or one whose
            ``sees`` is unknown.
    """
    found: Any = make("criterion", criterion) if isinstance(criterion, str) else criterion
    if isinstance(found, type):
        raise InputError(f"criterion={found.__name__} is a class; pass an object, {found.__name__}()")
    if not callable(getattr(found, "score", None)):
        raise InputError(f"criterion {found!r} has no score(filters, generator) or score(view) method")
    if getattr(found, "sees", "consumers") not in ("consumers", "squares", "products"):
        raise InputError(f"criterion {found!r}: sees must be 'consumers', 'squares' or 'products'")
    return found
