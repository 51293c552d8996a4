"""Channel ids and a union-find over them, vectorized over tensors of ids."""

from __future__ import annotations

import torch
from torch import Tensor

NOBODY = 0
"""The id of elements that belong to no channel: images, constants, padding. It is never merged with another id."""

_SEVERAL = 2**62
"""Marks a class of merged channels that several layers make."""


class Ids:
    """A union-find over integer channel ids; the smallest id of a class of merged ids is its representative."""

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.int64)
        # The layer that makes a class, by representative: a layer number, 0 for none, or _SEVERAL.
        self._maker = torch.zeros(1, dtype=torch.int64)
        self._makers = 0

    def __len__(self) -> int:
        return len(self._parent)

    def fresh(self, count: int, issued: bool = False) -> Tensor:
        """``count`` new ids; ``issued`` says that a layer makes these channels."""
        new = torch.arange(len(self._parent), len(self._parent) + count)
        self._parent = torch.cat([self._parent, new])
        self._makers += issued
        self._maker = torch.cat([self._maker, torch.full((count,), self._makers if issued else 0)])
        return new

    def issued(self, ids: Tensor) -> Tensor:
        """Which of these ids are, or were merged with, output channels of a layer."""
        return self._maker[self.find(ids)] != 0

    def different_makers(self, a: Tensor, b: Tensor) -> Tensor:
        """Which pairs of ids are channels that two different layers make."""
        a, b = self.find(a), self.find(b)
        one, other = self._maker[a], self._maker[b]
        return (a != b) & (one != 0) & (other != 0) & ((one != other) | (one == _SEVERAL))

    def ascribe(self, ids: Tensor, others: Tensor) -> None:
        """Say that a layer's channels have the same maker as those of another one, both of which make a sum."""
        self._maker[self.find(ids)] = self._maker[self.find(others)]

    def find(self, ids: Tensor) -> Tensor:
        """The representative of each id; same shape, and constant along the same dimensions."""
        distinct = small(ids)
        roots = first = self._parent.take(distinct)
        while not torch.equal(above := self._parent.take(roots), roots):
            roots = above
        if roots is not first:
            self._parent[distinct] = roots  # path compression
        return roots if distinct is ids else roots.expand(ids.shape)

    def union(self, a: Tensor, b: Tensor) -> None:
        """Merge ``a[i]`` with ``b[i]`` for every i; pairs that contain ``NOBODY`` are skipped."""
        a, b = a.reshape(-1), b.reshape(-1)
        real = (a != NOBODY) & (b != NOBODY)
        a, b = a[real], b[real]
        a, b = self.find(a), self.find(b)
        apart = a != b
        merged = torch.cat([a[apart], b[apart]])
        if not merged.numel():
            return
        while a.numel():
            apart = a != b
            a, b = a[apart], b[apart]
            low, high = torch.minimum(a, b), torch.maximum(a, b)
            # Several pairs may share `high`; all but one of them are merged in the next round.
            self._parent.scatter_reduce_(0, high, low, "amin")
            a, b = self.find(a), self.find(b)
        makers = self._maker[merged]
        merged, makers = merged[makers != 0], makers[makers != 0]
        roots, places = torch.unique(self.find(merged), return_inverse=True)
        ends = torch.zeros(2, len(roots), dtype=torch.int64)
        least = ends[0].scatter_reduce_(0, places, makers, "amin", include_self=False)
        most = ends[1].scatter_reduce_(0, places, makers, "amax", include_self=False)
        self._maker[roots] = torch.where(least == most, least, _SEVERAL)


def compact(shadow: Tensor) -> Tensor:
    """The same values, with stride 0 along every dimension along which they do not change."""
    whole, shadow = shadow, small(shadow)
    for dim, size in enumerate(shadow.shape):
        if size > 1:
            first = shadow.narrow(dim, 0, 1)
            if bool((shadow == first).all()):
                shadow = first
    return whole if shadow is whole else shadow.expand(whole.shape)


def varies(shadow: Tensor, dim: int) -> bool:
    """Whether a compact shadow changes along ``dim``."""
    return shadow.shape[dim] > 1 and shadow.stride(dim) != 0


def small(shadow: Tensor) -> Tensor:
    """A view in which every stride-0 dimension has size 1. It holds every distinct value, with few repeats."""
    for dim, stride in enumerate(shadow.stride()):
        if stride == 0 and shadow.shape[dim] > 1:
            shadow = shadow.narrow(dim, 0, 1)
    return shadow
