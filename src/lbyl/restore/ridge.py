"""Ridge regression on second moments, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lbyl.errors import RestorationError
from lbyl.moments.accumulate import Moments


def solve_ridge(
    gram: Float[Tensor, "kept kept"], cross: Float[Tensor, "kept targets"], ridge: float
) -> tuple[Float[Tensor, "kept targets"], bool]:
    """``(G + ridge I)^-1 C`` by Cholesky, and False; by pseudo-inverse, and True, if G + ridge I is singular."""
    solved = _by_cholesky(gram.clone(), cross, ridge)
    return (_by_pseudo_inverse(gram.clone(), cross, ridge), True) if solved is None else (solved, False)


def _by_cholesky(gram: Tensor, cross: Tensor, ridge: float) -> Tensor | None:
    """The solution, or None if ``G + ridge I`` is singular. The factor overwrites ``gram``, which may be large."""
    factor = gram.T  # nothing changes by this, but that factors are made column by column
    factor.diagonal().add_(ridge)
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    pivots = factor.diagonal()
    epsilon = torch.finfo(gram.dtype).eps * len(gram)
    if int(info) != 0 or float(pivots.min() / pivots.max().clamp_min(1e-300)) ** 2 <= epsilon:
        return None
    half = torch.linalg.solve_triangular(factor, cross, upper=False)  # cholesky_solve would copy the factor
    return torch.linalg.solve_triangular(factor.T, half, upper=True)


def _by_pseudo_inverse(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    gram.diagonal().add_(ridge)
    return torch.linalg.pinv(gram, hermitian=True) @ cross


@dataclass(frozen=True)
class Solution:
    """The fit ``r ~ coefficients^T p + shift``, and the variance of r before and after it."""

    coefficients: Float[Tensor, "regressors targets"]
    shift: Float[Tensor, " targets"]
    before: Float[Tensor, " targets"]
    after: Float[Tensor, " targets"]
    singular: bool


@dataclass(frozen=True)
class Prior:
    """Expected second moments: centered, and on any scale.

    ``trust`` between 0 and 1 is the weight of the prior in the mixture, after it was scaled to the measured moments.
    """

    pp: Float[Tensor, "regressors regressors"]
    pr: Float[Tensor, "regressors targets"]
    trust: float


def check_finite(gram: Float[Tensor, "regressors regressors"], layer: str) -> None:
    """Raise RestorationError if the second moments of what a layer reads are NaN or infinite."""
    if not bool(torch.isfinite(gram.diagonal()).all()):
        raise RestorationError(
            f"{layer!r} reads NaN, or numbers whose squares are infinite, when the network runs on the inputs that "
            "restoration needs; restore='lbyl' only needs the weights"
        )


def solve(moments: Moments, ridge: float, centered: bool, prior: Prior | None = None) -> Solution:
    """Minimize ``E |r - B^T p - shift|^2 + ridge mean(diag G) |B|^2`` with ``G`` the (centered) moments of p.

    The ridge is relative, so that it does not depend on the scale of the activations. It penalizes the *change* of the
    kept weights: an infinite ridge gives plain pruning. A prior is mixed into the moments for solving, but not into
    those for the reported errors.
    """
    n = max(moments.count, 1)
    mean_p, mean_r = moments.p / n, moments.r / n
    if not centered:
        mean_p, mean_r = torch.zeros_like(mean_p), torch.zeros_like(mean_r)
    # Fused operations, because these matrices are large.
    cross = torch.addr(moments.pr, mean_p, mean_r, beta=1 / n, alpha=-1)
    power = moments.rr / n - mean_r.square()

    def trusted() -> tuple[Tensor, Tensor]:
        """The moments to solve with, in memory of their own."""
        gram = torch.addr(moments.pp, mean_p, mean_p, beta=1 / n, alpha=-1)
        if prior is None or prior.trust <= 0:
            return gram, cross
        scale = gram.trace() / prior.pp.trace().clamp_min(1e-300)
        return torch.lerp(gram, prior.pp * scale, prior.trust), torch.lerp(cross, prior.pr * scale, prior.trust)

    gram, wanted = trusted()
    strength = ridge * float(gram.diagonal().mean())
    coefficients = _by_cholesky(gram, wanted, strength)
    singular = coefficients is None
    if coefficients is None:
        coefficients = _by_pseudo_inverse(*trusted(), strength)
    del gram
    # E (r - B^T p)^2 = E r^2 - 2 B.C + B.(G B), where G B is made without G
    product = torch.addmm(torch.outer(mean_p, mean_p @ coefficients), moments.pp, coefficients, beta=-1, alpha=1 / n)
    after = power - 2 * (coefficients * cross).sum(0) + (coefficients * product).sum(0)
    return Solution(coefficients, mean_r - coefficients.T @ mean_p, power, after.clamp_min(0), singular)
