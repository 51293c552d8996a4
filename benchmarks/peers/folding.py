"""Model Folding (Wang et al., ICLR 2025, arXiv 2502.10216): similar channels are merged.

Filters are clustered by k-means. A cluster's filter and its entries in the batch norm are the means over its members,
and the consumer's columns are their sums. "Cut Less, Fold More" (Saukh et al., ICLR 2026, arXiv 2602.18116) does so
and re-estimates the batch norms on data.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from torch import Tensor, nn

from peers.pairs import Mix, Pair, Unmix, reduce


def clusters(filters: Float[Tensor, "width size"], count: int, seed: int = 0) -> Int[Tensor, " width"]:
    """The cluster of each filter, by k-means."""
    means = KMeans(count, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
    return torch.from_numpy(means.fit(filters.double().numpy()).labels_).long()


def merging(labels: Int[Tensor, " width"]) -> tuple[Mix, Unmix]:
    """Means over the members of each cluster, and sums over them."""
    members = nn.functional.one_hot(labels).double()
    return members.T / members.sum(0)[:, None], members


def fold(net: nn.Module, pair: Pair) -> tuple[Mix, Unmix]:
    """Cluster the producer's filters, and merge each cluster."""
    producer = pair.layers(net)[0]
    rows = producer.weight.detach().flatten(1)
    if isinstance(producer, nn.Linear) and producer.bias is not None:
        rows = torch.cat([rows, producer.bias.detach()[:, None]], 1)
    return merging(clusters(rows, len(pair.keep)))


def variance_gain(filters: Float[Tensor, "width size"], labels: Int[Tensor, " width"]) -> Float[Tensor, " kept"]:
    """By what the mean of a cluster has to be multiplied to have the variance of its members.

    The mean of ``n`` variables of unit variance has the variance ``(1 + (n - 1) r) / n``, where ``r`` is their mean
    correlation; it is estimated by that of their filters, as if inputs were white. The gain is ``sqrt(n / (1 + (n - 1)
    r))``.
    """
    unit = nn.functional.normalize(filters.double(), dim=1)
    members = nn.functional.one_hot(labels).double()
    count = members.sum(0)
    total = (members.T @ unit).square().sum(1)  # n + n (n - 1) r
    return count / total.clamp_min(torch.finfo(torch.float64).eps).sqrt()


@torch.no_grad()
def fold_repaired(net: nn.Module, pairs: Sequence[Pair]) -> nn.Module:
    """Folding with the paper's approximate REPAIR, which needs no data: the variance that means lose is given back.

    Before channels are averaged, each is normalized by its running mean and variance. The gain goes into the scale of
    the batch norm. Pairs without a batch norm are only folded.
    """
    small = copy.deepcopy(net).eval()
    for pair in pairs:
        producer, norm, _ = pair.layers(small)
        if norm is None:
            reduce(small, pair, *fold(small, pair))
            continue
        deviation = (norm.running_var + norm.eps).sqrt()
        rows = producer.weight / deviation.reshape(-1, *[1] * (producer.weight.dim() - 1))
        labels = clusters(rows.flatten(1), len(pair.keep))
        gain = variance_gain(rows.flatten(1), labels)
        producer.weight.copy_(rows)
        # Of all that is averaged, the running variance is now one, and the running mean is in units of deviations.
        norm.running_mean.copy_(norm.running_mean / deviation)
        norm.running_var.fill_(1 - norm.eps)
        if producer.bias is not None:
            producer.bias.copy_(producer.bias / deviation)
        reduce(small, pair, *merging(labels))
        norm.weight.mul_(gain.to(norm.weight.dtype))
    return small
