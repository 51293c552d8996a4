"""How far a batch norm is from its running statistics: what dreams minimize."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

_TINY = 1e-6
"""Added to variances, so that a channel that never varied in training does not dominate."""


def mismatch(
    running_mean: Float[Tensor, " channels"],
    running_var: Float[Tensor, " channels"],
    mean: Float[Tensor, " channels"],
    var: Float[Tensor, " channels"],
) -> Float[Tensor, ""]:
    """The mean over channels of ``(m - mu)^2 / sigma^2 + (s / sigma - 1)^2``, for a batch's mean m and deviation s."""
    stored = running_var + _TINY
    offset = (mean - running_mean).square() / stored
    spread = ((var + _TINY) / stored).sqrt() - 1
    return offset.mean() + spread.square().mean()
