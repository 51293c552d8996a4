"""Products of each channel of a layer with each channel of the same layer: bilinear pooling, Gram matrices.

An entry (i, j) of such a matrix goes when channel i or channel j goes. So it gets an id of its own, a *pair*, which no
layer makes. What reads pairs has two slots along the same dimension, one with the first channel of each pair and one
with the second; a cut keeps what stays in both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lbyl.graph.union_find import NOBODY, Ids, compact, small, varies

_MOST = 2**20
"""Largest number of entries of a matrix that gets ids of its own."""

_MOVES = (
    "view", "reshape", "_unsafe_view", "flatten", "view_as", "reshape_as", "permute", "transpose", "t", "unsqueeze",
    "squeeze", "mT", "swapaxes", "swapdims", "alias", "clone", "contiguous", "detach", "dropout", "to", "_to_copy",
    "type_as",
)  # fmt: skip
_ALONE = (
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh", "clamp", "clamp_min", "abs",
    "neg", "exp", "log", "log1p", "sqrt", "square", "sign", "sgn", "add", "sub", "mul", "div", "pow", "where", "eq",
    "ne", "gt", "lt", "ge", "le", "maximum", "minimum", "copysign", "masked_fill", "expand_as",
)  # fmt: skip
_SUMS = ("sum", "norm", "linalg_vector_norm")
"""Reductions to which products of channels that are zero add nothing."""


@dataclass
class Pairs:
    """The ids of pairs: ``first`` and ``second`` hold a channel for each id from ``starts`` on, matrix by matrix."""

    ids: Ids
    starts: list[int] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)

    def make(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        """A pair for each element of two shadows that broadcast to one shape; None if these are too many."""
        rows, columns = torch.broadcast_tensors(rows, columns)
        if rows.numel() > _MOST:
            return None
        found = self.ids.fresh(rows.numel())
        self.starts.append(int(found[0]))
        self.first.append(rows.reshape(-1).clone())
        self.second.append(columns.reshape(-1).clone())
        return found.reshape(rows.shape)

    def those(self, ids: Tensor) -> Tensor:
        """Which of these ids are pairs."""
        return self.split(ids)[1] != NOBODY

    def among(self, shadow: Tensor) -> bool:
        """Whether a shadow has pairs."""
        return bool(self.starts) and bool(self.those(small(shadow)).any())

    def split(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second channel of each pair. Other ids are first ones, without a second."""
        roots = self.ids.find(ids)
        first, second = roots.clone(), torch.full_like(roots, NOBODY)
        for start, rows, columns in zip(self.starts, self.first, self.second, strict=True):
            ours = (roots >= start) & (roots < start + len(rows))
            first[ours], second[ours] = rows[roots[ours] - start], columns[roots[ours] - start]
        return first, second

    def channels(self, ids: Tensor) -> Tensor:
        """The ids, with both channels in place of each pair."""
        if not self.starts:
            return ids
        first, second = self.split(small(ids).reshape(-1))
        return torch.cat([first, second[second != NOBODY]])

    def stay(self, name: str, shadows: Iterable[Tensor]) -> bool:
        """Whether an operation leaves each pair by itself, so that its rule may treat pairs like channels."""
        several = [compact(self.ids.find(shadow)) for shadow in shadows]
        having = [shadow for shadow in several if self.among(shadow)]
        moving = {d for shadow in having for d in range(shadow.dim()) if varies(shadow, d)}
        if any(not torch.equal(small(shadow), small(having[0])) for shadow in having):
            return False
        if name in (*_MOVES, *_ALONE):
            return all(self.among(shadow) or bool((small(shadow) == NOBODY).all()) for shadow in several)
        if name in (*_SUMS, "linear"):
            return moving == {having[0].dim() - 1}
        return name == "batch_norm" and moving == {1}

    def merge(self, shadows: Iterable[Tensor]) -> Tensor:
        """Merge all channels of the pairs in these shadows, and the pairs with them; returns these channels."""
        ids = torch.cat([small(shadow).reshape(-1) for shadow in shadows])
        ids = ids[self.those(ids)]
        channels = self.channels(ids)
        self.ids.union(channels[:1].expand(channels.shape), channels)
        self.ids.union(channels[:1].expand(ids.shape), ids)
        return channels
