"""LBYL: every dropped channel leaves its information with all the kept ones, in closed form."""

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

    Where a batch norm states what a channel is like, ``bn=None`` does better than to weigh its error. Of the mean that
    the kept channels do not carry, ``E f(z_d) - s . E f(z_K)`` with ``z ~ N(beta, gamma^2)``, as large a share as that
    of the channels that stay goes into the consumer's bias or into the running mean behind it (bias correction: Nagel
    et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction").

    Attributes:
        bn: lambda_1, weight of the batch-norm error, as the paper has it; None for constants in its place.
        ridge: lambda_2, weight of the norm of s; None for 0.03 times the mean of ``|v_k|^2``, which is the same
            whatever the scale of the filters.
        center: subtract each filter's own mean over its coordinates first. The published figures for fully
            connected networks come from this.
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
        """S of :func:`closed_form`, and the constants; with a note where the system was singular."""
        v = filters.weight - filters.weight.mean(1, keepdim=True) if self.center else filters.weight
        bn = self.bn if self.bn is not None and filters.normalized else 0.0
        ridge = self.ridge
        if ridge is None:
            ridge = _RIDGE * float(v[keep].square().sum(1).mean())
        matrix, singular = closed_form(v[keep].T, v[drop].T, filters.offset[keep], filters.offset[drop], bn, ridge)
        note = "singular system: solved by pseudo-inverse; a larger ridge avoids it" if singular else ""
        means = stated_means(filters, activation_of(filters.group)) if self.bn is None else None
        # All of the mean is right for one layer whose input is intact, and too much the more of all layers is gone.
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

    One Cholesky factor serves all dropped channels. Returns S, and whether the matrix was singular, in which
    case S is the minimum-norm solution.
    """
    gram = v_keep.T @ v_keep + bn * torch.outer(c_keep, c_keep)
    cross = v_keep.T @ v_drop + bn * torch.outer(c_keep, c_drop)
    return solve_ridge(gram, cross, ridge)
