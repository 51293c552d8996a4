"""Layers in float64 that take less time or memory than PyTorch's own.

PyTorch computes depthwise convolutions in float64 on the CPU one channel after the other, which in a mobile network
takes several times as long as everything else. Linear layers need a float64 copy of their weight, which may be the
largest tensor of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lbyl.runtime.grouped import GROUPED, grouped_product
from lbyl.runtime.intercept import FunctionInterceptor


def depthwise_conv2d(
    x: Float[Tensor, "images channels height width"],
    weight: Float[Tensor, "out 1 rows columns"],
    bias: Float[Tensor, " out"] | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Float[Tensor, "images out new_height new_width"]:
    """A depthwise convolution, computed as a sum over the positions in the kernel.

    ``y = sum over i and j of w[i, j] * x[i :: stride, j :: stride]``. Channel ``c`` is the input of the filters from
    ``c * out / channels`` to ``(c + 1) * out / channels - 1``.
    """
    x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    x = x.repeat_interleave(weight.shape[0] // x.shape[1], 1) if weight.shape[0] != x.shape[1] else x
    taps = weight[:, 0, :, :, None, None]
    sides = [
        (side - far * (kernel - 1) - 1) // step + 1
        for side, kernel, step, far in zip(x.shape[2:], weight.shape[2:], stride, dilation, strict=True)
    ]
    y = x.new_zeros(*x.shape[:2], *sides)
    y += 0 if bias is None else bias[:, None, None]
    for row in range(weight.shape[2]):
        for column in range(weight.shape[3]):
            rows, columns = (
                slice(at * far, at * far + (side - 1) * step + 1, step)
                for at, side, step, far in zip((row, column), sides, stride, dilation, strict=True)
            )
            y.addcmul_(x[:, :, rows, columns], taps[:, row, column])
    return y


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Replaces `torch.conv2d`, with the same arguments and result."""
    fits = input.dim() == weight.dim() == 4 and groups == input.shape[1] > 1 == weight.shape[1]
    slow = input.device.type == "cpu" and input.dtype == weight.dtype == torch.float64
    if not (fits and slow) or weight.shape[0] % groups or isinstance(padding, str):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return depthwise_conv2d(input, weight, bias, _pair(stride), _pair(padding), _pair(dilation))


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    rows, columns = (value, value) if isinstance(value, int) else (value[0], value[-1])
    return rows, columns


LARGE = 2**20
"""How many elements of a weight are converted to float64 at once."""


def _linear(
    input: Float[Tensor, "*rows columns"],
    weight: Float[Tensor, "out columns"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*rows out"]:
    """A linear layer in the input's precision that converts its weight in pieces of some outputs each."""
    if input.dtype.itemsize <= weight.dtype.itemsize:
        return functional.linear(input, weight, bias)
    size = max(1, LARGE // weight.shape[1])
    out = input.new_empty(*input.shape[:-1], len(weight))
    for piece, place in zip(weight.split(size), out.split(size, -1), strict=True):
        place.copy_(functional.linear(input, piece.to(input.dtype)))
    return out if bias is None else out.add_(bias)


def _norm(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A norm in its input's precision, which the model's own code may have made lower than that of the weights."""

    def narrowed(value: Any) -> Any:
        wider = isinstance(value, Tensor) and value.dtype.itemsize > input.dtype.itemsize
        return value.to(input.dtype) if wider else value

    try:
        return func(input, *args, **kwargs)  # others may know the weight by its identity, and take mixed precisions
    except RuntimeError:
        return func(input, *map(narrowed, args), **{name: narrowed(value) for name, value in kwargs.items()})


class Float64Mode(FunctionInterceptor):
    """While active, replaces depthwise convolutions and linear layers in float64 by the functions of this module.

    Products of experts, which PyTorch does not compute in float64, are replaced as well.

    ``narrower`` collects the precisions below float64 of results, which the model's own code asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.narrower: set[torch.dtype] = set()

    @property
    def narrowest(self) -> str:
        """The name of the least precise dtype in ``narrower``."""
        coarsest = max(self.narrower, key=lambda dtype: torch.finfo(dtype).eps)
        return str(coarsest).removeprefix("torch.")

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call, with a function of this module where there is one for it."""
        result = _OURS.get(func, func)(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point() and result.dtype != torch.float64:
            self.narrower.add(result.dtype)
        return result


_NORMS = (functional.layer_norm, functional.rms_norm, functional.group_norm)
_OURS: dict[Any, Any] = {
    torch.conv2d: _conv2d,
    functional.linear: _linear,
    GROUPED: grouped_product,
    **{norm: partial(_norm, norm) for norm in _NORMS},
}
