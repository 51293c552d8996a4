"""The energy of a channel in its consumers' outputs: squared norm of the weights times mean square of the channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lbyl.selection.view import ChannelView


@dataclass(frozen=True)
class Energy:
    """``sum over consumers of |U_j|^2 E[x_j^2]``, each term divided by its sum over all channels of the consumer.

    ``U_j`` are a consumer's weights for channel j, and ``x_j`` is its input. If a channel occupies several columns (a
    head, or a flattened feature map), these are summed. Sources: Sun et al. 2024, "Wanda" (arXiv 2306.11695); An et al.
    2024, "FLAP" (arXiv 2312.11983), which uses the variance in place of the mean square.
    """

    sees: ClassVar[str] = "squares"

    def score(self, view: ChannelView) -> Float[Tensor, " channels"]:
        """One score for each channel; channels with the lowest scores are dropped first."""
        total = torch.zeros(len(view), dtype=torch.float64)
        for reading in view.readings:
            taken = (reading.energy * reading.square).sum(1)
            total += taken / taken.sum().clamp_min(1e-300)
        return total
