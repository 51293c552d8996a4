"""The L1 norm of a filter (Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv 1608.08710)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class L1:
    """``sum_i |w_ji|``, the L1 norm of a filter.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv 1608.08710.
    """

    norm_order: ClassVar[int] = 1

    def score(
        self, filters: Float[Tensor, "channels fan_in"], generator: torch.Generator
    ) -> Float[Tensor, " channels"]:
        """One score for each channel; channels with the lowest scores are dropped first."""
        return filters.abs().sum(1)
