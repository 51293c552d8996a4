"""Inputs of several batch sizes, on which an exported file is traced and checked."""

from __future__ import annotations

import torch
from torch import Tensor

from lbyl.runtime.inputs import ExampleInputs


def batch_size(inputs: ExampleInputs, outputs: list[Tensor]) -> int | None:
    """The size of the first axis that inputs and outputs share, or else of the first input that has axes."""
    sizes = [t.shape[0] for t in inputs.tensors() if t.ndim and t.shape[0]]
    shared = [t.shape[0] for t in outputs if t.ndim and t.shape[0] in sizes]
    return next(iter((*shared, *sizes)), None)


def has_batch(tensor: Tensor, batch: int) -> bool:
    """Whether the first axis has the size of the batch."""
    return tensor.ndim > 0 and tensor.shape[0] == batch


def with_batch(inputs: ExampleInputs, batch: int, size: int) -> ExampleInputs:
    """Repeat the rows of the example inputs to get another batch size.

    Each row is scaled differently, so that a file that mixes up rows does not pass the check.
    """

    def resize(tensor: Tensor) -> Tensor:
        if size == batch or not has_batch(tensor, batch):
            return tensor
        rows = tensor.repeat(-(-size // batch), *[1] * (tensor.ndim - 1))[:size].clone()
        if tensor.is_floating_point():
            rows *= torch.linspace(1, 0.5, size, dtype=tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1))
        return rows

    return inputs.map(resize)
