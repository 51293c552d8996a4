"""Two layers with channels between them, and how all methods here make these channels fewer.

A method reduces a pair to ``kept`` channels by two matrices: ``mix`` (kept x width) makes the rows of the producer and
of the batch norm after it, ``unmix`` (width x kept) the columns of the consumer. Pruning has zeros and ones in both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Mix = Float[Tensor, "kept width"]
Unmix = Float[Tensor, "width kept"]


@dataclass(frozen=True)
class Pair:
    """A layer, the batch norm after it (None without one), and the layer that reads its channels.

    Attributes:
        producer: name of the convolution or linear layer that makes the channels.
        norm: name of the batch norm that follows.
        consumer: name of the layer that reads the channels.
        keep: the channels that pruning by magnitude keeps, ascending.
    """

    producer: str
    norm: str | None
    consumer: str
    keep: tuple[int, ...]

    def layers(self, net: nn.Module) -> tuple[Any, Any, Any]:
        """Producer, batch norm or None, and consumer."""
        norm = None if self.norm is None else net.get_submodule(self.norm)
        return net.get_submodule(self.producer), norm, net.get_submodule(self.consumer)


def pairs_of(
    net: nn.Module, kept: Mapping[str, Sequence[int]], names: Sequence[tuple[str, str | None, str]]
) -> list[Pair]:
    """The pairs of these names, with the kept channels of each producer; those that keep all are left out."""
    found = [Pair(*each, tuple(kept[each[0]])) for each in names if each[0] in kept]
    return [pair for pair in found if len(pair.keep) < len(pair.layers(net)[0].weight)]


def selection(keep: Sequence[int], width: int) -> Mix:
    """The matrix that selects channels: ``M x = x_K``."""
    return torch.eye(width, dtype=torch.float64)[list(keep)]


@torch.no_grad()
def reduce(net: nn.Module, pair: Pair, mix: Mix, unmix: Unmix, constant: Tensor | None = None) -> None:
    """Make the channels between two layers fewer, in place.

    Args:
        net: the network.
        pair: the layers.
        mix: makes the producer's rows and the batch norm's entries.
        unmix: makes the consumer's columns: each dropped channel ``x_j`` is read as ``unmix[j] @ x_kept``.
        constant: what each of the original channels has in addition; it goes into the consumer's bias.
    """
    producer, norm, consumer = pair.layers(net)
    weight = consumer.weight
    if constant is not None:
        taps = weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight.double()
        consumer.bias.add_((taps @ constant).to(weight.dtype))
    columns = torch.einsum("oi...,ik->ok...", weight.double(), unmix)
    consumer.weight = nn.Parameter(columns.to(weight.dtype).contiguous())
    for layer, names in ((producer, ("weight", "bias")), (norm, ("weight", "bias", "running_mean", "running_var"))):
        for name in names:
            tensor = getattr(layer, name, None)
            if tensor is not None:
                mixed = torch.einsum("ki,i...->k...", mix, tensor.double()).to(tensor.dtype).contiguous()
                setattr(layer, name, nn.Parameter(mixed) if isinstance(tensor, nn.Parameter) else mixed)
    if norm is not None:
        norm.num_features = len(mix)
    if isinstance(producer, nn.Linear):
        producer.out_features = consumer.in_features = len(mix)
    else:
        producer.out_channels = consumer.in_channels = len(mix)


def reduced(net: nn.Module, pairs: Sequence[Pair], how: Callable[[nn.Module, Pair], tuple[Mix, Unmix]]) -> nn.Module:
    """A copy of a network in which all pairs are reduced, each by what ``how`` makes of the original layers."""
    small = copy.deepcopy(net).eval()
    for pair in pairs:
        reduce(small, pair, *how(net, pair))
    return small


@torch.no_grad()
def reestimated(net: nn.Module, images: Tensor) -> nn.Module:
    """The same network, whose batch norms now have the statistics that they see on these images (in place)."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    net(images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()
    return net
