"""Gaussian moments: means and variances from batch norms, and correlations from the filters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lbyl.graph.activations import ACTIVATIONS
from lbyl.moments.base import ChannelMoments
from lbyl.runtime.checks import check_number
from lbyl.selection.filters import Filters


def stated_means(filters: Filters, activation: str | None) -> Float[Tensor, " channels"] | None:
    """Each channel's mean after the activation f, from its batch norm: ``E f(z)`` with ``z ~ N(beta, gamma^2)``.

    None if there is no batch norm before the activation.
    """
    if not filters.normalized or filters.spread is None:
        return None
    # The expectation is the mean over quantiles of the Gaussian.
    quantiles = (torch.arange(_SLICES, dtype=torch.float64) + 0.5) / _SLICES
    normal = torch.special.ndtri(quantiles)
    z = filters.center[:, None] + filters.spread[:, None] * normal
    return (ACTIVATIONS[activation](z) if activation in ACTIVATIONS else z).mean(1)


_SLICES = 256


@dataclass(frozen=True)
class Gaussian:
    """Moments of jointly Gaussian pre-activations, without a forward pass.

    A batch norm's output has mean beta and deviation |gamma|. The correlation of two channels follows from their
    filters v, for an input whose pixels are correlated as in natural images: ``rho_ij = v_i R v_j``, normalized such
    that ``rho_ii = 1``, with ``R = decay ** (distance between positions in the kernel)``. The activation is applied to
    samples of that Gaussian.

    Attributes:
        decay: correlation of neighboring pixels.
        samples: number of samples from the Gaussian.
    """

    decay: float = 0.85
    samples: int = 8192

    def __post_init__(self) -> None:
        check_number("Gaussian(decay={})", self.decay, least=0, most=1)
        check_number("Gaussian(samples={})", self.samples, whole=True, least=2)

    def moments(self, filters: Filters, kernel: tuple[int, ...], activation: str | None) -> ChannelMoments:
        """Mean and covariance of the channels after the activation."""
        covariance = self._covariance(filters.weight, kernel)
        deviation = covariance.diagonal().clamp_min(1e-30).sqrt()
        if filters.normalized and filters.spread is not None:
            covariance = covariance / torch.outer(deviation, deviation) * torch.outer(filters.spread, filters.spread)
            mean = filters.center
        else:
            mean = filters.offset
        values, vectors = torch.linalg.eigh(covariance)
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(self.samples, len(values), generator=generator, dtype=torch.float64)
        z = (draws * values.clamp_min(0).sqrt()) @ vectors.T + mean
        a = ACTIVATIONS[activation](z) if activation in ACTIVATIONS else z
        average = a.mean(0)
        a = a - average
        return ChannelMoments(average, a.T @ a / len(a))

    def _covariance(self, weight: Float[Tensor, "channels fan_in"], kernel: tuple[int, ...]) -> Tensor:
        taps = int(torch.tensor(kernel).prod()) if kernel else 1
        if taps == 1 or weight.shape[1] % taps:
            return weight @ weight.T
        grid = torch.cartesian_prod(*(torch.arange(size) for size in kernel)).double().reshape(taps, -1)
        prior = self.decay ** torch.cdist(grid, grid)
        rows = weight.reshape(len(weight), -1, taps)
        return torch.einsum("aft,ts,bfs->ab", rows, prior, rows)
