"""Random scores, which are equal for equal seeds: the baseline of all criteria."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Random:
    """Random scores, which are equal for equal seeds: the baseline of all criteria."""

    def score(
        self, filters: Float[Tensor, "channels fan_in"], generator: torch.Generator
    ) -> Float[Tensor, " channels"]:
        """One score for each channel; channels with the lowest scores are dropped first."""
        return torch.rand(len(filters), generator=generator, dtype=torch.float64)
