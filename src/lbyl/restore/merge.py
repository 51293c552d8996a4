"""Neuron Merging: every dropped channel is merged into the most similar kept channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lbyl.restore.closed_form import ClosedFormRestorer
from lbyl.runtime.checks import check_number, check_switch
from lbyl.selection.filters import Filters
from lbyl.surgery.masking import Delivery, empty_delivery


@dataclass(frozen=True)
class Merge(ClosedFormRestorer):
    """The most similar kept channel, scaled, replaces each dropped one: S has one non-zero in each column.

    Kim, Kim, Kim, Kim, Kim: "Neuron Merging: Compensating for Pruned Neurons", NeurIPS 2020 (arXiv 2010.13160).
    Similarity is measured between *effective* filters (with the batch norm folded in). Scales are positive, because a
    negative scale does not commute with a ReLU.

    Attributes:
        threshold: cosine similarity below which a dropped channel is not merged; None merges all.
        blend: weight of the cosine distance. ``1 - blend`` is the weight of the distance of the offsets, scaled to
            [0, 1] over the kept channels. Without a batch norm, only the cosine distance is used.
        released: compute as in the authors' released code where one batch norm follows a layer: with the cosine of the
            raw filters, the running variance in place of the deviation, and the scale
            ``|w_d| / |w_k| gamma_k / gamma_d var_d / var_k``, which does not make the channels equal in size.
    """

    threshold: float | None = 0.1
    blend: float = 0.85
    released: bool = False

    def __post_init__(self) -> None:
        check_switch("Merge(released={})", self.released)
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
        released = _released(filters, keep, drop) if self.released else None
        cosine, scale, gap = released or _alike(filters, keep, drop)
        distance = 1 - cosine
        if filters.normalized and self.blend < 1:
            low, high = gap.amin(0), gap.amax(0)
            gap = (gap - low) / (high - low).clamp_min(_TINY)
            distance = self.blend * distance + (1 - self.blend) * gap
        chosen = distance.argmin(0)
        columns = torch.arange(len(drop))
        similar = cosine[chosen, columns] >= (self.threshold if self.threshold is not None else -torch.inf)
        delivery = empty_delivery(len(keep), len(drop))
        delivery.matrix[chosen[similar], columns[similar]] = scale[chosen, columns][similar]
        return delivery


_TINY = torch.finfo(torch.float64).tiny

_Pairs = tuple[Float[Tensor, "kept dropped"], Float[Tensor, "kept dropped"], Float[Tensor, "kept dropped"]]
"""For each pair of a kept and a dropped channel: cosine similarity, factor, and distance of the offsets."""


def _alike(filters: Filters, keep: Tensor, drop: Tensor) -> _Pairs:
    """The quantities of the effective filters, with the scale that makes the kept channel as large as the dropped."""
    cosine, scale = _compared(filters.weight[keep], filters.weight[drop])
    return cosine, scale, (filters.offset[drop][None, :] - scale * filters.offset[keep][:, None]).abs()


def _released(filters: Filters, keep: Tensor, drop: Tensor) -> _Pairs | None:
    """The quantities in the released code; None unless a single batch norm follows a single layer."""
    norm = filters.batch_norm
    if norm is None:
        return None
    cosine, ratio = _compared(filters.raw[keep], filters.raw[drop])
    gamma_k, beta_k, mean_k, var_k = (part[keep][:, None] for part in norm)
    gamma_d, beta_d, mean_d, var_d = (part[drop][None, :] for part in norm)
    scale = ratio * (gamma_k / gamma_d) * (var_d / var_k)
    gap = gamma_k / var_k * (ratio * (mean_d - var_d * beta_d / gamma_d) - mean_k) + beta_k
    # A factor of zero in a batch norm leaves nothing to compare: such pairs count as opposite, and as far as any other.
    sound = scale.isfinite() & (scale != 0)
    gap = torch.where(sound, gap.abs() / torch.where(sound, scale, 1), -torch.inf)
    gap = torch.where(sound, gap, gap.amax(0, keepdim=True).clamp_min(0))
    return torch.where(sound, cosine, -1.0), torch.where(sound, scale, 0.0), gap


def _compared(kept: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of all pairs of rows, and the ratios ``|dropped| / |kept|`` of their norms."""
    norm_k, norm_d = kept.norm(dim=1).clamp_min(_TINY), dropped.norm(dim=1)
    cosine = (kept / norm_k[:, None]) @ (dropped / norm_d.clamp_min(_TINY)[:, None]).T
    return cosine, norm_d[None, :] / norm_k[:, None]
