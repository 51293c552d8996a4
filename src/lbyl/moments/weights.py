"""The paper's implicit moments: white-noise input, no activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lbyl.moments.base import ChannelMoments
from lbyl.runtime.checks import check_number
from lbyl.selection.filters import Filters


@dataclass(frozen=True)
class Weights:
    """Second moments ``G = V V^T + bn c c^T`` of a group's channels, computed from the weights alone.

    With these moments, ``LeastSquares(solve="mix")`` is the paper's :class:`lbyl.LBYL`, except that its ridge is
    relative to the mean of G's diagonal.

    Attributes:
        bn: weight of the term with the offsets c of batch norms; V holds the effective filters.
    """

    bn: float = 1e-4

    def __post_init__(self) -> None:
        check_number("Weights(bn={})", self.bn, least=0)

    def moments(self, filters: Filters, kernel: tuple[int, ...], activation: str | None) -> ChannelMoments:
        """The second moments as a covariance, with a mean of zero, because weights say nothing about the mean."""
        gram = filters.weight @ filters.weight.T
        if filters.normalized:
            gram = gram + self.bn * torch.outer(filters.offset, filters.offset)
        return ChannelMoments(torch.zeros(len(gram), dtype=torch.float64), gram)
