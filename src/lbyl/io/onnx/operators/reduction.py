"""Reductions and operators along an axis: sums, means, maxima, softmax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lbyl.io.onnx.operators.base import Node, number, operator, whole


def _l1(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    return x.abs().sum(dims, keepdim)


def _l2(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    return x.square().sum(dims, keepdim).sqrt()


def _log_sum(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    return x.sum(dims, keepdim).log()


def _sum_square(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    return x.square().sum(dims, keepdim)


def _product(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    for dim in sorted((d % x.dim() for d in dims), reverse=True):
        x = x.prod(dim, keepdim)
    return x


_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "ReduceL1": _l1,
    "ReduceL2": _l2,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceMax": torch.amax,
    "ReduceMean": torch.mean,
    "ReduceMin": torch.amin,
    "ReduceProd": _product,
    "ReduceSum": torch.sum,
    "ReduceSumSquare": _sum_square,
}


@operator(*_REDUCTIONS)
def reduction(node: Node) -> None:
    """A reduction over some or all axes."""
    axes = node.attributes.get("axes")
    if axes is None and node.operands > 1 and node.source(1) is not None:
        found = node.constant(1)
        if found is None:
            raise node.refuse("its axes are computed")
        axes = whole(found)
    if not axes and node.attributes.get("noop_with_empty_axes", 0):
        node.run(torch.clone, node.source(0))
        return
    keep = bool(node.attributes.get("keepdims", 1))
    node.run(partial(_reduce, function=_REDUCTIONS[node.operator], axes=axes, keep=keep), node.source(0))


def _reduce(x: Tensor, *, function: Callable[..., Tensor], axes: list[int] | None, keep: bool) -> Tensor:
    return function(x, list(axes or range(x.dim())), keep)


@operator("ArgMax", "ArgMin")
def extreme(node: Node) -> None:
    """The index of the largest or smallest element."""
    get = node.attributes.get
    if get("select_last_index", 0):
        raise node.refuse("it selects the last of equal elements")
    function = torch.argmax if node.operator == "ArgMax" else torch.argmin
    node.run(partial(function, dim=get("axis", 0), keepdim=bool(get("keepdims", 1))), node.source(0))


@operator("Softmax", "LogSoftmax", "Hardmax")
def softmax(node: Node) -> None:
    """Softmax along an axis; before opset 13, over that axis and all later ones."""
    functions = {"Softmax": functional.softmax, "LogSoftmax": functional.log_softmax, "Hardmax": _hardmax}
    function, old = functions[node.operator], node.opset < 13
    axis = node.attributes.get("axis", 1 if old else -1)
    node.run(partial(_softmax, function=function, axis=axis, flat=old), node.source(0))


def _softmax(x: Tensor, *, function: Callable[..., Tensor], axis: int, flat: bool) -> Tensor:
    axis %= x.dim()
    if flat and axis != x.dim() - 1:
        return function(x.flatten(axis), dim=-1).reshape(x.shape)
    return function(x, dim=axis)


def _hardmax(x: Tensor, dim: int) -> Tensor:
    return torch.zeros_like(x).scatter(dim, x.argmax(dim, keepdim=True), 1)


@operator("CumSum")
def cumulative(node: Node) -> None:
    """Running sums."""
    axis = number(node, 1)
    if axis is None:
        raise node.refuse("its axis is computed")
    get = node.attributes.get
    call = partial(_cumulative, axis=axis, exclusive=bool(get("exclusive", 0)), reverse=bool(get("reverse", 0)))
    node.run(call, node.source(0))


def _cumulative(x: Tensor, *, axis: int, exclusive: bool, reverse: bool) -> Tensor:
    x = x.flip(axis) if reverse else x
    total = x.cumsum(axis)
    total = total - x if exclusive else total
    return total.flip(axis) if reverse else total


@operator("TopK")
def top(node: Node) -> None:
    """The largest or smallest elements along an axis, and where they are."""
    get = node.attributes.get
    call = partial(_top, axis=get("axis", -1), largest=bool(get("largest", 1)), count=get("k"))
    node.run(call, node.source(0), node.source(1))


def _top(x: Tensor, k: Any, *, axis: int, largest: bool, count: int | None) -> tuple[Tensor, Tensor]:
    values, places = torch.topk(x, whole(k)[0] if count is None else count, axis, largest)
    return values, places


@operator("LpNormalization")
def normalization(node: Node) -> None:
    """Division by the norm along an axis."""
    get = node.attributes.get
    node.run(partial(_normalized, p=get("p", 2), dim=get("axis", -1)), node.source(0))


def _normalized(x: Tensor, *, p: int, dim: int) -> Tensor:
    return x / (_l1 if p == 1 else _l2)(x, [dim], True)
