"""Values that stand for nothing: infinities, NaN, and the huge numbers that models write where something is masked."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

_LEAST, _LARGEST = -1e30, 3.3e38
"""Beyond these are minus infinity and the least and the largest numbers of single precision and of bfloat16."""
_USUAL = (torch.finfo(torch.float16).min, -1e9, -1e4)
"""Smaller numbers that models write on purpose: the least one of half precision, minus a billion, minus 10,000."""


def meaningful(tensor: Tensor) -> Bool[Tensor, "*shape"]:
    """Where a tensor of numbers holds any that mean something.

    Masked scores are ``-inf``, the least number of some precision, or a round one such as minus a billion. Beside
    them, everything else would count as nothing in a sum of squares or a largest magnitude. Complex numbers are only
    checked to be finite.
    """
    if tensor.is_complex() or not tensor.is_floating_point():
        return torch.isfinite(tensor)
    here = (tensor > _LEAST) & (tensor < _LARGEST)  # not so for NaN
    for value in _USUAL:
        here &= tensor != value
    return here
