"""Magnitude pruning: the channels whose filters have the largest norm stay, and nothing makes up for the others."""

from __future__ import annotations

from torch import nn

from peers.pairs import Mix, Pair, Unmix, selection


def prune(net: nn.Module, pair: Pair) -> tuple[Mix, Unmix]:
    """Select the kept channels in both layers."""
    mix = selection(pair.keep, len(pair.layers(net)[0].weight))
    return mix, mix.T
