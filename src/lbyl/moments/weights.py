"""The paper's implicit moments: white-noise input, no activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lbyl.moments.base import ChannelMoments
from lbyl.runtime.checks import check_number
from lbyl.selection.filters import Filters


@dataclass(frozen=True)
class Weights:
    """``G = V V^T + bn c c^T``: what least squares is given when only the weights are looked at.

    With these moments, ``LeastSquares(solve="mix")`` is the paper's :class:`lbyl.LBYL`, with a ridge relative to
    the mean diagonal.
    """

    bn: float = 1e-4

    def __post_init__(self) -> None:
        check_number("Weights(bn={})", self.bn, least=0)

    def moments(self, filters: Filters, kernel: tuple[int, ...], activation: str | None) -> ChannelMoments:
        """Second moments. The mean is taken to be zero, because weights say nothing about it."""
        gram = filters.weight @ filters.weight.T
        if filters.normalized:
            gram = gram + self.bn * torch.outer(filters.offset, filters.offset)
        return ChannelMoments(torch.zeros(len(gram), dtype=torch.float64), gram)
