"""Reads the weights of experts, which files hold one by one, as the stacked tensors that models of transformers have.

Files of Mixtral, of Qwen-MoE, OLMoE, DeepSeek and others have a tensor for each expert, as older code had.
Transformers 5 stacks them when it loads a model. Here this is done for the tensors that are asked for, so that no model
is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lbyl.io.shards import FLOATING, Shards

_BLOCKS = (("", ""), (".mlp.", ".block_sparse_moe."))
"""What the block of a mixture is called by the model, and by files of Mixtral."""

_PIECES = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""The matrices of an expert, by the stacked tensor that holds them, as two kinds of files call them."""


@dataclass(frozen=True)
class StackedShards(Shards):
    """The weights of a folder, by the names that the model has for them.

    Attributes:
        parts: the tensors of the files that make up one of the model: for each expert, those that are stacked with each
            other; a single name for a tensor that is only called otherwise.
    """

    parts: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)

    @staticmethod
    def over(stored: Shards, shapes: Mapping[str, tuple[int, ...]]) -> Shards:
        """The same weights, where each tensor of the model that no file has may be made of others.

        Args:
            stored: the weights.
            shapes: the names and shapes of the model's tensors.
        """
        parts = {
            name: found
            for name, shape in shapes.items()
            if name not in stored.files and (found := _parts(name, shape, stored))
        }
        if not parts:
            return stored
        files = {**stored.files, **{name: stored.files[found[0][0]] for name, found in parts.items()}}
        return StackedShards(stored.folder, files, parts)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors, see :meth:`Shards.read`; those that are stacked are copies."""
        names = list(names)
        found = super().read(name for name in names if name not in self.parts)
        for name in names:
            if (parts := self.parts.get(name)) is None:
                continue
            pieces = super().read(piece for expert in parts for piece in expert)
            if len(parts) == len(parts[0]) == 1:
                found[name] = pieces[parts[0][0]]
            else:
                found[name] = torch.stack([torch.cat([pieces[piece] for piece in expert]) for expert in parts])
        return {name: found[name] for name in names}

    def headers(self, names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of some tensors, see :meth:`Shards.headers`; experts that differ have no shape."""
        names = list(names)
        found = super().headers(name for name in names if name not in self.parts)
        for name in names:
            if (parts := self.parts.get(name)) is None:
                continue
            told = super().headers(piece for expert in parts for piece in expert)
            own = [[told[piece] for piece in expert] for expert in parts]
            rows = {sum(shape[0] for shape, _ in expert if shape) for expert in own}
            columns = {shape[1:] for expert in own for shape, _ in expert}
            kinds = {kind for expert in own for _, kind in expert}
            single = len(parts) == len(parts[0]) == 1
            shape = (min(rows), *min(columns)) if len(rows) == len(columns) == 1 else ()
            found[name] = (
                (own[0][0][0] if single else (len(parts), *shape)),
                max(kinds, key=lambda k: k not in FLOATING),
            )
        return {name: found[name] for name in names}


def _parts(name: str, shape: tuple[int, ...], stored: Shards) -> tuple[tuple[str, ...], ...]:
    """The stored tensors that make up one of the model; none if they are not all there."""
    for ours, theirs in _BLOCKS:
        there = name.replace(ours, theirs) if ours else name
        if there != name and there in stored.files:
            return ((there,),)
        place, _, last = there.rpartition(".")
        if len(shape) != 3 or not place.endswith("experts"):
            continue
        for pieces in _PIECES.get(last, ()):
            found = tuple(tuple(f"{place}.{expert}.{piece}.weight" for piece in pieces) for expert in range(shape[0]))
            if all(piece in stored.files for expert in found for piece in expert):
                return found
    return ()
