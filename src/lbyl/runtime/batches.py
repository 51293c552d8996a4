"""Batches of inputs: how many there may be, cut into parts, joined, thinned."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.macs import count_macs


def channels_last(tensor: Tensor) -> Tensor:
    """Images in the layout that convolutions run fastest in; everything else as it is."""
    # Convolutions run faster in this layout on CPU, and the result does not depend on it.
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def layout(tensor: Tensor) -> torch.memory_format:
    """The order in which a tensor's numbers lie; layers copy what comes in another one than they go on with."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def split(inputs: ExampleInputs, sizes: Sequence[int]) -> list[ExampleInputs]:
    """Cut a batch into parts along its first axis."""
    total, first, parts = sum(sizes), 0, []
    for size in sizes:
        here = slice(first, first + size)
        parts.append(inputs.map(lambda t, here=here: t[here] if t.dim() and t.shape[0] == total else t))
        first += size
    return parts


def join(parts: Sequence[ExampleInputs]) -> ExampleInputs:
    """Batches as one, along their first axis; what is no batch is the first one's."""
    size = batch_size(parts[0])
    rows = zip(*(part.tensors() for part in parts), strict=True)
    whole = iter([torch.cat(row) if row[0].dim() and len(row[0]) == size else row[0] for row in rows])
    return parts[0].map(lambda _: next(whole))


def join_all(batches: Sequence[ExampleInputs]) -> ExampleInputs:
    """Batches of any sizes as one, where every tensor has a row an input."""
    rows = zip(*(batch.tensors() for batch in batches), strict=True)
    whole = iter([torch.cat(row) for row in rows])
    return batches[0].map(lambda _: next(whole))


def first_rows(inputs: ExampleInputs) -> ExampleInputs:
    """A batch of two at most; networks that run on more need not run on one."""
    size = batch_size(inputs)
    return split(inputs, [2, size - 2])[0] if size > 2 else inputs


def alike(size: int, most: int, least: int = 1) -> list[int]:
    """Sizes of parts that differ by one at most: none larger than ``most``, unless some were less than ``least``."""
    count = min(-(-size // max(1, most)), max(1, size // least))
    return [len(part) for part in torch.arange(size).tensor_split(count)]


def in_parts(inputs: ExampleInputs, most: int, least: int = 1) -> list[ExampleInputs]:
    """A batch as several of so many rows; see :func:`alike`."""
    sizes = alike(batch_size(inputs), most, least)
    return split(inputs, sizes) if len(sizes) > 1 else [inputs]


FEWEST = 4
"""Batches are not made smaller than this: their statistics would tell too little."""


def thinned(batches: Sequence[ExampleInputs], most: int) -> list[ExampleInputs]:
    """Fewer rows of every batch, evenly spread, ``most`` in all; none where that leaves less than 4 of some batch."""
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
    """Multiply-accumulates that one input takes.

    Where the network takes batches of one size only, each input has its share of what a call takes besides.
    """
    return max(count_macs(model, inputs) / max(batch_size(inputs), 1), 1.0) + _CALL / (inputs.rows or _CALL)


_CALL = 1e9
"""What a call takes by itself, in multiply-accumulates of the same time."""


def affordable(each: float, macs: float, least: int, most: int, ceiling: float) -> int:
    """How many inputs one forward pass over all of them may have.

    As many as ``macs`` allow at ``each`` multiply-accumulates an input, between ``least`` and ``most``; but no more
    than ``ceiling`` multiply-accumulates allow, for a batch must fit into memory too, unless these are less than 4.
    """
    wanted = max(least, min(most, macs / each))
    return round(min(wanted, max(4, ceiling / each)))


def batch_size(inputs: ExampleInputs) -> int:
    """Length of the first tensor's first axis."""
    return inputs.size


def held_out_size(count: int) -> int:
    """A quarter of the probes, at least two, is kept away from the solves."""
    return max(2, math.ceil(count / 4))
