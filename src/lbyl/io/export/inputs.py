"""Inputs that a file is traced and checked on, in several batch sizes."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from lbyl.errors import InputError
from lbyl.runtime.inputs import ExampleInputs
from lbyl.surgery.plan import Plan

_LARGEST_INPUT = 2**28


def described_inputs(plan: Plan, seed: int) -> ExampleInputs:
    """Random inputs of the shapes that the plan was made for.

    Raises:
        InputError: the plan doesn't say shapes, or inputs of these dtypes can't be made up.
    """
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for text in plan.inputs.split(", "):
        found = re.fullmatch(r"(\w+) (scalar|\d+(?:x\d+)*)", text)
        dtype = getattr(torch, found[1], None) if found else None
        if found is None or not isinstance(dtype, torch.dtype):
            raise InputError(f"the plan describes the inputs as {plan.inputs!r}, which says no shapes; pass inputs=")
        if not dtype.is_floating_point:
            raise InputError(
                f"the network was compressed on {plan.inputs}: {found[1]} can't be made up, for token ids and indices "
                "have a range. Pass what the model is called with as inputs= (--input on the command line)"
            )
        shape = [int(size) for size in found[2].split("x")] if found[2] != "scalar" else []
        if math.prod(shape) > _LARGEST_INPUT:
            raise InputError(f"the plan describes the inputs as {plan.inputs!r}, which is too large; pass inputs=")
        made.append(torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype))
    return ExampleInputs(tuple(made))


def batch_size(inputs: ExampleInputs, outputs: list[Tensor]) -> int | None:
    """The size of the first axis that inputs and outputs share; else that of the first input that has one."""
    sizes = [t.shape[0] for t in inputs.tensors() if t.ndim and t.shape[0]]
    shared = [t.shape[0] for t in outputs if t.ndim and t.shape[0] in sizes]
    return next(iter((*shared, *sizes)), None)


def has_batch(tensor: Tensor, batch: int) -> bool:
    """Whether the first axis has the size of the batch."""
    return tensor.ndim > 0 and tensor.shape[0] == batch


def with_batch(inputs: ExampleInputs, batch: int, size: int) -> ExampleInputs:
    """The example's rows, repeated to another batch size.

    Each row is scaled differently, because a file that mixes up equal rows would pass the check.
    """

    def resize(tensor: Tensor) -> Tensor:
        if size == batch or not has_batch(tensor, batch):
            return tensor
        rows = tensor.repeat(-(-size // batch), *[1] * (tensor.ndim - 1))[:size].clone()
        if tensor.is_floating_point():
            rows *= torch.linspace(1, 0.5, size, dtype=tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1))
        return rows

    return inputs.map(resize)
