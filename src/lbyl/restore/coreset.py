"""Data-independent coresets: kept channels are drawn at random and reweighted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lbyl.restore.closed_form import ClosedFormRestorer
from lbyl.selection.filters import Filters
from lbyl.selection.select import ByCriterion, Choose
from lbyl.surgery.masking import Delivery, nothing_delivered

_MOST_DRAWS_PER_CHANNEL = 1000


@dataclass(frozen=True)
class Coreset(ClosedFormRestorer):
    """Importance sampling of channels: the weighted sum over the drawn channels is unbiased.

    Mussay, Osadchy, Braverman, Zhou, Feldman: "Data-Independent Neural Pruning via Coresets", ICLR 2020
    (arXiv 1907.04018). Channels are drawn with replacement, with probability ``pr_j ~ peak_j |v_j|`` (the largest
    outgoing weight times the bound of the activation on a unit ball), until there are as many distinct ones as may be
    kept. Each is weighted by ``u_j = draws_j / (draws pr_j)``. This draw is the selection, so no criterion is used.
    """

    chooses = True

    def choose(self, by: ByCriterion) -> Choose:
        """The function :meth:`draw`; the criterion is not used."""
        return self.draw

    def draw(self, filters: Filters, count: int, generator: torch.Generator) -> Int[Tensor, " kept"]:
        """The drawn channels, ascending."""
        return torch.nonzero(self._draw(filters, count, generator) > 0).flatten()

    def deliver(
        self,
        filters: Filters,
        keep: Int[Tensor, " kept"],
        drop: Int[Tensor, " dropped"],
        generator: torch.Generator,
    ) -> Delivery:
        """S = 0 and the weights u; the generator must be in the same state as for :meth:`draw`."""
        none = nothing_delivered(len(keep), len(drop))
        return Delivery(none.matrix, self._draw(filters, len(keep), generator)[keep])

    def _draw(self, filters: Filters, count: int, generator: torch.Generator) -> Float[Tensor, " channels"]:
        return sample(sensitivity(filters), count, generator)


def sensitivity(filters: Filters) -> Float[Tensor, " channels"]:
    """``peak_j |(v_j, c_j)|``: the largest influence that a channel can have on a consumer."""
    return filters.peak * torch.cat([filters.weight, filters.offset[:, None]], 1).norm(dim=1)


def sample(
    importance: Float[Tensor, " channels"], count: int, generator: torch.Generator
) -> Float[Tensor, " channels"]:
    """Draw until there are ``count`` distinct channels; return the weight of each channel, zero if not drawn."""
    channels = len(importance)
    # Channels that no layer reads get a tiny probability, so that `count` can always be reached.
    floor = importance.max().clamp_min(1e-30) * 1e-9
    probability = (importance + floor) / (importance + floor).sum()
    draws = torch.multinomial(probability, channels * _MOST_DRAWS_PER_CHANNEL, True, generator=generator)
    first = torch.full((channels,), len(draws)).scatter_reduce_(0, draws, torch.arange(len(draws)), "amin")
    order = torch.argsort(first, stable=True)
    taken = order[:count]
    # Stop before the first draw of a channel too many.
    stop = int(first[order[count]]) if count < channels else len(draws)
    counts = torch.bincount(draws[:stop], minlength=channels).double()
    weights = torch.zeros(channels, dtype=torch.float64)
    weights[taken] = (counts[taken] / (stop * probability[taken])).clamp_min(torch.finfo(torch.float64).tiny)
    return weights
