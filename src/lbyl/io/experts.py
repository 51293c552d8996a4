"""Reads the weights of experts, which files hold one by one, as the stacked tensors that models of transformers have.

Files of Mixtral, of Qwen-MoE, OLMoE, DeepSeek and others have a tensor for each expert, as older code had.
Transformers 5 stacks them when it loads a model. Here this is done for the tensors that are asked for, so that no model
is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lbyl.io.shards import FLOATING, Shards

_BLOCK = ".mlp.", ".block_sparse_moe."
"""What the block of a mixture is called by the model, and by files of Mixtral."""

_PIECES = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""The matrices of an expert, by the stacked tensor that holds them, as two kinds of files call them."""

_T = TypeVar("_T")
_Experts = tuple[tuple[str, ...], ...]
_Header = tuple[tuple[int, ...], str]


@dataclass(frozen=True)
class StackedShards(Shards):
    """The weights of a folder, by the names that the model has for them.

    Attributes:
        parts: for tensors of the model that are stacked: the tensors of the files that make up each expert.
        renamed: for tensors that are only called otherwise: their names in the files.
    """

    parts: Mapping[str, _Experts] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def over(stored: Shards, shapes: Mapping[str, tuple[int, ...]]) -> Shards:
        """The same weights, where each tensor of the model that no file has may be made of others.

        Args:
            stored: the weights.
            shapes: the names and shapes of the model's tensors.
        """
        missing = {name: shape for name, shape in shapes.items() if name not in stored.files}
        renamed = {name: there for name in missing if (there := name.replace(*_BLOCK)) in stored.files}
        parts = {name: found for name, shape in missing.items() if (found := _parts(name, shape, stored))}
        firsts = {**renamed, **{name: found[0][0] for name, found in parts.items()}}
        if not firsts:
            return stored
        files = {**stored.files, **{name: stored.files[first] for name, first in firsts.items()}}
        return StackedShards(stored.folder, files, parts, renamed)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors, see :meth:`Shards.read`; those that are stacked are copies."""
        return self._combined(super().read, names, lambda experts: torch.stack([torch.cat(each) for each in experts]))

    def headers(self, names: Iterable[str]) -> dict[str, _Header]:
        """Shape and type of some tensors, see :meth:`Shards.headers`; experts that differ have no shape."""
        return self._combined(super().headers, names, _stacked_header)

    def _combined(
        self,
        get: Callable[[Iterable[str]], Mapping[str, _T]],
        names: Iterable[str],
        combine: Callable[[list[list[_T]]], _T],
    ) -> dict[str, _T]:
        """What the files hold for these names; for stacked tensors it is combined."""
        stored = {name: self.parts.get(name, ((self.renamed.get(name, name),),)) for name in names}
        found = get(piece for experts in stored.values() for pieces in experts for piece in pieces)
        return {
            name: combine([[found[piece] for piece in pieces] for pieces in experts])
            if name in self.parts
            else found[experts[0][0]]
            for name, experts in stored.items()
        }


def _stacked_header(experts: list[list[_Header]]) -> _Header:
    rows = {sum(shape[0] for shape, _ in pieces if shape) for pieces in experts}
    columns = {shape[1:] for pieces in experts for shape, _ in pieces}
    kinds = {kind for pieces in experts for _, kind in pieces}
    shape = (min(rows), *min(columns)) if len(rows) == len(columns) == 1 else ()
    return (len(experts), *shape), max(kinds, key=lambda kind: kind not in FLOATING)


def _parts(name: str, shape: tuple[int, ...], stored: Shards) -> _Experts:
    """The stored tensors that make up one of the model; none if they are not all there."""
    for there in (name, name.replace(*_BLOCK)):
        place, _, last = there.rpartition(".")
        if len(shape) != 3 or not place.endswith("experts"):
            continue
        for pieces in _PIECES.get(last, ()):
            found = tuple(tuple(f"{place}.{expert}.{piece}.weight" for piece in pieces) for expert in range(shape[0]))
            if all(piece in stored.files for expert in found for piece in expert):
                return found
    return ()
