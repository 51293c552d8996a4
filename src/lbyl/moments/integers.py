"""Whole numbers among a network's inputs (rows of tables, times, categories, masks), and how probes vary them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from lbyl.runtime.inputs import ExampleInputs, outputs_if_taken
from lbyl.runtime.intercept import FunctionInterceptor, leading_arguments


@dataclass(frozen=True)
class Integers:
    """How probes vary one input of whole numbers.

    Attributes:
        low: the smallest value at each position of a row.
        high: the largest value.
        table: number of rows of the table in which all of them are looked up; 0 for none, or for several tables.
        rows: rows of the example, of which each probe gets one; None to draw between ``low`` and ``high``.
    """

    low: Int[Tensor, "*positions"]
    high: Int[Tensor, "*positions"]
    table: int = 0
    rows: Int[Tensor, "rows *positions"] | None = None

    def draw(self, count: int, generator: torch.Generator) -> Int[Tensor, "count *positions"]:
        """Values for ``count`` probes, in int64 on the CPU."""
        shape = (count, *self.low.shape)
        if self.table:
            return tokens(self.table, shape, generator)
        if self.rows is not None:
            return self.rows[torch.randint(len(self.rows), (count,), generator=generator)]
        if bool((self.low == self.high).all()):
            return self.low.expand(shape).clone()
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64) * (self.high - self.low + 1)
        return (self.low + drawn.long()).minimum(self.high)


def tokens(size: int, shape: Sequence[int], generator: torch.Generator) -> Int[Tensor, "..."]:
    """Random rows of a table. In a large table, early rows are more frequent, by the Zipf-Mandelbrot law.

    Most vocabularies list common words first, and a few common words make up most of a text.
    """
    if size < _VOCABULARY:
        return torch.randint(size, tuple(shape), generator=generator)
    offset = size / 30
    drawn = offset * (size / offset + 1) ** torch.rand(tuple(shape), generator=generator) - offset
    return drawn.long().clamp_max(size - 1)


_VOCABULARY = 1000
"""Smaller tables are taken to hold positions, kinds or categories, and not words."""


def find_integers(model: nn.Module, inputs: ExampleInputs) -> tuple[tuple[Integers | None, ...], str]:
    """How the inputs of whole numbers vary, and what the user should know of it ("" for nothing).

    Numbers that are looked up in a table may be any of its rows. Others lie where the example's rows have them, or
    between zero and its values if it has a single row; flags and positions stay as they are. If the network refuses
    such numbers, all but those of tables stay as they are in the first row.

    Returns:
        None for floating-point tensors, and for those without a row for each input.
    """
    tensors = inputs.tensors()
    batch = tensors[0].shape[0] if tensors[0].dim() else 0
    whole = [_is_whole(tensor) and tensor.dim() > 0 and len(tensor) == batch > 0 for tensor in tensors]
    if not any(whole):
        return (None,) * len(tensors), ""
    lookups = _looked_up(model, inputs)
    varied = [
        _varying(tensor.cpu().long(), sizes) if own else None
        for tensor, own, sizes in zip(tensors, whole, lookups, strict=True)
    ]
    free = [
        own is not None and bool(((own.low < own.high) & (sizes == 0)).any())
        for own, sizes in zip(varied, lookups, strict=True)
    ]
    spans = [
        f"{int(own.low.min())} to {int(own.high.max())}"
        for own, is_free in zip(varied, free, strict=True)
        if own and is_free
    ]
    if all(own is None or own.table for own in varied):
        return tuple(varied), ""
    if outputs_if_taken(model, _drawn(inputs, varied)) is not None:
        return tuple(varied), f"probes have whole numbers from {', '.join(spans)}, as the example does" if spans else ""
    kept = tuple(
        None if own is None else _as_in(tensor[0].cpu().long(), own, sizes)
        for tensor, own, sizes in zip(tensors, varied, lookups, strict=True)
    )
    refused = "the network refuses other whole numbers than the example's, which are the same in all probes; what "
    return kept, f"{refused}depends on them can't be judged: pass lbyl.Data" if spans else ""


def _is_whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


def _varying(values: Int[Tensor, "rows *positions"], sizes: Int[Tensor, "*positions"]) -> Integers:
    """How a tensor varies, given the number of rows of the table in which each position is looked up, or 0."""
    if bool((sizes > 0).all()) and bool((sizes == sizes.flatten()[:1]).all()):
        return Integers(torch.zeros_like(sizes), sizes - 1, table=int(sizes.flatten()[0]))
    low, high, rows = values[0], values[0], None
    if int(values.min()) >= 0 and int(values.max()) <= 1:  # flags, such as a mask
        rows = values if len(values) > 1 and not bool((sizes > 0).any()) else None
    elif len(values) > 1:
        low, high = values.amin(0), values.amax(0)
    elif values.dim() < 2 or not bool((values.diff(dim=-1) == 1).all()):  # else the positions of a sequence
        low, high = values[0].clamp_max(0), values[0].clamp_min(0)
    return Integers(torch.where(sizes > 0, 0, low), torch.where(sizes > 0, sizes - 1, high), rows=rows)


def _as_in(row: Int[Tensor, "*positions"], varied: Integers, sizes: Int[Tensor, "*positions"]) -> Integers:
    """The same, but as in this row where nothing is looked up in a table."""
    low, high = (torch.where(sizes > 0, bound, row) for bound in (varied.low, varied.high))
    return replace(varied, low=low, high=high, rows=None)


def _drawn(inputs: ExampleInputs, integers: Sequence[Integers | None]) -> ExampleInputs:
    """The inputs with other whole numbers."""
    generator, each = torch.Generator().manual_seed(0), iter(integers)

    def drawn(tensor: Tensor) -> Tensor:
        own = next(each)
        return tensor if own is None else own.draw(len(tensor), generator).to(tensor)

    return inputs.map(drawn)


def _looked_up(model: nn.Module, inputs: ExampleInputs) -> list[Int[Tensor, "*positions"]]:
    """For each position of each tensor, the number of rows of the smallest table in which it is looked up, or 0.

    What holds for the first row of a batch holds for all.
    """
    own = inputs.cloned()
    with torch.no_grad(), _Lookups(own.tensors()) as lookups:
        own.call(model)
    pairs = zip(lookups.sizes, own.tensors(), strict=True)
    return [sizes.reshape(tensor.shape)[0] if tensor.dim() else sizes for sizes, tensor in pairs]


_COPIES = ("long", "int", "to", "clone", "contiguous", "reshape", "flatten", "type_as", "__getitem__", "squeeze")


class _Lookups(FunctionInterceptor):
    """Records in which tables the elements of some tensors are looked up, also where views or copies of them are."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.sizes = [torch.zeros(tensor.numel(), dtype=torch.int64) for tensor in tensors]
        self.where: dict[int, tuple[int, Tensor]] = {}
        self.held: list[Tensor] = []
        for number, tensor in enumerate(tensors):
            if tensor.dtype in (torch.int32, torch.int64):
                self._remember(tensor, number, torch.arange(tensor.numel()).reshape(tensor.shape))

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func in (functional.embedding, functional.embedding_bag):
            ids, table = leading_arguments(args, kwargs, "input", "weight")
            self._found(ids, len(table))
        elif name == "index_select" and len(args) == 3:
            self._found(args[2], args[0].shape[args[1]])
        elif name == "__getitem__" and isinstance(args[0], Tensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            for dim, item in enumerate(index[: args[0].dim()]):
                if isinstance(item, Tensor):
                    self._found(item, args[0].shape[dim])
                elif not isinstance(item, slice):
                    break
        if name in _COPIES and isinstance(out, Tensor) and args and isinstance(args[0], Tensor):
            self._copied(args[0], out)
        return out

    def _remember(self, tensor: Tensor, number: int, places: Tensor) -> None:
        """The elements of this tensor are those at these places of the input of this number."""
        storage = tensor.untyped_storage()
        where = torch.full((storage.nbytes() // tensor.element_size(),), -1)
        where.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(places)
        self.where[storage.data_ptr()] = number, where
        self.held.append(tensor)  # no other tensor gets its address

    def _places(self, ids: Tensor) -> tuple[int, Tensor] | None:
        """The number of the input that these are elements of, and their places in it."""
        found = self.where.get(ids.untyped_storage().data_ptr())
        if found is None or found[1].numel() * ids.element_size() != ids.untyped_storage().nbytes():
            return None
        return found[0], found[1].as_strided(ids.shape, ids.stride(), ids.storage_offset())

    def _copied(self, source: Tensor, out: Tensor) -> None:
        known = self._places(source)
        if known is None or self._places(out) is not None or source.numel() != out.numel() or not out.is_contiguous():
            return
        if out.dtype in (torch.int32, torch.int64):
            self._remember(out, known[0], known[1].reshape(out.shape))

    def _found(self, ids: Any, size: int) -> None:
        known = self._places(ids) if isinstance(ids, Tensor) else None
        if known is None:
            return
        sizes, places = self.sizes[known[0]], known[1].reshape(-1)
        before = sizes[places]
        sizes[places] = torch.where((before > 0) & (before < size), before, size)
