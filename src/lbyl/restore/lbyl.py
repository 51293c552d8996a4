"""LBYL: every dropped channel leaves its information with all the kept ones, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lbyl.restore.closed_form import ClosedFormRestorer
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

    Attributes:
        bn: lambda_1, weight of the batch-norm error.
        ridge: lambda_2, weight of the norm of s.
        center: subtract each filter's own mean over its coordinates first. The published figures for fully
            connected networks come from this.
    """

    bn: float = 1e-4
    ridge: float = 1e-2
    center: bool = False

    def __post_init__(self) -> None:
        check_number("LBYL(bn={})", self.bn, least=0)
        check_number("LBYL(ridge={})", self.ridge, least=0)
        check_switch("LBYL(center={})", self.center)

    def deliver(
        self,
        filters: Filters,
        keep: Int[Tensor, " kept"],
        drop: Int[Tensor, " dropped"],
        generator: torch.Generator,
    ) -> Delivery:
        """S of :func:`closed_form`; with a note where the system was singular."""
        v = filters.weight - filters.weight.mean(1, keepdim=True) if self.center else filters.weight
        bn = self.bn if filters.normalized else 0.0
        matrix, singular = closed_form(v[keep].T, v[drop].T, filters.offset[keep], filters.offset[drop], bn, self.ridge)
        note = "singular system: solved by pseudo-inverse; a larger ridge avoids it" if singular else ""
        return Delivery(matrix, torch.ones(len(keep), dtype=torch.float64), note)


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
