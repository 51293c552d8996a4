"""Optimal Brain Surgeon for channels: the error that remains after the other channels compensate for one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lbyl.selection.view import ChannelView, Reading


@dataclass(frozen=True)
class OBS:
    """``U_j^T [(G^-1)_jj]^-1 U_j``: the error if the best linear combination of other channels replaces channel j.

    ``G`` are the second moments of a consumer's input, and ``U_j`` are the consumer's weights for channel j. Channels
    are removed a few at a time, and then the scores of all others are computed again, because only one of two similar
    channels can be removed. Sources: Hassibi and Stork 1993, "Optimal Brain Surgeon"; Kurtic et al. 2023, "ZipLM"
    (arXiv 2302.04089).

    Attributes:
        ridge: added to the diagonal of G, relative to its mean.
    """

    ridge: float = 0.01
    sees: ClassVar[str] = "products"

    def score(self, view: ChannelView) -> Float[Tensor, " channels"]:
        """One score for each channel: its position in the order in which channels are removed."""
        inverses = [(reading, _inverse(reading, self.ridge)) for reading in view.readings]
        left = torch.arange(len(view))
        scores = torch.zeros(len(view), dtype=torch.float64)
        gone = 0
        while len(left):
            lost = torch.zeros(len(left), dtype=torch.float64)
            for reading, inverse in inverses:
                lost += _lost(reading, inverse, left)
            worst = torch.argsort(lost, stable=True)[: max(1, len(left) // _ROUNDS)]
            scores[left[worst]] = torch.arange(gone, gone + len(worst), dtype=torch.float64)
            gone += len(worst)
            stays = torch.ones(len(left), dtype=torch.bool)
            stays[worst] = False
            inverses = [(r, _without(inverse, stays, r.index.shape[1])) for r, inverse in inverses]
            left = left[stays]
        return scores


_ROUNDS = 32
"""Each round removes one of this many channels."""


def _inverse(reading: Reading, ridge: float) -> Tensor:
    gram = reading.products
    strength = max(ridge * float(gram.diagonal().mean()), 1e-12 * float(gram.diagonal().max()), 1e-300)
    gram.diagonal().add_(strength)
    return torch.linalg.inv(gram)


def _lost(reading: Reading, inverse: Tensor, left: Tensor) -> Tensor:
    """The error from removing each of the remaining channels, relative to the energy of all channels."""
    seats = reading.index.shape[1]
    total = (reading.energy * reading.square).sum().clamp_min(1e-300)
    if seats == 1:
        return reading.energy[left, 0] / inverse.diagonal() / total
    blocks = inverse.reshape(len(left), seats, len(left), seats).diagonal(dim1=0, dim2=2).movedim(2, 0)
    columns = reading.columns[left]
    taken = columns @ columns.transpose(1, 2)
    return (torch.linalg.inv(blocks) * taken).sum((1, 2)) / total


def _without(inverse: Tensor, stays: Tensor, seats: int) -> Tensor:
    """The inverse of the moments after some channels are removed: ``A - B D^-1 B^T``."""
    kept = stays.repeat_interleave(seats)
    if not bool(kept.any()):
        return inverse[kept][:, kept]
    cross = inverse[kept][:, ~kept]
    return inverse[kept][:, kept] - cross @ torch.linalg.solve(inverse[~kept][:, ~kept], cross.T)
