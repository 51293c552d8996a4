"""The sum of distances to all other filters (He et al. 2019, FPGM): what is far from the rest stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class GeometricMedian:
    """The sum of distances to all other filters (He et al. 2019, FPGM): what is far from the rest stays."""

    def score(
        self, filters: Float[Tensor, "channels fan_in"], generator: torch.Generator
    ) -> Float[Tensor, " channels"]:
        """One score a channel; the lowest go first."""
        return torch.cdist(filters, filters).sum(1)
