"""Finds numbers of modules that say how much of something to take: a number of steps, and not how wide a layer is.

A network may keep the last 64 steps of a sequence and also have layers of 64 channels. If these get narrower, the
number of steps must not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from lbyl.runtime.contexts import plain_attention, undisturbed
from lbyl.runtime.copying import sharing_copy
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


def find_lengths(model: nn.Module, inputs: ExampleInputs, sizes: Collection[tuple[str, int]]) -> frozenset[Name]:
    """Attributes of modules that only say how much to take, on the example inputs.

    The model runs once with numbers that remember whose they are.

    Args:
        model: the network; it is not changed.
        inputs: the example inputs.
        sizes: paths of modules with the sizes that they spell out; only attributes with these values are looked at.
    """
    found = [
        (path, name, value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is int and (path, value) in sizes
    ]
    if not found:
        return frozenset()
    copy = sharing_copy(model)
    for path, name, value in found:
        vars(copy.get_submodule(path))[name] = _Marked(value, frozenset({(path, name)}))
    uses = _Uses()
    try:
        with torch.no_grad(), undisturbed(copy), plain_attention(), uses:
            inputs.cloned().call(copy)
    except Exception:  # code that takes no other type than int
        return frozenset()
    return frozenset(uses.taken - uses.wide)


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
    """Notes which marked numbers are given to functions that take something, and which to all others."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: set[Name] = set()
        self.wide: set[Name] = set()

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the marks in the arguments, and make the call."""
        seen = self.taken if func in _TAKING else self.wide
        for mark in _marks((args, kwargs)):
            seen |= mark.tags
        return func(*args, **kwargs)


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
