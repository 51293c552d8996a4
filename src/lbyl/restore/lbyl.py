"""LBYL: every dropped channel delivers its information to all kept channels, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lbyl.moments.gaussian import stated_means
from lbyl.restore.closed_form import ClosedFormRestorer, activation_of
from lbyl.restore.ridge import solve_ridge
from lbyl.runtime.checks import check_number, check_switch
from lbyl.selection.filters import Filters
from lbyl.surgery.masking import Delivery


@dataclass(frozen=True)
class LBYL(ClosedFormRestorer):
    """The paper's closed form, from the weights alone.

    Lee, Kim, Choi: "Training-Free Restoration of Pruned Neural Networks", arXiv 2502.08474. For each dropped
    channel d, minimize ``|v_d - V_K s|^2 + bn (c_d - c_K . s)^2 + ridge |s|^2``: the residual error, the
    batch-norm error, and a bound on the activation error.

    With ``bn=None``, the default, the batch-norm error has no weight. Instead, the mean of the consumer's output is
    corrected (bias correction: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", arXiv 1906.04721). If a batch norm gives the distribution ``z ~ N(beta, gamma^2)`` of the channels
    before the activation f, the kept channels lack a mean of ``E f(z_d) - s . E f(z_K)`` for each dropped channel. This
    mean, times the share of kept channels, is added through the consumer's bias or the running mean after it.

    Attributes:
        bn: lambda_1, the weight of the batch-norm error as in the paper; None corrects means instead.
        ridge: lambda_2, the weight of ``|s|^2``; None chooses 0.03 times the mean of ``|v_k|^2``, which does not depend
            on the scale of the filters.
        center: whether to subtract the mean of each filter's own elements first. The paper's figures for fully
            connected networks use this.
    """

    bn: float | None = None
    ridge: float | None = None
    center: bool = False

    def __post_init__(self) -> None:
        check_number("LBYL(bn={})", self.bn, least=0, optional=True)
        check_number("LBYL(ridge={})", self.ridge, least=0, optional=True)
        check_switch("LBYL(center={})", self.center)

    def deliver(
        self,
        filters: Filters,
        keep: Int[Tensor, " kept"],
        drop: Int[Tensor, " dropped"],
        generator: torch.Generator,
    ) -> Delivery:
        """S from :func:`closed_form` and the mean corrections, with a note if the system was singular."""
        v = filters.weight - filters.weight.mean(1, keepdim=True) if self.center else filters.weight
        bn = self.bn if self.bn is not None and filters.normalized else 0.0
        ridge = self.ridge
        if ridge is None:
            ridge = _RIDGE * float(v[keep].square().sum(1).mean())
        matrix, singular = closed_form(v[keep].T, v[drop].T, filters.offset[keep], filters.offset[drop], bn, ridge)
        note = "singular system: solved by pseudo-inverse; a larger ridge avoids it" if singular else ""
        means = stated_means(filters, activation_of(filters.group)) if self.bn is None else None
        # The full correction is right for one cut layer. If all layers are cut, it is too large.
        share = len(keep) / (len(keep) + len(drop))
        shift = None if means is None else share * (means[drop] - matrix.T @ means[keep])
        return Delivery(matrix, torch.ones(len(keep), dtype=torch.float64), note, shift)


_RIDGE = 0.03


def closed_form(
    v_keep: Float[Tensor, "fan_in kept"],
    v_drop: Float[Tensor, "fan_in dropped"],
    c_keep: Float[Tensor, " kept"],
    c_drop: Float[Tensor, " dropped"],
    bn: float,
    ridge: float,
) -> tuple[Float[Tensor, "kept dropped"], bool]:
    """Solve ``(V_K^T V_K + bn c_K c_K^T + ridge I) S = V_K^T V_D + bn c_K c_D^T`` in float64.

    One Cholesky factor is used for all dropped channels. Returns S, and whether the matrix was singular, in which
    case S is the minimum-norm solution.
    """
    gram = v_keep.T @ v_keep + bn * torch.outer(c_keep, c_keep)
    cross = v_keep.T @ v_drop + bn * torch.outer(c_keep, c_drop)
    return solve_ridge(gram, cross, ridge)
