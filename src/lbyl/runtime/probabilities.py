"""Outputs that are probabilities of classes, and the scores behind them.

A network that ends in a softmax is compared by its scores, as it would be without the softmax: probabilities of sure
answers hardly change until an answer turns, so that their error says little, and only of the inputs in doubt.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def class_axis(output: Tensor) -> int | None:
    """The axis along which an output holds probabilities of two or more classes, that is, the last or second one.

    None if there is none: numbers below zero, or sums that are not 1.
    """
    output = output.detach()
    if not output.is_floating_point() or output.dim() < 2 or not output.numel() or bool((output < 0).any()):
        return None
    for axis in (output.dim() - 1, 1):
        sums = output.sum(axis, dtype=torch.float64) if output.shape[axis] > 1 else None
        # Each probability is rounded, to one part in 256 for bfloat16.
        if sums is not None and float((sums - 1).abs().max()) <= max(1e-4, 2 * torch.finfo(output.dtype).eps):
            return axis
    return None


def to_scores(probabilities: Float[Tensor, "..."], axis: int) -> Float[Tensor, "..."]:
    """The scores of which these are the softmax, ``log p`` less its mean over the classes.

    Probabilities of 0 get the score of the smallest normal number.
    """
    logs = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return logs - logs.mean(axis, keepdim=True)


def scores_of(output: Tensor) -> Tensor:
    """The scores behind an output if it holds probabilities; otherwise the output itself."""
    axis = class_axis(output)
    return output if axis is None else to_scores(output, axis)
