"""Optimal Brain Surgeon for channels: the error that remains after the other channels compensate for one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lbyl.selection.view import ChannelView, Reading


@dataclass(frozen=True)
class OBS:
    """``tr([(G^-1)_jj]^-1 U_j U_j^T)``: the error if the best linear combination of other channels replaces channel j.

    ``G`` are the second moments of a consumer's input, and ``U_j`` are the consumer's weights for channel j. Channels
    are removed a few at a time. Then what they did is added to the weights of those that are left, ``U_K`` becomes
    ``U_K + G_KK^-1 G_KD U_D``, and all others are scored again by these: only one of two similar channels can go, and
    whoever has taken over for others is needed more. Sources: Hassibi and Stork 1993, "Optimal Brain Surgeon"; Kurtic
    et al. 2023, "ZipLM" (arXiv 2302.04089).

    Channels with more than 4,096 columns at a consumer (flattened features, for instance) count as uncorrelated there,
    because the inverse would take minutes. Their score is then their energy.

    Attributes:
        ridge: added to the diagonal of G, relative to its mean; by default as in :class:`lbyl.LeastSquares`.
        centered: take the covariance for G, where biases or norms behind the consumers make up for means.
    """

    ridge: float = 0.3
    centered: bool = False
    sees: ClassVar[str] = "products"

    def score(self, view: ChannelView) -> Float[Tensor, " channels"]:
        """One score for each channel: its position in the order in which channels are removed."""
        left, gone = torch.arange(len(view)), 0
        scores = torch.zeros(len(view), dtype=torch.float64)
        readers = [_reader(reading, self.ridge, self.centered) for reading in view.readings]
        while len(left):
            lost = torch.zeros(len(left), dtype=torch.float64)
            for reader in readers:
                lost += reader.lost()
            worst = torch.argsort(lost, stable=True)[: max(1, len(left) // _ROUNDS)]
            scores[left[worst]] = torch.arange(gone, gone + len(worst), dtype=torch.float64)
            gone += len(worst)
            stays = torch.ones(len(left), dtype=torch.bool)
            stays[worst] = False
            readers = [reader.without(stays) for reader in readers]
            left = left[stays]
        return scores


_ROUNDS = 128
"""Each round removes one of this many channels."""
_COLUMNS = 4096
"""Largest number of columns whose moments are inverted."""


@dataclass(frozen=True)
class _Uncorrelated:
    """A consumer whose columns count as uncorrelated: too many, or constant on the probes.

    Attributes:
        errors: the errors from removing each of the channels that are left.
    """

    errors: Float[Tensor, " channels"]

    def lost(self) -> Float[Tensor, " channels"]:
        """The error from removing each of the channels that are left."""
        return self.errors

    def without(self, stays: Bool[Tensor, " channels"]) -> _Uncorrelated:
        """The consumer after some channels are removed."""
        return _Uncorrelated(self.errors[stays])


@dataclass(frozen=True)
class _Reader:
    """A consumer and the channels that are left.

    Attributes:
        inverse: the inverse of the moments of their columns, changed in place.
        gram: ``U U^T``, the products of the consumer's weights for these columns; float64 on the CPU, as the inverse.
        seats: the number of columns of each channel; those of one channel are adjacent.
        total: the energy of all channels, to which errors are relative.
        left: which of these channels are left. Those that are not stay in the matrices for a while, because copying
            these takes longer than computing with a few columns too many.
    """

    inverse: Float[Tensor, "columns columns"]
    gram: Float[Tensor, "columns columns"]
    seats: int
    total: Float[Tensor, ""]
    left: Bool[Tensor, " channels"]

    def lost(self) -> Float[Tensor, " channels_left"]:
        """The error from removing each of the channels that are left."""
        if self.seats == 1:
            return (self.gram.diagonal() / self.inverse.diagonal())[self.left] / self.total
        blocks, products = (
            matrix.reshape(-1, self.seats, len(matrix) // self.seats, self.seats).diagonal(dim1=0, dim2=2).movedim(2, 0)
            for matrix in (self.inverse, self.gram)
        )
        return (torch.linalg.inv(blocks[self.left]) * products[self.left]).sum((1, 2)) / self.total

    def without(self, stays: Bool[Tensor, " channels_left"]) -> _Reader:
        """The consumer after some channels are removed, and the others have taken over.

        With the inverse ``[[A, B], [B^T, D]]``, in which the removed columns come last, it becomes ``A - B D^-1 B^T``,
        and the weights ``U`` become ``U_K - T U_D`` with ``T = B D^-1``. So ``U U^T`` becomes ``U_K U_K^T - T N^T -
        N T^T`` with ``N = (U_K - T U_D / 2) U_D^T``.
        """
        removed = self.left.clone()
        removed[self.left] = ~stays
        left = self.left & ~removed
        if not bool(left.any()):
            return self
        gone = removed.repeat_interleave(self.seats).nonzero().flatten()
        cross, products = self.inverse[:, gone], self.gram[:, gone]
        taken = torch.linalg.solve(cross[gone], cross.T).T
        half = products - taken @ products[gone] / 2
        self.inverse.addmm_(taken, cross.T, alpha=-1)
        self.gram.addmm_(torch.cat([taken, half], 1), torch.cat([half, taken], 1).T, alpha=-1)
        if 4 * int(left.sum()) > 3 * len(left):
            return replace(self, left=left)
        kept = left.repeat_interleave(self.seats).nonzero().flatten()
        inverse, gram = (matrix[kept][:, kept] for matrix in (self.inverse, self.gram))
        return replace(self, inverse=inverse, gram=gram, left=left[left])


def _reader(reading: Reading, ridge: float, centered: bool) -> _Reader | _Uncorrelated:
    variance = reading.square - reading.mean.square() if centered else reading.square
    taken = (reading.energy * variance.clamp_min(0)).sum(1)
    uncorrelated = _Uncorrelated(taken / taken.sum().clamp_min(1e-300))
    if reading.index.numel() > _COLUMNS or not reading.has_products:
        return uncorrelated
    moments, weights = reading.products, reading.columns.flatten(0, 1)
    if centered:
        mean = reading.mean.flatten()
        moments -= torch.outer(mean, mean)
    gram = weights @ weights.T
    diagonal = moments.diagonal().clamp_min(0)
    total = (gram.diagonal() * diagonal).sum().clamp_min(1e-300)
    moments.diagonal().add_(max(ridge * float(diagonal.mean()), 1e-12 * float(diagonal.max()), 1e-300))
    factor, failed = torch.linalg.cholesky_ex(moments)
    if int(failed) or float(diagonal.max()) < 1e-12 * float(reading.square.max()):
        return uncorrelated  # nothing varies
    inverse = torch.cholesky_inverse(factor)
    everything = torch.ones(len(reading.index), dtype=torch.bool)
    return _Reader(inverse, gram, reading.index.shape[1], total, everything)
