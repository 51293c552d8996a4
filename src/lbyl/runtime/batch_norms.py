"""Finds a model's batch norms with running statistics, which describe their inputs in training."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms that have running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def norms_cover(model: nn.Module) -> bool:
    """Whether there are enough batch norms with running statistics to describe most of the network.

    There must be at least half as many as convolutions, or as linear layers in a network without convolutions. In
    files made for deployment most batch norms are folded away, and the few that are left say little about the rest.
    """
    modules = list(model.modules())
    convolutions = sum(isinstance(module, _ConvNd) for module in modules)
    layers = convolutions or sum(isinstance(module, nn.Linear) for module in modules)
    return 2 * len(batch_norms(model)) >= max(layers, 1)
