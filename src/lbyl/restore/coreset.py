"""Data-independent coresets: kept channels are drawn at random and reweighted, none is mixed."""

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
    """Importance sampling of channels, so that the weighted sum over the drawn ones is unbiased.

    Mussay, Osadchy, Braverman, Zhou, Feldman: "Data-Independent Neural Pruning via Coresets", ICLR 2020. A
    channel is drawn with probability ``pr_j ~ peak_j |v_j|`` (largest outgoing weight times the bound of its
    activation on a unit ball), with replacement, until as many distinct ones are drawn as may be kept; each
    counts ``u_j = draws_j / (draws pr_j)``. The drawing *is* the selection, so ``criterion`` is not asked.
    """

    chooses = True

    def choose(self, by: ByCriterion) -> Choose:
        """By drawing; the criterion is not asked."""
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
        """S = 0 and the weights u; the generator must be in the state that ``draw`` saw."""
        none = nothing_delivered(len(keep), len(drop))
        return Delivery(none.matrix, self._draw(filters, len(keep), generator)[keep])

    def _draw(self, filters: Filters, count: int, generator: torch.Generator) -> Float[Tensor, " channels"]:
        return sample(sensitivity(filters), count, generator)


def sensitivity(filters: Filters) -> Float[Tensor, " channels"]:
    """``peak_j |(v_j, c_j)|``: how much a channel can matter to any consumer."""
    return filters.peak * torch.cat([filters.weight, filters.offset[:, None]], 1).norm(dim=1)


def sample(
    importance: Float[Tensor, " channels"], count: int, generator: torch.Generator
) -> Float[Tensor, " channels"]:
    """Draw until ``count`` distinct channels are found; the weight of each, zero for those not drawn."""
    channels = len(importance)
    # A channel that nobody reads must still be drawable, or `count` could be out of reach.
    floor = importance.max().clamp_min(1e-30) * 1e-9
    probability = (importance + floor) / (importance + floor).sum()
    draws = torch.multinomial(probability, channels * _MOST_DRAWS_PER_CHANNEL, True, generator=generator)
    first = torch.full((channels,), len(draws)).scatter_reduce_(0, draws, torch.arange(len(draws)), "amin")
    order = torch.argsort(first, stable=True)
    taken = order[:count]
    # Stop right before the first draw that would be one channel too many.
    stop = int(first[order[count]]) if count < channels else len(draws)
    counts = torch.bincount(draws[:stop], minlength=channels).double()
    weights = torch.zeros(channels, dtype=torch.float64)
    weights[taken] = (counts[taken] / (stop * probability[taken])).clamp_min(torch.finfo(torch.float64).tiny)
    return weights
