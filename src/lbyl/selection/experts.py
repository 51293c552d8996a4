"""Chooses the experts of a mixture that are dropped."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor


def routed_norms(total: Float[Tensor, " experts"], tokens: Float[Tensor, " experts"]) -> Float[Tensor, " experts"]:
    """REAP's score of each expert (arXiv 2510.13999): the mean of ``g_j(x) |f_j(x)|`` over its tokens x.

    Here ``g_j`` is the router's weight and ``f_j`` the expert's output; 0 without tokens.

    Args:
        total: the sum of these norms over the tokens that an expert got.
        tokens: how many tokens it got.

    >>> import torch
    >>> routed_norms(torch.tensor([6.0, 0.0]), torch.tensor([3.0, 0.0]))
    tensor([2., 0.])
    """
    return total / tokens.clamp_min(1)


def highest(scores: Float[Tensor, " experts"], keep: int) -> tuple[int, ...]:
    """The experts with the highest scores, in ascending order; of equal scores, the first ones.

    >>> import torch
    >>> highest(torch.tensor([1.0, 3.0, 2.0]), 2)
    (1, 2)
    """
    order = scores.argsort(descending=True, stable=True)
    return tuple(sorted(order[:keep].tolist()))


def same_share(
    counts: Mapping[str, int], fewest: Mapping[str, int], costs: Mapping[str, float], saving: float
) -> dict[str, int]:
    """How many experts each mixture keeps, such that all keep about the same share and enough is saved.

    As many as possible stay, but never fewer than ``fewest``, so that too little may be saved.

    Args:
        counts: the number of experts by mixture.
        fewest: how many must stay.
        costs: what one expert costs.
        saving: what has to be saved.

    >>> same_share({"a": 8, "b": 8}, {"a": 2, "b": 2}, {"a": 1.0, "b": 1.0}, saving=3.5)
    {'a': 6, 'b': 6}
    """
    most = max(counts.values())
    kept = dict(counts)
    for number in range(most, -1, -1):
        kept = {path: max(fewest[path], math.ceil(count * number / most)) for path, count in counts.items()}
        if saved(counts, kept, costs) >= saving:
            break
    return kept


def lowest_shares(
    scores: Mapping[str, Float[Tensor, " experts"]],
    fewest: Mapping[str, int],
    costs: Mapping[str, float],
    saving: float,
) -> dict[str, int]:
    """How many experts each mixture keeps, if those go first that have the least share of their mixture's scores.

    >>> import torch
    >>> scores = {"a": torch.tensor([1.0, 9.0]), "b": torch.tensor([4.0, 6.0])}
    >>> lowest_shares(scores, {"a": 1, "b": 1}, {"a": 1.0, "b": 1.0}, saving=1.0)
    {'a': 1, 'b': 2}
    """
    counts = {path: len(found) for path, found in scores.items()}
    kept = dict(counts)
    shares = [(float(share), path) for path, found in scores.items() for share in found / found.sum().clamp_min(1e-300)]
    for _, path in sorted(shares, key=lambda item: item[0]):
        if saved(counts, kept, costs) >= saving:
            break
        kept[path] = max(fewest[path], kept[path] - 1)
    return kept


def saved(counts: Mapping[str, int], kept: Mapping[str, int], costs: Mapping[str, float]) -> float:
    """What is saved if so many experts stay."""
    return sum(costs[path] * (count - kept[path]) for path, count in counts.items())
