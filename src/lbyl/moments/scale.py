"""The scale of inputs: what mean and deviation they are brought to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """Mean and deviation of one input, each a number for every channel (axis 1), or one for all."""

    mean: Float[Tensor, " channels"]
    deviation: Float[Tensor, " channels"]

    def of(self, unit: Float[Tensor, "batch channels *positions"]) -> Float[Tensor, "batch channels *positions"]:
        """An input of zero mean and unit variance, brought to this scale."""
        if float(self.mean.abs().max()) == 0 and bool((self.deviation == 1).all()):
            return unit
        shape = (1, -1, *[1] * (unit.dim() - 2)) if unit.dim() > 1 else (-1,)
        return unit * self.deviation.reshape(shape).to(unit) + self.mean.reshape(shape).to(unit)


UNIT = Scale(torch.zeros(1), torch.ones(1))


@dataclass(frozen=True)
class InputScales:
    """The scale of each tensor among the inputs, and what the user should know of it ("" for nothing)."""

    scales: tuple[Scale, ...]
    note: str = ""
