"""Finds features with scales of their own in the example inputs: the columns of a table, or the channels of sensors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lbyl.moments.scale import Scale, by_feature, feature_axes

_SPREAD = 0.5
"""Deviations of features are apart if their logarithms differ by more than this on average (a factor of 1.6 both ways),
on top of what they differ by chance."""
_CHANCE = 1.5
"""Chance is taken to be this many times as large as it is for normal values."""
_SHIFTED = 2.0
"""Means of features are apart if they differ by more than this many of the features' deviations."""
_FEW, _ENOUGH, _MANY = 4, 24, 1024
"""Of less than so many rows only the magnitudes of values count, if there are so many features but not more: few say
nothing, and a longer row is rather a signal, which may be loud and quiet."""
_POSITIONS = 8
"""In a sequence or an image, so many values of a feature are needed."""
_OF_MAGNITUDE = 0.5
"""The deviation of a feature as a share of its only value. Values that are never negative have about one to two
deviations as their mean."""


def feature_scales(tensor: Tensor) -> Scale | None:
    """The scales of features in one example input, if they are clearly apart; None if one scale suits all.

    Features are along axis 1 or the last axis, whichever explains more. Values that are all constant say nothing.

    Args:
        tensor: ``[rows, features]``, ``[rows, features, *positions]`` or ``[rows, *positions, features]``.
    """
    if tensor.dim() < 2 or not bool(torch.isfinite(tensor).all()):
        return None
    rows = {axis: by_feature(tensor, axis) for axis in feature_axes(tensor)}
    excess, axis = max(((_excess(values), axis) for axis, values in rows.items()), key=lambda pair: pair[0])
    if excess <= 0:
        return None
    mean, deviation = _estimates(rows[axis])
    floor = 0.0 if bool((rows[axis] >= 0).all()) else -math.inf
    return Scale(mean.float(), deviation.float(), low=floor, axis=axis)


def _excess(rows: Float[Tensor, "values features"]) -> float:
    """How much further apart scales or means are than they may be by chance; not above zero if they are not."""
    count, features = rows.shape
    if features < 2 or (count < _FEW and not _ENOUGH <= features <= _MANY):
        return -1.0
    seen = rows.std(0, unbiased=False) if count >= _FEW else rows.abs().mean(0)
    seen = seen[seen > 0]
    if len(seen) < 2:
        return -1.0
    # The logarithm of the deviation of n normal values varies by about 1 / sqrt(2 n - 2); that of one value, by 1.1.
    chance = _CHANCE * (1 / math.sqrt(2 * count - 2) if count >= _FEW else 1.1)
    apart = float(seen.log().std(unbiased=False)) - _SPREAD - chance
    if count < _FEW:
        return apart
    shifted = float(rows.mean(0).std(unbiased=False)) / float(seen.median()) - _SHIFTED
    return max(apart, shifted)


def _estimates(rows: Float[Tensor, "values features"]) -> tuple[Float[Tensor, " features"], Float[Tensor, " features"]]:
    """Mean and deviation of each feature. One that does not vary has a share of its magnitude, or of the smallest."""
    mean = rows.mean(0)
    deviation = rows.std(0) if len(rows) >= _FEW else torch.zeros_like(mean)
    still = deviation <= 1e-6 * mean.abs()
    deviation[still] = _OF_MAGNITUDE * mean[still].abs()
    return mean, deviation.clamp_min(float(deviation[deviation > 0].min()))
