"""Channel ids and their union-find, vectorized over tensors of ids."""

from __future__ import annotations

import torch
from torch import Tensor

NOBODY = 0
"""The id of whatever is no channel: images, constants, padding. It is never merged with another id."""


class Ids:
    """A union-find over integer channel ids; the smallest member of a class stands for it."""

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.int64)
        self._issued = torch.zeros(1, dtype=torch.bool)  # of classes, by the ids that stand for them

    def __len__(self) -> int:
        return len(self._parent)

    def fresh(self, count: int, issued: bool = False) -> Tensor:
        """``count`` ids that were never used before; ``issued`` when some layer makes these channels."""
        new = torch.arange(len(self._parent), len(self._parent) + count)
        self._parent = torch.cat([self._parent, new])
        self._issued = torch.cat([self._issued, torch.full((count,), issued)])
        return new

    def issued(self, ids: Tensor) -> Tensor:
        """Which of these ids stand together with the output channels of some layer."""
        return self._issued[self.find(ids)]

    def find(self, ids: Tensor) -> Tensor:
        """The representative of each id; same shape, and constant along the same dimensions."""
        distinct = small(ids)
        roots = first = self._parent.take(distinct)
        while not torch.equal(above := self._parent.take(roots), roots):
            roots = above
        if roots is not first:
            self._parent[distinct] = roots  # the next one finds it at once
        return roots if distinct is ids else roots.expand(ids.shape)

    def union(self, a: Tensor, b: Tensor) -> None:
        """Merge ``a[i]`` with ``b[i]`` for every i; pairs that hold NOBODY are left out."""
        a, b = a.reshape(-1), b.reshape(-1)
        real = (a != NOBODY) & (b != NOBODY)
        a, b = a[real], b[real]
        ours = a[self.issued(a) | self.issued(b)]
        while a.numel():
            a, b = self.find(a), self.find(b)
            apart = a != b
            a, b = a[apart], b[apart]
            low, high = torch.minimum(a, b), torch.maximum(a, b)
            # Several pairs may name the same `high`; all but one go round the loop again.
            self._parent.scatter_reduce_(0, high, low, "amin")
        self._issued[self.find(ours)] = True


def compact(shadow: Tensor) -> Tensor:
    """The same values, with stride 0 along every dimension in which they do not change."""
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
    """A view with every stride-0 dimension narrowed to one index: all distinct values, few repeats."""
    for dim, stride in enumerate(shadow.stride()):
        if stride == 0 and shadow.shape[dim] > 1:
            shadow = shadow.narrow(dim, 0, 1)
    return shadow
