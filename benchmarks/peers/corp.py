"""CORP (arXiv 2602.05243) for the hidden neurons of a ViT's MLPs: an affine ridge regression on calibration data.

Dropped neurons are regressed on the kept ones, with a constant: ``x_D = B x_K + c``. Both are folded into the consumer.
The covariance is shrunk by the oracle approximating estimator (OAS), which sets the ridge. Neurons are ranked by
the energy that they contribute, ``|W_:j|^2 E x_j^2``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from sklearn.covariance import oas
from torch import Tensor, nn

from peers.grail import Activation, in_turn
from peers.pairs import Mix, Pair, Unmix, selection


def affine(x: Float[Tensor, "positions width"], keep: Sequence[int]) -> tuple[Mix, Unmix, Float[Tensor, " width"]]:
    """How all channels follow from the kept ones: the matrices of `peers.pairs.reduce`, and the constants."""
    keep = sorted(keep)
    mean, width = x.mean(0), x.shape[1]
    covariance = torch.from_numpy(oas(x.numpy())[0])
    mix = selection(keep, width)
    unmix = torch.linalg.solve(covariance[keep][:, keep], covariance[keep]).T.contiguous()
    unmix[keep] = torch.eye(len(keep), dtype=x.dtype)
    return mix, unmix, mean - unmix @ mean[keep]


def corp(net: nn.Module, pairs: Sequence[Pair], images: Tensor, activation: Activation) -> nn.Module:
    """As many neurons of each pair as it keeps, those that contribute most, and the compensation for the others."""

    def solve(pair: Pair, x: Tensor) -> tuple[Mix, Unmix, Tensor]:
        weight = net.get_submodule(pair.consumer).weight.detach().double()  # pyright: ignore
        energy = weight.square().sum(0) * x.square().mean(0)
        return affine(x, energy.argsort(descending=True)[: len(pair.keep)].tolist())

    return in_turn(net, pairs, images, activation, solve)
