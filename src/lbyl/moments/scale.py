"""The scale of probes: the mean, standard deviation and range that they are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lbyl.moments.integers import Integers


@dataclass(frozen=True)
class Scale:
    """Mean, standard deviation and bounds of one input tensor.

    Attributes:
        mean: one number for each channel (axis 1), or a single one for all.
        deviation: as for the mean.
        low: smallest value.
        high: largest value.
    """

    mean: Float[Tensor, " channels"]
    deviation: Float[Tensor, " channels"]
    low: float = -math.inf
    high: float = math.inf

    def of(self, unit: Float[Tensor, "batch channels *positions"]) -> Float[Tensor, "batch channels *positions"]:
        """Convert a tensor of zero mean and unit variance to this scale."""
        if self.usual:
            return unit
        shape = (1, -1, *[1] * (unit.dim() - 2)) if unit.dim() > 1 else (-1,)
        moved = unit * self.deviation.reshape(shape).to(unit) + self.mean.reshape(shape).to(unit)
        return moved.clamp(self.low, self.high)

    @property
    def bounded(self) -> bool:
        """Whether inputs stay within bounds."""
        return self.low > -math.inf or self.high < math.inf

    @property
    def usual(self) -> bool:
        """Whether this is zero mean and unit variance."""
        return not bool(self.mean.any()) and bool((self.deviation == 1).all())


UNIT = Scale(torch.zeros(1, dtype=torch.float32, device="cpu"), torch.ones(1, dtype=torch.float32, device="cpu"))


@dataclass(frozen=True)
class InputScales:
    """What each input tensor is like.

    Attributes:
        scales: the scale of each tensor.
        note: what the user should know; usually "".
        integers: how whole numbers vary, for each tensor; None for one that has none, or that is the same for all.
    """

    scales: tuple[Scale, ...]
    note: str = ""
    integers: tuple[Integers | None, ...] = ()

    @torch.no_grad()
    def clamp_(self, tensors: Sequence[Tensor]) -> None:
        """Bring inputs back within their bounds, in place."""
        for tensor, scale in zip(tensors, self.scales, strict=True):
            if scale.bounded and tensor.is_floating_point():
                tensor.clamp_(scale.low, scale.high)
