"""The three terms of the paper's reconstruction error: residual, batch-norm and activation error (RE, BE, AE)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from lbyl.graph.activations import ACTIVATIONS
from lbyl.selection.filters import Filters
from lbyl.surgery.masking import Delivery

_SAMPLES = 256


@dataclass(frozen=True)
class Terms:
    """Means over the dropped channels, in squared units of the channels' activations.

    Attributes:
        residual: RE, ``|v_d - V_K s|^2``.
        batch_norm: BE, ``(c_d - c_K . s)^2``; zero without a batch norm.
        activation: AE, ``E (f(s . z_K) - s . f(z_K))^2`` with the activation f, estimated on random samples of
            pre-activations z for white-noise inputs.
    """

    residual: float
    batch_norm: float
    activation: float


def reconstruction_terms(
    filters: Filters,
    keep: Int[Tensor, " kept"],
    drop: Int[Tensor, " dropped"],
    delivery: Delivery,
    activation: str | None,
    generator: torch.Generator,
) -> Terms:
    """RE, BE and AE of a delivery matrix (arXiv 2502.08474, section 3.2)."""
    s = delivery.matrix
    if not delivery.delivers:
        return Terms(float(filters.energy[drop].mean()), float(filters.offset[drop].square().mean()), 0.0)
    residual = filters.weight[drop] - s.T @ filters.weight[keep]
    offset = filters.offset[drop] - s.T @ filters.offset[keep]
    f = ACTIVATIONS.get(activation or "")
    lost = 0.0
    if f is not None:
        noise = torch.randn(_SAMPLES, filters.weight.shape[1], generator=generator, dtype=torch.float32)
        z = (noise @ filters.weight[keep].T.float()).double() + filters.offset[keep]
        lost = float((f(z @ s) - f(z) @ s).square().mean())
    return Terms(float(residual.square().sum(1).mean()), float(offset.square().mean()), lost)
