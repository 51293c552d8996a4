"""Optimal Brain Surgeon for channels: the error that remains after the other channels compensate for one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lbyl.runtime.checks import check_number, check_switch
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

    def __post_init__(self) -> None:
        check_number("OBS(ridge={})", self.ridge, least=0)
        check_switch("OBS(centered={})", self.centered)

    def score(self, view: ChannelView) -> Float[Tensor, " channels"]:
        """One score for each channel: its position in the order in which channels are removed."""
        readers = [_reader(reading, self.ridge, self.centered) for reading in view.readings]
        scores, places = torch.zeros(len(view), dtype=torch.float64), torch.arange(len(view))
        gone = torch.zeros(len(view), dtype=torch.bool)
        for first, last in _rounds(len(view)):
            lost = torch.zeros(len(places), dtype=torch.float64)
            for reader in readers:
                lost += reader.lost(gone)
            worst = torch.argsort(lost.masked_fill_(gone, float("inf")), stable=True)[: last - first]
            scores[places[worst]] = torch.arange(first, last, dtype=torch.float64)
            if last == len(view):
                break
            gone[worst] = True
            for reader in readers:
                reader.remove(worst)
            # Channels that are gone stay in the matrices for a while, because copying these takes longer than
            # computing with a few columns too many.
            if 4 * (len(view) - last) <= 3 * len(places):
                kept = (~gone).nonzero().flatten()
                readers, places, gone = [reader.only(kept) for reader in readers], places[kept], gone[kept]
        return scores


_ROUNDS = 128
"""Each round removes one of this many channels."""
_COLUMNS = 4096
"""Largest number of columns whose moments are inverted."""


def _rounds(channels: int) -> Iterator[tuple[int, int]]:
    """The numbers of the first channel that each round removes, and of the first that it leaves."""
    first = 0
    while first < channels:
        last = first + max(1, (channels - first) // _ROUNDS)
        yield first, last
        first = last


@dataclass(frozen=True)
class _Uncorrelated:
    """A consumer whose columns count as uncorrelated: too many, or constant on the probes.

    Attributes:
        errors: the errors from removing each of the channels.
    """

    errors: Float[Tensor, " channels"]

    def lost(self, gone: Bool[Tensor, " channels"]) -> Float[Tensor, " channels"]:
        """The error from removing each channel."""
        return self.errors

    def remove(self, channels: Int[Tensor, " removed"]) -> None:
        """Nothing changes: no other channel takes over."""

    def only(self, kept: Int[Tensor, " kept"]) -> _Uncorrelated:
        """The consumer of these channels."""
        return _Uncorrelated(self.errors[kept])


@dataclass(frozen=True)
class _Reader:
    """A consumer and the channels that it reads.

    Attributes:
        inverse: the inverse of the moments of their columns, changed in place.
        gram: ``U U^T``, the products of the consumer's weights for these columns; float64 on the CPU, as the inverse.
        seats: the number of columns of each channel; those of one channel are adjacent.
        total: the energy of all channels, to which errors are relative.
    """

    inverse: Float[Tensor, "columns columns"]
    gram: Float[Tensor, "columns columns"]
    seats: int
    total: Float[Tensor, ""]

    def lost(self, gone: Bool[Tensor, " channels"]) -> Float[Tensor, " channels"]:
        """The error from removing each channel; of no meaning for those that are gone."""
        if self.seats == 1:
            return self.gram.diagonal() / self.inverse.diagonal() / self.total
        blocks, products = (
            matrix.reshape(-1, self.seats, len(matrix) // self.seats, self.seats).diagonal(dim1=0, dim2=2).movedim(2, 0)
            for matrix in (self.inverse, self.gram)
        )
        left, errors = ~gone, torch.zeros(len(gone), dtype=torch.float64)
        errors[left] = (torch.linalg.inv(blocks[left]) * products[left]).sum((1, 2)) / self.total
        return errors

    def remove(self, channels: Int[Tensor, " removed"]) -> None:
        """Remove channels, for which the others take over.

        With the inverse ``[[A, B], [B^T, D]]``, in which the removed columns come last, it becomes ``A - B D^-1 B^T``,
        and the weights ``U`` become ``U_K - T U_D`` with ``T = B D^-1``. So ``U U^T`` becomes ``U_K U_K^T - T N^T -
        N T^T`` with ``N = (U_K - T U_D / 2) U_D^T``.
        """
        if self.seats == len(channels) == 1:  # most rounds, for which there is nothing to solve
            column = int(channels)
            cross, products = self.inverse[:, column].clone(), self.gram[:, column].clone()
            taken = cross / cross[column]
            half = products - taken * (products[column] / 2)
            self.inverse.addr_(taken, cross, alpha=-1)
            self.gram.addr_(taken, half, alpha=-1).addr_(half, taken, alpha=-1)
            return
        gone = self._columns(channels)
        cross, products = self.inverse[:, gone], self.gram[:, gone]
        taken = torch.linalg.solve(cross[gone], cross.T).T
        half = products - taken @ products[gone] / 2
        self.inverse.addmm_(taken, cross.T, alpha=-1)
        self.gram.addmm_(torch.cat([taken, half], 1), torch.cat([half, taken], 1).T, alpha=-1)

    def only(self, kept: Int[Tensor, " kept"]) -> _Reader:
        """The consumer of these channels."""
        columns = self._columns(kept)
        inverse, gram = (matrix[columns][:, columns] for matrix in (self.inverse, self.gram))
        return replace(self, inverse=inverse, gram=gram)

    def _columns(self, channels: Int[Tensor, " some"]) -> Int[Tensor, " columns"]:
        """The columns of some channels."""
        return (channels[:, None] * self.seats + torch.arange(self.seats)).flatten()


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
    return _Reader(inverse, gram, reading.index.shape[1], total)
