"""How much of the network is left: the outputs' error, as a rule on probes that no solve saw."""

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
    """Relative error of the network's outputs, after plain pruning and after restoration.

    Attributes:
        pruned: after plain pruning.
        restored: after restoration.
        held_out: whether it was measured on probes that no solve saw; False where too few were given to hold any out.
        real: whether they are real inputs of the user's.
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
    """``min_a |a f'(x) - f(x)| / |f(x)|`` over all floating-point outputs, both less the mean of f.

    ``reference`` is what one network gave, ``outputs`` what another did, in the same structure. The mean is taken
    over all inputs and positions, each feature by itself: features are the second axis of images, the last one of
    sequences and rows. The common factor ``a`` is left free because decisions taken from outputs do not depend on it,
    while pruning shrinks them: 0 says that nothing changed, 1 that nothing is left.

    Raises:
        InputError: nothing that the reference holds is finite.
    """
    expected = [t for t in output_tensors(reference) if t.is_floating_point()]
    found = [t for t in output_tensors(outputs) if t.is_floating_point()]
    cross = own = theirs = 0.0
    for a, b in zip(expected, found, strict=True):
        a, b = a.double(), b.double()
        here = torch.isfinite(a)  # what is masked out is -inf on purpose
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
    """The mean of every feature; of all together where each of them is there only once."""
    axis = 1 if tensor.dim() > 3 else tensor.dim() - 1
    others = [dim for dim in range(tensor.dim()) if dim != axis]
    if not others or tensor.numel() <= tensor.shape[axis]:
        return tensor.mean()
    return tensor.mean(others, keepdim=True)
