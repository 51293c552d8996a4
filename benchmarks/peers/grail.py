"""GRAIL (Tang et al. 2026, arXiv 2602.23795): a ridge regression of all channels on those that a method leaves.

The Gram matrix is that of the consumer's input on a few real inputs, not centered. Layers are compensated from the
input to the output, each on what the network with all earlier layers reduced gives, in one forward pass; or all at once
on what the original network gives, as in the authors' released code for images. In the benchmark the latter is better.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peers.pairs import Mix, Pair, Unmix, reduce, reduced

Activation = Callable[[Tensor], Tensor]


def channels_last(x: Tensor, layer: nn.Module) -> Float[Tensor, "positions channels"]:
    """A layer's input with one row for each position."""
    return (x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x).reshape(-1, layer.weight.shape[1])  # pyright: ignore


def compensation(gram: Float[Tensor, "width width"], mix: Mix, ridge: float = 1e-3) -> Unmix:
    """``B = G M^T (M G M^T + lambda I)^-1``, lambda being ``ridge`` times the mean of the diagonal of ``M G M^T``."""
    inner = mix @ gram @ mix.T
    inner.diagonal().add_(ridge * inner.diagonal().mean().clamp_min(1e-12))
    return torch.linalg.solve(inner, mix @ gram).T


@torch.no_grad()
def in_turn(
    net: nn.Module, pairs: Sequence[Pair], images: Tensor, activation: Activation, solve: Callable[..., Any]
) -> nn.Module:
    """A copy of a network whose pairs are reduced one after the other while images go through it.

    Args:
        net: the network.
        pairs: in the order in which the network runs them.
        images: all that methods look at.
        activation: the function between the producer with its batch norm and the consumer.
        solve: gives the arguments of `reduce` after the pair, for a pair and the rows of its consumer's input.
    """
    small, hooks, fed = copy.deepcopy(net).eval(), [], {}

    def remember(pair: Pair) -> Callable[..., None]:
        return lambda layer, inputs: fed.__setitem__(pair, inputs[0])

    def cut(pair: Pair) -> Callable[..., Any]:
        def hook(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            reduce(small, pair, *solve(pair, channels_last(inputs[0], layer).double()))
            producer, norm, _ = pair.layers(small)
            # Not by calling the producer, whose hook would run again.
            made = producer.forward(fed.pop(pair))
            return (activation(made if norm is None else norm(made)),)

        return hook

    for pair in pairs:
        producer, _, consumer = pair.layers(small)
        hooks += [producer.register_forward_pre_hook(remember(pair)), consumer.register_forward_pre_hook(cut(pair))]
    small(images)
    for hook in hooks:
        hook.remove()
    return small


@torch.no_grad()
def grams_of(net: nn.Module, pairs: Sequence[Pair], images: Tensor) -> dict[Pair, Tensor]:
    """The Gram matrix of each consumer's input in the original network."""
    grams = {}

    def watch(pair: Pair) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            x = channels_last(inputs[0], layer).double()
            grams[pair] = x.T @ x / len(x)

        return hook

    hooks = [net.get_submodule(pair.consumer).register_forward_pre_hook(watch(pair)) for pair in pairs]
    net(images)
    for hook in hooks:
        hook.remove()
    return grams


def grail(
    net: nn.Module,
    pairs: Sequence[Pair],
    images: Tensor,
    activation: Activation,
    how: Callable[[nn.Module, Pair], tuple[Mix, Unmix]],
    ridge: float = 1e-3,
    sequential: bool = True,
) -> nn.Module:
    """GRAIL over another method, whose ``unmix`` is replaced."""

    if not sequential:
        grams = grams_of(net, pairs, images)

        def once(net: nn.Module, pair: Pair) -> tuple[Mix, Unmix]:
            mix = how(net, pair)[0]
            return mix, compensation(grams[pair], mix, ridge)

        return reduced(net, pairs, once)

    def solve(pair: Pair, x: Tensor) -> tuple[Mix, Unmix]:
        mix = how(net, pair)[0]
        return mix, compensation(x.T @ x / len(x), mix, ridge)

    return in_turn(net, pairs, images, activation, solve)
