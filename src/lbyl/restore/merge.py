"""Neuron Merging: every dropped channel joins the one kept channel that is most like it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from lbyl.restore.closed_form import ClosedFormRestorer
from lbyl.runtime.checks import check_number
from lbyl.selection.filters import Filters
from lbyl.surgery.masking import Delivery, empty_delivery


@dataclass(frozen=True)
class Merge(ClosedFormRestorer):
    """One non-zero a column: the most similar kept channel takes the dropped one over, scaled.

    Kim, Kim, Kim, Kim, Kim: "Neuron Merging: Compensating for Pruned Neurons", NeurIPS 2020. We measure
    similarity between *effective* filters (batch norm folded in with the true deviation); a negative scale
    would not pass a ReLU, and so is never chosen.

    Attributes:
        threshold: cosine similarity below which a dropped channel is not merged at all; None merges all.
        blend: weight of the cosine distance; ``1 - blend`` goes to the distance of the offsets, each brought
            to [0, 1] over the candidates. Without a batch norm only the cosine counts.
    """

    threshold: float | None = 0.1
    blend: float = 0.85

    def __post_init__(self) -> None:
        check_number("Merge(threshold={})", self.threshold, optional=True)
        check_number("Merge(blend={})", self.blend, least=0, most=1)

    def deliver(
        self,
        filters: Filters,
        keep: Int[Tensor, " kept"],
        drop: Int[Tensor, " dropped"],
        generator: torch.Generator,
    ) -> Delivery:
        """The merging matrix: ``S[k, d] = |v_d| / |v_k|`` at the chosen k."""
        kept, dropped = filters.weight[keep], filters.weight[drop]
        tiny = torch.finfo(torch.float64).tiny
        norm_k, norm_d = kept.norm(dim=1).clamp_min(tiny), dropped.norm(dim=1)
        cosine = (kept / norm_k[:, None]) @ (dropped / norm_d.clamp_min(tiny)[:, None]).T
        scale = norm_d[None, :] / norm_k[:, None]
        distance = 1 - cosine
        if filters.normalized and self.blend < 1:
            gap = (filters.offset[drop][None, :] - scale * filters.offset[keep][:, None]).abs()
            low, high = gap.amin(0), gap.amax(0)
            gap = (gap - low) / (high - low).clamp_min(tiny)
            distance = self.blend * distance + (1 - self.blend) * gap
        chosen = distance.argmin(0)
        columns = torch.arange(len(drop))
        similar = cosine[chosen, columns] >= (self.threshold if self.threshold is not None else -torch.inf)
        delivery = empty_delivery(len(keep), len(drop))
        delivery.matrix[chosen[similar], columns[similar]] = scale[chosen, columns][similar]
        return delivery
