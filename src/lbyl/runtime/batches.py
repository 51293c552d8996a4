"""Batches of inputs: splits, joins and thins them, and chooses how many inputs there are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.macs import count_macs


def channels_last(tensor: Tensor) -> Tensor:
    """Images in the channels-last memory format; all other tensors unchanged."""
    # Convolutions run faster in this layout on CPU, and the result does not depend on it.
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def layout(tensor: Tensor) -> torch.memory_format:
    """The memory format of a tensor. Inputs in another format than a layer uses are copied at every call."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def split(inputs: ExampleInputs, sizes: Sequence[int]) -> list[ExampleInputs]:
    """Split a batch along its first axis into parts of these sizes."""
    total, first, parts = sum(sizes), 0, []
    for size in sizes:
        here = slice(first, first + size)
        parts.append(inputs.map(lambda t, here=here: t[here] if t.dim() and t.shape[0] == total else t))
        first += size
    return parts


def join(parts: Sequence[ExampleInputs]) -> ExampleInputs:
    """Join batches along their first axis. Tensors without a row for each input are taken from the first batch."""
    size = batch_size(parts[0])
    rows = zip(*(part.tensors() for part in parts), strict=True)
    whole = iter([torch.cat(row) if row[0].dim() and len(row[0]) == size else row[0] for row in rows])
    return parts[0].map(lambda _: next(whole))


def join_all(batches: Sequence[ExampleInputs]) -> ExampleInputs:
    """Join batches of any sizes in which every tensor has a row for each input."""
    rows = zip(*(batch.tensors() for batch in batches), strict=True)
    whole = iter([torch.cat(row) for row in rows])
    return batches[0].map(lambda _: next(whole))


def first_rows(inputs: ExampleInputs, count: int = 2) -> ExampleInputs:
    """The first inputs of a batch, by default two: some networks do not run on a single one."""
    size = batch_size(inputs)
    return split(inputs, [count, size - count])[0] if size > count else inputs


def with_rows(inputs: ExampleInputs, index: int, rows: Tensor) -> ExampleInputs:
    """The inputs with other rows in place of one of them; others that have a row for each get as many copies of one."""
    example = inputs.tensors()[index]

    def as_many(tensor: Tensor) -> Tensor:
        if tensor is example:
            return rows
        batched = tensor.dim() and len(tensor) == len(example)
        return tensor[:1].expand(len(rows), *tensor.shape[1:]) if batched else tensor

    return inputs.map(as_many)


def alike(size: int, most: int, least: int = 1) -> list[int]:
    """Sizes of parts of nearly equal size: at most ``most`` each, unless some would then be below ``least``."""
    count = min(-(-size // max(1, most)), max(1, size // least))
    return [len(part) for part in torch.arange(size).tensor_split(count)]


def in_parts(inputs: ExampleInputs, most: int, least: int = 1) -> list[ExampleInputs]:
    """A batch split into parts of nearly equal size; see :func:`alike`."""
    sizes = alike(batch_size(inputs), most, least)
    return split(inputs, sizes) if len(sizes) > 1 else [inputs]


FEWEST = 4
"""Smallest size of a thinned batch: statistics of fewer inputs would be too inaccurate."""


def thinned(batches: Sequence[ExampleInputs], most: int) -> list[ExampleInputs]:
    """Evenly spaced rows of every batch, at most ``most`` in all; [] if some batch would keep fewer than 4 rows."""
    sizes = [batch_size(batch) for batch in batches]
    if sum(sizes) <= most:
        return list(batches)
    fewer = [size * most // sum(sizes) for size in sizes]
    if min(fewer) < FEWEST:
        return []

    def rows(tensor: Tensor, size: int, count: int) -> Tensor:
        chosen = tensor[torch.arange(count, device=tensor.device) * size // count]
        return chosen.contiguous(memory_format=layout(tensor))

    return [
        batch.map(lambda t, s=size, n=n: rows(t, s, n) if t.dim() and t.shape[0] == s else t)
        for batch, size, n in zip(batches, sizes, fewer, strict=True)
    ]


def macs_per_input(model: nn.Module, inputs: ExampleInputs) -> float:
    """Multiply-accumulates for each input of the batch.

    For a network that takes one batch size only, they include a share of the overhead of each call.
    """
    each = max(count_macs(model, inputs) / max(batch_size(inputs), 1), 1.0)
    return each + _CALL / inputs.rows if inputs.rows else each


_CALL = 1e9
"""The overhead of a call, in multiply-accumulates that take as long."""


def affordable(each: float, macs: float, least: int, most: int, ceiling: float) -> int:
    """The number of inputs that a budget of multiply-accumulates allows.

    Args:
        each: multiply-accumulates of one input.
        macs: the budget.
        least: smallest number of inputs, even if the budget is too small for it.
        most: largest number of inputs.
        ceiling: multiply-accumulates that one batch must not exceed, so that it fits into memory; at least 4 inputs
            are allowed nevertheless.
    """
    wanted = max(least, min(most, macs / each))
    return round(min(wanted, max(4, ceiling / each)))


def batch_size(inputs: ExampleInputs) -> int:
    """Length of the first tensor's first axis."""
    return inputs.size


def held_out_size(count: int) -> int:
    """The number of held-out probes out of ``count``: a quarter, and at least two."""
    return max(2, math.ceil(count / 4))
