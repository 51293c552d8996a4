"""Finds numbers of modules that equal a width by chance: a number of steps, a window, a longest sequence.

A network may keep the last 64 steps of a sequence and also have layers of 64 channels. If these get narrower, the
number of steps must not. A range of the channels themselves is as wide as what is left of them.

Numbers that the code only compares or counts by leave no trace in what PyTorch computes. Verification sees no
difference if such a number changes, as long as it does not matter on the example inputs. So these stay as they are,
unless their name says that they are a width.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lbyl.graph.numbers import run_marked
from lbyl.graph.types import Size
from lbyl.runtime.contexts import plain_attention, undisturbed
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.inputs import ExampleInputs, outputs_if_taken
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
_SHAPING = (torch.Tensor.view, torch.Tensor.reshape, torch.reshape)
"""Functions whose numbers are the lengths of the axes of what they return."""

_WIDTHS = re.compile(
    "heads|features|channels|planes|filters|units|neurons|width|hidden|inner|intermediate|embed_|dim|num_parameters|d_model"
    "|(head|split|embedding)_size"
)
"""Names of attributes that are widths or numbers of heads, also where nothing that runs depends on them."""

_MOST_RUNS = 16
"""So many kinds of numbers are tried one by one."""


def find_lengths(model: nn.Module, inputs: ExampleInputs, sizes: Collection[Size]) -> frozenset[Name]:
    """Attributes of modules that equal a width, but say something else, on the example inputs.

    The model runs once with numbers that remember whose they are. A number says something else if it only says how much
    to take, or only how long axes are that no channels run along. So does one that no function of PyTorch gets, if
    another one of the module is that width, or if the outputs do not depend on it.

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
    if not marks or not run_marked(model, inputs, marks, uses):
        return frozenset()
    uses.explain_products()
    explained = {(path, int(marks[path, name])) for path, name in uses.wide}
    unseen = marks.keys() - uses.wide - uses.taken - uses.placed
    unseen = {(path, name) for path, name in unseen if not _WIDTHS.search(name)}
    others = {(path, name) for path, name in unseen if (path, int(marks[path, name])) in explained}
    idle = _without_effect(model, inputs, unseen - others)
    return frozenset((uses.taken | uses.placed) - uses.wide) | others | idle


def _without_effect(model: nn.Module, inputs: ExampleInputs, names: Collection[Name]) -> frozenset[Name]:
    """The attributes on which the outputs do not depend: all of them together, or those of each class and name."""
    modules = dict(model.named_modules())
    names = [(path, name) for path, name in names if vars(modules[path])[name] > 1]
    if not names:
        return frozenset()
    reference = _outputs_with(model, inputs, ())
    if reference is None:
        return frozenset()

    def same(some: Sequence[Name]) -> bool:
        found = _outputs_with(model, inputs, some)
        return found is not None and len(found) == len(reference) and all(map(torch.equal, found, reference))

    if same(names):
        return frozenset(names)
    kinds: dict[tuple[type[nn.Module], str], list[Name]] = {}
    for path, name in names:
        kinds.setdefault((type(modules[path]), name), []).append((path, name))
    if len(kinds) > _MOST_RUNS:
        return frozenset()
    return frozenset(each for some in kinds.values() if len(kinds) > 1 and same(some) for each in some)


def _outputs_with(model: nn.Module, inputs: ExampleInputs, names: Collection[Name]) -> list[torch.Tensor] | None:
    """The outputs of a copy in which these attributes are smaller by one; None if it does not run."""
    copy = sharing_copy(model)
    for path, name in names:
        vars(copy.get_submodule(path))[name] -= 1
    with undisturbed(copy), plain_attention():
        return outputs_if_taken(copy, inputs)


