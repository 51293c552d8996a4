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
        mean: one number for each channel, or a single one for all.
        deviation: as for the mean.
        low: smallest value.
        high: largest value.
        axis: the axis of the channels, which is the last one where inputs are sequences of features.
    """

    mean: Float[Tensor, " channels"]
    deviation: Float[Tensor, " channels"]
    low: float = -math.inf
    high: float = math.inf
    axis: int = 1

    def of(self, unit: Float[Tensor, "batch channels *positions"]) -> Float[Tensor, "batch channels *positions"]:
        """Convert a tensor of zero mean and unit variance to this scale."""
        if self.usual:
            return unit
        moved = unit * self._along(unit, self.deviation) + self._along(unit, self.mean)
        return moved.clamp(self.low, self.high)

    def step(self, tensor: Tensor, share: float) -> float | Tensor:
        """A step of this share of a deviation: one number for all values, or one for each channel of the tensor."""
        if len(self.deviation) == 1:
            return share * float(self.deviation)
        return share * self._along(tensor, self.deviation)

    def _along(self, tensor: Tensor, numbers: Float[Tensor, " channels"]) -> Tensor:
        """One number for each channel, in the shape that stretches over a tensor."""
        shape = [1] * tensor.dim()
        shape[self.axis if tensor.dim() > 1 else 0] = -1
        return numbers.reshape(shape).to(tensor)

    @property
    def bounded(self) -> bool:
        """Whether inputs stay within bounds."""
        return self.low > -math.inf or self.high < math.inf

    @property
    def kept(self) -> bool:
        """Whether the example is taken as it is, because nothing varies."""
        return not bool(self.deviation.any())

    @property
    def usual(self) -> bool:
        """Whether this is zero mean and unit variance."""
        return not bool(self.mean.any()) and bool((self.deviation == 1).all())


def feature_axes(tensor: Tensor) -> tuple[int, ...]:
    """The axes along which an input may hold its features: the second one, and the last one of a sequence."""
    return (1,) if tensor.dim() == 2 else (1, tensor.dim() - 1)


def by_feature(values: Float[Tensor, "..."], axis: int) -> Float[Tensor, "values features"]:
    """The values of each feature, in float64 on the CPU."""
    return values.detach().double().cpu().movedim(axis, -1).flatten(0, -2)


_ZERO, _ONE = torch.tensor([[0.0], [1.0]], dtype=torch.float32, device="cpu")
UNIT, KEPT = Scale(_ZERO, _ONE), Scale(_ZERO, _ZERO)


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
