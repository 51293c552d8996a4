"""Compares a written file with its network: makes the inputs that a plan describes, and measures differences."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from lbyl.errors import InputError
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.sentinels import meaningful
from lbyl.surgery.plan import Plan

_LARGEST_INPUT = 2**28


def described_inputs(plan: Plan, seed: int) -> ExampleInputs:
    """Random inputs of the shapes that the plan was made for.

    Raises:
        InputError: the plan states no shapes, or valid inputs of these dtypes can't be made up.
    """
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for text in plan.inputs.split(", "):
        found = re.fullmatch(r"(\w+) (scalar|\d+(?:x\d+)*)", text)
        dtype = getattr(torch, found[1], None) if found else None
        if found is None or not isinstance(dtype, torch.dtype):
            raise InputError(f"the plan describes the inputs as {plan.inputs!r}, without shapes; pass inputs=")
        if not dtype.is_floating_point and not dtype.is_complex:
            raise InputError(
                f"the network was compressed on {plan.inputs}: {found[1]} can't be made up, because token ids and "
                "indices have a limited range. Pass the model's inputs as inputs= (--input on the command line)"
            )
        shape = [int(size) for size in found[2].split("x")] if found[2] != "scalar" else []
        if math.prod(shape) > _LARGEST_INPUT:
            raise InputError(f"the plan describes the inputs as {plan.inputs!r}, which is too large; pass inputs=")
        drawn = dtype if dtype.is_complex else torch.float32
        made.append(torch.randn(shape, generator=generator, dtype=drawn).to(dtype))
    return ExampleInputs(tuple(made))


def difference(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """The largest absolute difference, and this difference relative to the largest magnitude of ``expected``.

    Masked values (`lbyl.runtime.sentinels`) do not count as magnitudes.
    """
    a, b = expected.detach().double(), found.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())  # the difference of equal infinities is NaN
    apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf)
    largest = float(apart.max()) if apart.numel() else 0.0
    finite = a[meaningful(a)].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return largest, largest / scale if scale else largest
