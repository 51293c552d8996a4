"""What every weights-only restorer is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lbyl.filters import Filters


@dataclass(frozen=True)
class Delivery:
    """How the dropped channels are made up for.

    Attributes:
        matrix: the delivery matrix S: ``a_D ~ S^T a_K``.
        scale: a factor for each kept channel (1 where the restorer leaves them alone).
        note: what the user should know ("" as a rule).
    """

    matrix: Float[Tensor, "kept dropped"]
    scale: Float[Tensor, " kept"]
    note: str = ""


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


def nothing_delivered(kept: int, dropped: int, note: str = "") -> Delivery:
    """S = 0: plain pruning."""
    return Delivery(torch.zeros(kept, dropped).double(), torch.ones(kept).double(), note)
