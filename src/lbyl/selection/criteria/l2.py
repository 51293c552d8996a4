"""The L2 norm of a filter: the paper's criterion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class L2:
    """``(sum_i w_ji^2)^(1/2)``, the L2 norm of a filter: the criterion in the paper (arXiv 2502.08474)."""

    norm_order: ClassVar[int] = 2

    def score(
        self, filters: Float[Tensor, "channels fan_in"], generator: torch.Generator
    ) -> Float[Tensor, " channels"]:
        """One score for each channel; channels with the lowest scores are dropped first."""
        return filters.norm(dim=1)