class _Marked(int):
    """A whole number that knows which attributes it comes from, and whether it is their product.

    It is ``divided`` if the attributes only divide a number from elsewhere, as in ``x.shape[1] // self.share``.
    """

    tags: frozenset[Name]
    product: bool
    divided: bool

    def __new__(cls, value: int, tags: frozenset[Name], product: bool = True, divided: bool = False) -> _Marked:
        made = super().__new__(cls, value)
        made.tags, made.product, made.divided = tags, product, divided
        return made

    def _with(self, value: Any, *others: Any, product: bool = False, divided: bool = False) -> Any:
        marked = [self, *(other for other in others if isinstance(other, _Marked))]
        tags, product = frozenset().union(*(mark.tags for mark in marked)), product and all(m.product for m in marked)
        divided = all(mark.divided for mark in marked) or (divided and len(marked) == 1)
        return _Marked(value, tags, product, divided) if type(value) is int else value

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
        return self._with(int(self).__mul__(other), other, product=True)

    def __rmul__(self, other: Any) -> Any:
        return self._with(int(self).__rmul__(other), other, product=True)

    def __floordiv__(self, other: Any) -> Any:
        return self._with(int(self).__floordiv__(other), other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with(int(self).__rfloordiv__(other), other, divided=True)


class _Uses(FunctionInterceptor):
    """Notes which marked numbers are given to functions that take something, which to shapes, and which to all others.

    A bound along an axis that channels run along is no number of steps, and the length of one is a width.
    """

    def __init__(self, sizes: Collection[Size]) -> None:
        super().__init__()
        self.taken: set[Name] = set()
        self.wide: set[Name] = set()
        self.placed: set[Name] = set()
        self._products: list[set[Name]] = []
        self._channels = {(size.module, size.value, size.axis, size.rank) for size in sizes}

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the marks in the arguments, and make the call."""
        if func in _SHAPING:
            self._note_lengths(args[1:], kwargs)
            return func(*args, **kwargs)
        for axis, given, gone in _by_axis(func, args, kwargs):
            for mark in _marks(given):
                for tag in mark.tags:
                    # A bound that is a share of a width is one, but the number of shares is not.
                    along = axis is not None and not mark.divided and self._carries(tag[0], args[0], axis, gone)
                    (self.wide if along or func not in _TAKING else self.taken).add(tag)
        return func(*args, **kwargs)

    def _note_lengths(self, given: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note whether each number in a shape is the length of an axis that channels run along."""
        given = given or (kwargs.get("shape", ()),)
        lengths = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        for axis, length in enumerate(lengths):
            for mark in _marks(length):
                along = {tag for tag in mark.tags if (tag[0], int(mark), axis, len(lengths)) in self._channels}
                if mark.product:  # others say too little, such as heads per key
                    self.placed |= mark.tags
                if len(along) == 1:
                    self.wide |= along
                elif along:
                    self._products.append(along)

    def explain_products(self) -> None:
        """Of a product that is a width (heads times their size, say), all factors count as one if none is known to."""
        for tags in self._products:
            if not tags & self.wide:
                self.wide |= tags

    def _carries(self, module: str, value: torch.Tensor, axis: int, gone: int) -> bool:
        """Whether channels run along an axis of a value, of which the module takes a part, after so many axes went."""
        axis %= value.dim()
        return (module, value.shape[axis], axis - gone, value.dim() - gone) in self._channels


def _by_axis(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[int | None, Any, int]]:
    """The arguments of a call, each with the axis of the first one that it says something of, None where it is open.

    The last number is how many axes before that one are gone by then, because the call takes a single index of them.
    """
    if func in _INDEXING:
        yield from _items(args[1], args[0].dim())
        yield None, args[2:], 0
    elif func in _NARROWING and args:
        given = dict(zip(("dim", "start", "length"), args[1:], strict=False)) | kwargs
        yield given.pop("dim"), given, 0
    else:
        yield None, (args, kwargs), 0


def _items(index: Any, rank: int) -> Iterator[tuple[int, Any, int]]:
    """The items of an index into a value with so many axes, the axis of each, and how many are gone by then."""
    items = index if isinstance(index, tuple) else (index,)
    axis, left, gone = 0, rank - sum(map(_spanned, items)), 0
    for item in items:
        yield axis, item, gone
        axis += left if item is Ellipsis else _spanned(item)
        gone += isinstance(item, int) and not isinstance(item, bool)


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
