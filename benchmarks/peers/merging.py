"""Neuron Merging (Kim et al., NeurIPS 2020, arXiv 2010.13160): each dropped channel goes to the most similar kept one.

`neuron_merging` follows the authors' released code, which has the running variance where the paper has the deviation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peers.pairs import Mix, Pair, Unmix, selection


def scaling(
    filters: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    keep: tuple[int, ...],
    threshold: float = 0.1,
    blend: float = 0.85,
) -> Unmix:
    """The authors' scaling matrix, channel by channel.

    Args:
        filters: one row for each channel; without a batch norm, the bias is its last entry.
        norm: gamma, beta, running mean and running variance.
        keep: the kept channels.
        threshold: a dropped channel is not merged if its cosine similarity to the chosen one is below.
        blend: weight of the cosine distance; the rest is that of the distance of biases, scaled to [0, 1].
    """
    filters = filters.double()
    kept = filters[list(keep)]
    scale_of = torch.zeros(len(filters), len(keep), dtype=torch.float64)
    for channel, row in enumerate(filters):
        if channel in keep:
            scale_of[channel, keep.index(channel)] = 1
            continue
        similarity = nn.functional.cosine_similarity(row[None], kept)
        scale = row.norm() / kept.norm(dim=1)
        distance = 1 - similarity
        if norm is not None:
            gamma, beta, mean, var = (part.double() for part in norm)
            g, b, m, v = (part[channel] for part in (gamma, beta, mean, var))
            gk, bk, mk, vk = (part[list(keep)] for part in (gamma, beta, mean, var))
            bias = (gk / vk * (scale * (m - v * b / g) - mk) + bk).abs()
            scale = scale * gk / g * v / vk
            bias = bias / scale
            distance = blend * distance + (1 - blend) * (bias - bias.min()) / (bias.max() - bias.min())
        chosen = int(distance.argmin())
        if similarity[chosen] >= threshold:
            scale_of[channel, chosen] = scale[chosen]
    return scale_of


@torch.no_grad()
def neuron_merging(net: nn.Module, pair: Pair) -> tuple[Mix, Unmix]:
    """Select the kept channels, and add the others to them."""
    producer, norm, _ = pair.layers(net)
    rows = producer.weight.flatten(1)
    if norm is None and producer.bias is not None:
        rows = torch.cat([rows, producer.bias[:, None]], 1)
    terms = None if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return selection(pair.keep, len(rows)), scaling(rows, terms, pair.keep)
