"""The sum of distances to all other filters (He et al. 2019, "FPGM", arXiv 1811.00250)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class GeometricMedian:
    """``sum_k |w_j - w_k|``, the sum of distances to all other filters (He et al. 2019, "FPGM", arXiv 1811.00250)."""

    def score(
        self, filters: Float[Tensor, "channels fan_in"], generator: torch.Generator
    ) -> Float[Tensor, " channels"]:
        """One score for each channel; channels with the lowest scores are dropped first."""
        return torch.cdist(filters, filters).sum(1)
