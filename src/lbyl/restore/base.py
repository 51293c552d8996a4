"""What every restorer is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from lbyl.restore.error_terms import Terms
from lbyl.runtime.output_error import Assessment
from lbyl.selection.filters import Filters
from lbyl.surgery.masking import Delivery


@runtime_checkable
class Restorer(Protocol):
    """Closed-form restoration from the weights of one group alone."""

    def deliver(
        self,
        filters: Filters,
        keep: Int[Tensor, " kept"],
        drop: Int[Tensor, " dropped"],
        generator: torch.Generator,
    ) -> Delivery:
        """The delivery matrix from the kept to the dropped channels."""
        ...


@dataclass(frozen=True)
class Restored:
    """What restoration did for one group."""

    group: str
    terms: Terms | None
    seconds: float
    note: str
    errors: tuple[float, float] | None = None
    """Relative error of the consumers' outputs on the probes: after plain pruning, after restoration."""


@dataclass(frozen=True)
class Restoration:
    """New values of parameters and buffers, at their unpruned shapes: dropped columns are zero."""

    values: dict[str, Tensor]
    groups: tuple[Restored, ...]
    assessment: Assessment | None = None
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
