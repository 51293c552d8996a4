"""Finds numbers of modules that say how much of something to take: a number of steps, and not how wide a layer is.

A network may keep the last 64 steps of a sequence and also have layers of 64 channels. If these get narrower, the
number of steps must not. A range of the channels themselves is as wide as what is left of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from lbyl.graph.numbers import run_marked
from lbyl.graph.types import Size
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.intercept import FunctionInterceptor

Name = tuple[str, str]
"""The path of a module, and the name of its attribute."""

_TAKING = frozenset({
    *(torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.narrow, torch.narrow, torch.Tensor.select),
    *(torch.topk, torch.Tensor.topk, torch.kthvalue, torch.Tensor.kthvalue, torch.roll, torch.Tensor.roll),
    *(torch.arange, torch.linspace, torch.tril, torch.Tensor.tril, torch.triu, torch.Tensor.triu, torch.select),
})  # fmt: skip
"""Functions whose numbers say what to take of something."""

_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
_NARROWING = (torch.Tensor.narrow, torch.narrow)


def find_lengths(model: nn.Module, inputs: ExampleInputs, sizes: Collection[Size]) -> frozenset[Name]:
    """Attributes of modules that only say how much to take, on the example inputs.

    The model runs once with numbers that remember whose they are.

    Args:
        model: the network; it is not changed.
        inputs: the example inputs.
        sizes: the sizes that modules spell out, and the axes that channels run along; only attributes of these modules
            with these values are looked at.
    """
    spelled = {(size.module, size.value) for size in sizes}
    marks = {
        (path, name): _Marked(value, frozenset({(path, name)}))
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is int and (path, value) in spelled
    }
    uses = _Uses(sizes)
    return frozenset(uses.taken - uses.wide) if marks and run_marked(model, inputs, marks, uses) else frozenset()


class _Marked(int):
    """A whole number that knows which attributes it comes from."""

    tags: frozenset[Name]

    def __new__(cls, value: int, tags: frozenset[Name]) -> _Marked:
        made = super().__new__(cls, value)
        made.tags = tags
        return made

    def _with(self, value: Any, *others: Any) -> Any:
        tags = self.tags.union(*(other.tags for other in others if isinstance(other, _Marked)))
        return _Marked(value, tags) if type(value) is int else value

    def __neg__(self) -> Any:
        return self._with(int(self).__neg__())

    def __add__(self, other: Any) -> Any:
        return self._with(int(self).__add__(other), other)

    def __radd__(self, other: Any) -> Any:
        return self._with(int(self).__radd__(other), other)

    def __sub__(self, other: Any) -> Any:
        return self._with(int(self).__sub__(other), other)

    def __rsub__(self, other: Any) -> Any:
        return self._with(int(self).__rsub__(other), other)

    def __mul__(self, other: Any) -> Any:
        return self._with(int(self).__mul__(other), other)

    def __rmul__(self, other: Any) -> Any:
        return self._with(int(self).__rmul__(other), other)

    def __floordiv__(self, other: Any) -> Any:
        return self._with(int(self).__floordiv__(other), other)


class _Uses(FunctionInterceptor):
    """Notes which marked numbers are given to functions that take something, and which to all others.

    A bound along an axis that channels run along is no number of steps.
    """

    def __init__(self, sizes: Collection[Size]) -> None:
        super().__init__()
        self.taken: set[Name] = set()
        self.wide: set[Name] = set()
        self._channels = {(size.module, size.value, size.axis, size.rank) for size in sizes}

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the marks in the arguments, and make the call."""
        for axis, given in _by_axis(func, args, kwargs):
            for mark in _marks(given):
                for tag in mark.tags:
                    along = axis is not None and self._carries(tag[0], args[0], axis)
                    (self.wide if along or func not in _TAKING else self.taken).add(tag)
        return func(*args, **kwargs)

    def _carries(self, module: str, value: torch.Tensor, axis: int) -> bool:
        """Whether channels run along an axis of a value, of which the module takes a part."""
        axis %= value.dim()
        return (module, value.shape[axis], axis, value.dim()) in self._channels


def _by_axis(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[int | None, Any]]:
    """The arguments of a call, with the axis of the first one that each says something of; None where it is open."""
    if func in _INDEXING:
        yield from _items(args[1], args[0].dim())
        yield None, args[2:]
    elif func in _NARROWING and args:
        given = dict(zip(("dim", "start", "length"), args[1:], strict=False)) | kwargs
        yield given.pop("dim"), given
    else:
        yield None, (args, kwargs)


def _items(index: Any, rank: int) -> Iterator[tuple[int, Any]]:
    """The items of an index into a value with so many axes, and the axis that each is for."""
    items = index if isinstance(index, tuple) else (index,)
    axis, left = 0, rank - sum(map(_spanned, items))
    for item in items:
        yield axis, item
        axis += left if item is Ellipsis else _spanned(item)


def _spanned(item: Any) -> int:
    """How many axes one item of an index is for."""
    if isinstance(item, torch.Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    return 0 if item is None or item is Ellipsis or isinstance(item, bool) else 1


def _marks(value: Any) -> Iterator[_Marked]:
    if isinstance(value, _Marked):
        yield value
    elif isinstance(value, slice):
        yield from _marks((value.start, value.stop, value.step))
    elif isinstance(value, dict):
        yield from _marks(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _marks(each)
