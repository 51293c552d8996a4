"""Makes inputs of other sizes, for code whose views are only right for the sizes of the example inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lbyl.runtime.inputs import ExampleInputs

_SHORT = 4
"""Axes that are shorter than this are doubled, and others are shortened."""


def of_another_size(
    inputs: ExampleInputs, taken: Callable[[ExampleInputs], bool], lengths: bool
) -> ExampleInputs | None:
    """The inputs with one more row, and another length of every axis that allows it.

    A view may mix channels with positions or rows. Which channels meet in it then depends on the numbers of both.

    Args:
        inputs: the example inputs.
        taken: whether the network takes inputs.
        lengths: whether lengths may change, or only the number of rows.

    Returns:
        The inputs, or None if the network takes no other sizes.
    """
    found = inputs
    for axis, size in _axes(inputs):
        if axis and not lengths:
            continue
        for other in (size + 1,) if not axis else (2 * size,) if size < _SHORT else (3 * size // 4, size // 2):
            tried = _resized(found, axis, size, other)
            if taken(tried):
                found = tried
                break
    return None if found is inputs else found


def _axes(inputs: ExampleInputs) -> Iterator[tuple[int, int]]:
    """The axes that may have another length, with the length that they have: that of rows, and others."""
    tensors = inputs.tensors()
    if inputs.rows is None and tensors[0].dim():
        yield 0, tensors[0].shape[0]
    yield from dict.fromkeys((axis, tensor.shape[axis]) for tensor in tensors for axis in range(1, tensor.dim()))


def _resized(inputs: ExampleInputs, axis: int, size: int, other: int) -> ExampleInputs:
    """The inputs with another length of this axis, where it has this length; what is added is repeated."""

    def resize(tensor: Tensor) -> Tensor:
        if tensor.dim() <= axis or tensor.shape[axis] != size:
            return tensor
        return tensor.index_select(axis, torch.arange(other, device=tensor.device) % size)

    return inputs.map(resize)
