"""Plain pruning: S = 0, nothing is delivered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from lbyl.selection.filters import Filters
from lbyl.surgery.masking import Delivery, nothing_delivered


@dataclass(frozen=True)
class Prune:
    """Drop and restore nothing: the baseline."""

    def deliver(
        self,
        filters: Filters,
        keep: Int[Tensor, " kept"],
        drop: Int[Tensor, " dropped"],
        generator: torch.Generator,
    ) -> Delivery:
        """S = 0."""
        return nothing_delivered(len(keep), len(drop))
