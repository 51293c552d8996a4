"""Converts arrays of ONNX files to tensors and back, also between layouts that differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""PyTorch's dtypes by ONNX's numbers for data types."""


def as_tensor(array: np.ndarray) -> Tensor:
    """A copy of an array as a tensor."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.tensor(array)


def as_array(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """A tensor as an array of the given dtype."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.numpy().astype(dtype)


def from_file(array: np.ndarray, layout: str, scale: float) -> Tensor:
    """The tensor of a module for a constant of the file, in a layout and multiplied by a scale.

    The layout is "same", "transposed", or "flat" if the constant in the file has additional axes of size 1.
    """
    if layout == "transposed":
        array = array.T
    elif layout == "flat":
        array = array.reshape(-1)
    held = as_tensor(np.ascontiguousarray(array))
    return held if scale == 1 else held * scale


def to_file(held: Tensor, layout: str, scale: float, old: np.ndarray) -> np.ndarray:
    """The constant of the file for a module's current tensor; ``old`` is the constant that the file had."""
    if scale != 1:
        held = held / scale
    array = as_array(held, old.dtype)
    if layout == "transposed":
        return np.ascontiguousarray(array.T)
    if layout == "flat":
        axis = next((d for d, size in enumerate(old.shape) if size != 1), old.ndim - 1)
        return array.reshape([array.size if d == axis else 1 for d in range(old.ndim)])
    return array


def from_gates(array: np.ndarray, direction: int, half: int | None, gates: Sequence[int]) -> Tensor:
    """The tensor of a recurrent layer for a part of a constant that holds the gates of all directions.

    Args:
        array: the constant, directions x rows x anything; a bias is directions x (2 x rows).
        direction: the part's direction.
        half: which half of a bias; None for a weight.
        gates: the place in the file of each gate of the tensor.
    """
    rows = array[direction] if half is None else np.split(array[direction], 2)[half]
    blocks = rows.reshape(len(gates), -1, *rows.shape[1:])
    return as_tensor(np.ascontiguousarray(blocks[list(gates)].reshape(rows.shape)))


def to_gates(held: Sequence[Tensor], halves: int, gates: Sequence[int], old: np.ndarray) -> np.ndarray:
    """The constant for all of its parts, by direction and half: what :func:`from_gates` takes apart."""
    parts = []
    for tensor in held:
        rows = as_array(tensor, old.dtype)
        blocks = rows.reshape(len(gates), -1, *rows.shape[1:])
        parts.append(blocks[np.argsort(gates)].reshape(rows.shape))
    return np.stack([np.concatenate(parts[place : place + halves]) for place in range(0, len(parts), halves)])
