"""The energy that consumers take from a channel: their columns' norm times the channel's root mean square."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lbyl.selection.view import ChannelView


@dataclass(frozen=True)
class Energy:
    """``sum_consumers |U_j|^2 E[x_j^2]``, as a share of all that a consumer takes (Sun et al. 2024, "Wanda"; An et
    al. 2024, "FLAP", which has the variance in place of the mean square).

    ``U_j`` are the weights with which a consumer takes channel j, and ``x_j`` is what it is fed. The channels of a head
    or of a map that was flattened are summed.
    """

    sees: ClassVar[str] = "squares"

    def score(self, view: ChannelView) -> Float[Tensor, " channels"]:
        """One score a channel; the lowest go first."""
        total = torch.zeros(len(view), dtype=torch.float64)
        for reading in view.readings:
            taken = (reading.energy * reading.square).sum(1)
            total += taken / taken.sum().clamp_min(1e-300)
        return total
