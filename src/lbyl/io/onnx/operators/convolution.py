"""Convolutions and pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lbyl.io.onnx.operators.base import Node, operator

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_FUNCTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED_FUNCTIONS = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
_MAX_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE_POOLS = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def pad_around(
    x: Tensor,
    mode: str,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    value: float = 0.0,
) -> Tensor:
    """Pad the trailing axes by ``pads`` (all starts, then all ends), or according to ``auto_pad``."""
    axes = len(kernel)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        sides = []
        for size, k, s, d in zip(x.shape[-axes:], kernel, strides, dilations, strict=True):
            total = max((math.ceil(size / s) - 1) * s + d * (k - 1) + 1 - size, 0)
            less, more = total // 2, total - total // 2
            sides.append((less, more) if mode == "SAME_UPPER" else (more, less))
    else:
        sides = [(pads[d], pads[d + axes]) for d in range(axes)]
    flat = [side for pair in reversed(sides) for side in pair]
    return functional.pad(x, flat, value=value) if any(flat) else x


def window(node: Node, axes: int, kernel: Sequence[int]) -> dict[str, Any]:
    """Kernel, strides, dilations and padding of a node."""
    get = node.attributes.get
    mode = get("auto_pad", "NOTSET")
    return {
        "mode": mode,
        "kernel": list(kernel),
        "strides": list(get("strides") or [1] * axes),
        "dilations": list(get("dilations") or [1] * axes),
        "pads": [0] * (2 * axes) if mode == "VALID" else list(get("pads") or [0] * (2 * axes)),
    }


def _even(given: dict[str, Any]) -> list[int] | None:
    """The padding of each axis if it is equal on both sides, else None."""
    pads, axes = given["pads"], len(given["kernel"])
    even = given["mode"] in ("NOTSET", "VALID", "") and pads[:axes] == pads[axes:] and min(pads, default=0) >= 0
    return pads[:axes] if even else None


@operator("Conv")
def convolution(node: Node) -> None:
    """Convolution, with a bias that the next node may add."""
    weight, groups = node.constant(1), node.attributes.get("group", 1)
    if weight is None or weight.ndim not in (3, 4, 5):
        axes = len(node.attributes.get("kernel_shape") or ())
        if axes not in _FUNCTIONS:
            raise node.refuse("its weight is computed, and its kernel_shape is missing")
        given = window(node, axes, node.attributes["kernel_shape"])
        node.run(partial(_free_convolution, axes=axes, groups=groups, **given), *map(node.source, range(3)))
        return
    axes = weight.ndim - 2
    given = window(node, axes, weight.shape[2:])
    even = _even(given)
    own = _bias_of(node, len(weight), axes)
    layer = _CONVOLUTIONS[axes](
        weight.shape[1] * groups,
        len(weight),
        tuple(weight.shape[2:]),
        stride=tuple(given["strides"]),
        padding=tuple(even or [0] * axes),
        dilation=tuple(given["dilations"]),
        groups=groups,
        bias=own is not None,
        device="meta",
    )
    _place(node, layer, given, own, even)
    node.width("groups", "group")


def _bias_of(node: Node, width: int, axes: int) -> int | None:
    """The operand that is the layer's bias, which another node may add; None if there is none."""
    own = 2 if node.is_constant(2) else None if node.operands > 2 else node.bias(width, axes)
    if own is None and node.operands > 2 and node.source(2) is not None:
        raise node.refuse("its bias is computed")
    return own


def _place(node: Node, layer: nn.Module, given: dict[str, Any], bias: int | None, even: list[int] | None) -> None:
    held = {"weight": (1, "same", 1.0)}
    if bias is not None:
        held["bias"] = (bias, "flat", 1.0)
    source = node.source(0) if even is not None else node.first(partial(pad_around, **given), node.source(0))
    node.layer(layer, held, source)


def _free_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, axes: int, groups: int, **given: Any
) -> Tensor:
    x = pad_around(x, **given)
    return _FUNCTIONS[axes](
        x, weight, bias, stride=given["strides"], padding=0, dilation=given["dilations"], groups=groups
    )


@operator("ConvTranspose")
def transposed(node: Node) -> None:
    """Transposed convolution."""
    weight, groups = node.constant(1), node.attributes.get("group", 1)
    if weight is None or weight.ndim not in (3, 4, 5):
        raise node.refuse("its weight is computed")
    axes = weight.ndim - 2
    given = window(node, axes, weight.shape[2:])
    extra = list(node.attributes.get("output_padding") or [0] * axes)
    even = _even(given)
    if even is None or node.attributes.get("output_shape"):
        raise node.refuse("its padding is not equal on both sides, or depends on the output's shape")
    own = _bias_of(node, weight.shape[1] * groups, axes)
    layer = _TRANSPOSED[axes](
        len(weight),
        weight.shape[1] * groups,
        tuple(weight.shape[2:]),
        stride=tuple(given["strides"]),
        padding=tuple(even),
        output_padding=tuple(extra),
        dilation=tuple(given["dilations"]),
        groups=groups,
        bias=own is not None,
        device="meta",
    )
    _place(node, layer, given, own, even)
    node.width("groups", "group")


@operator("MaxPool")
def max_pool(node: Node) -> None:
    """Maximum over each window."""
    kernel = node.attributes["kernel_shape"]
    given, ceil = window(node, len(kernel), kernel), bool(node.attributes.get("ceil_mode", 0))
    if len(kernel) not in _MAX_POOLS:
        raise node.refuse(f"it pools over {len(kernel)} axes")
    node.run(partial(_max_pool, ceil=ceil, even=_even(given), **given), node.source(0))


def _max_pool(x: Tensor, *, ceil: bool, even: list[int] | None, **given: Any) -> Tensor:
    kernel = given["kernel"]
    if even is None or any(2 * p > k for p, k in zip(even, kernel, strict=True)):
        x, even = pad_around(x, value=-math.inf, **given), [0] * len(kernel)
    return _MAX_POOLS[len(kernel)](
        x, kernel, stride=given["strides"], padding=even, dilation=given["dilations"], ceil_mode=ceil
    )


@operator("AveragePool")
def average_pool(node: Node) -> None:
    """Mean over each window."""
    kernel = node.attributes["kernel_shape"]
    given, get = window(node, len(kernel), kernel), node.attributes.get
    if len(kernel) not in _AVERAGE_POOLS or any(d != 1 for d in given["dilations"]):
        raise node.refuse(f"it pools over {len(kernel)} axes, or with dilation")
    count, ceil = bool(get("count_include_pad", 0)), bool(get("ceil_mode", 0))
    node.run(partial(_average_pool, ceil=ceil, count=count, even=_even(given), **given), node.source(0))


def _average_pool(x: Tensor, *, ceil: bool, count: bool, even: list[int] | None, **given: Any) -> Tensor:
    kernel, strides = given["kernel"], given["strides"]
    pool = partial(_AVERAGE_POOLS[len(kernel)], kernel_size=kernel, stride=strides, ceil_mode=ceil)
    if even is not None and all(2 * p <= k for p, k in zip(even, kernel, strict=True)):
        return pool(x, padding=even, count_include_pad=count)
    padded = pad_around(x, **given)
    if count:
        return pool(padded)
    ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    return pool(padded) / pool(pad_around(ones, **given))


@operator("GlobalAveragePool", "GlobalMaxPool")
def global_pool(node: Node) -> None:
    """Mean or maximum over each channel."""
    node.run(_global_mean if node.operator == "GlobalAveragePool" else _global_max, node.source(0))


def _global_mean(x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


def _global_max(x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)
