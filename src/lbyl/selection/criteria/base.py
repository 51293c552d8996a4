"""The two interfaces of criteria, which give a score for each channel."""

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
    """Scores channels by their filters. Channels with the lowest scores are dropped first.

    A class whose score is the p-norm of the filter may set ``norm_order`` to p. Its scores are then computed without a
    float64 copy of all weights. Classes derived from it have to set ``norm_order`` again.

    A criterion that uses more than filters is a :class:`SeeingCriterion`.
    """

    def score(
        self, filters: Float[Tensor, "channels fan_in"], generator: torch.Generator
    ) -> Float[Tensor, " channels"]:
        """Scores of the channels; row j of ``filters`` is the flattened filter of channel j."""
        ...


class SeeingCriterion(Protocol):
    """Scores channels by their consumers' weights and by activations.

    ``sees`` is what the criterion needs:

    * ``"consumers"``: the weights with which consumers read the channels; no input is run.
    * ``"squares"``: also the mean and the mean square of every input column of every consumer, measured on probes.
    * ``"products"``: also the second moments of all pairs of columns.
    """

    sees: ClassVar[str]

    def score(self, view: ChannelView) -> Float[Tensor, " channels"]:
        """Scores of the channels of a view."""
        ...


def needs_probes(criterion: object) -> bool:
    """Whether a criterion needs activations, measured on probes."""
    return getattr(criterion, "sees", "filters") in ("squares", "products")


def resolve_criterion(criterion: str | Criterion | SeeingCriterion) -> Criterion | SeeingCriterion:
    """A criterion by name, or the object itself.

    Raises:
        InputError: the name is unknown, or the object is a class, has no ``score``, or an unknown value of ``sees``.
    """
    found: Any = make("criterion", criterion) if isinstance(criterion, str) else criterion
    if isinstance(found, type):
        raise InputError(f"criterion={found.__name__} is a class; pass an object, {found.__name__}()")
    if not callable(getattr(found, "score", None)):
        raise InputError(f"criterion {found!r} has no score(filters, generator) or score(view) method")
    if getattr(found, "sees", "consumers") not in ("consumers", "squares", "products"):
        raise InputError(f"criterion {found!r}: sees must be 'consumers', 'squares' or 'products'")
    return found
