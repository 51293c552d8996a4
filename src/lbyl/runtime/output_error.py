"""The relative error of a cut network's outputs on held-out probes: a measure of what was lost, without data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbyl.errors import InputError
from lbyl.runtime.inputs import output_tensors


@dataclass(frozen=True)
class Assessment:
    """Relative errors of the network's outputs, after plain pruning and after restoration.

    Attributes:
        pruned: the error after plain pruning.
        restored: the error after restoration.
        held_out: whether it was measured on held-out probes; False if there were too few inputs to hold any out.
        real: whether the probes are real inputs of the user.
    """

    pruned: float
    restored: float
    held_out: bool = True
    real: bool = False

    @property
    def short(self) -> str:
        """The same in a word or two."""
        return "what was solved on" if not self.held_out else "held-out inputs" if self.real else "probes"

    @property
    def where(self) -> str:
        """What it was measured on."""
        if not self.held_out:
            return "the inputs that were solved on, for there were too few to hold any out"
        return "held-out inputs of yours" if self.real else "held-out probes, which are no real inputs"


def outputs_error(reference: Any, outputs: Any) -> float:
    """``min_a |a f'(x) - f(x)| / |f(x)|`` over all floating-point outputs, after the mean of f is subtracted from both.

    ``reference`` holds the outputs f of one network and ``outputs`` the outputs f' of another, in the same structure.
    The mean of each feature is taken over all inputs and positions; features are the second axis of images and the
    last axis of sequences and rows. The common factor ``a`` is free because pruning shrinks outputs, while decisions
    do not depend on it. An error of 0 means that nothing changed, and 1 that nothing is left.

    Raises:
        InputError: the reference holds no finite number.
    """
    expected = [t for t in output_tensors(reference) if t.is_floating_point()]
    found = [t for t in output_tensors(outputs) if t.is_floating_point()]
    cross = own = theirs = 0.0
    for a, b in zip(expected, found, strict=True):
        a, b = a.double(), b.double()
        here = torch.isfinite(a)  # masked outputs are -inf on purpose
        if not bool(here.all()):
            if a.numel() and not bool(here.any()):
                raise InputError("the network's outputs on the probes are not finite")
            a, b = a[here], b[here]
        mean = _mean(a)
        x, y = a - mean, b - mean
        cross += float((x * y).sum())
        own += float(x.square().sum())
        theirs += float(y.square().sum())
    if own == theirs == 0:
        return 0.0
    if not math.isfinite(cross) or cross <= 0:
        return 1.0
    return math.sqrt(max(0.0, 1 - cross**2 / (own * theirs)))


def _mean(tensor: Tensor) -> Tensor:
    """The mean of every feature, or of all features together if each has a single value."""
    axis = 1 if tensor.dim() > 3 else tensor.dim() - 1
    others = [dim for dim in range(tensor.dim()) if dim != axis]
    if not others or tensor.numel() <= tensor.shape[axis]:
        return tensor.mean()
    return tensor.mean(others, keepdim=True)
