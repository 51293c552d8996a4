"""A random order, the same for the same seed: the baseline of all criteria."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Random:
    """A random order, the same for the same seed: the baseline of all criteria."""

    def score(
        self, filters: Float[Tensor, "channels fan_in"], generator: torch.Generator
    ) -> Float[Tensor, " channels"]:
        """One score a channel; the lowest go first."""
        return torch.rand(len(filters), generator=generator, dtype=torch.float64)
