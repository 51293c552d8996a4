"""How much of the network is left, judged without data: the outputs' error on probes that no solve saw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lbyl.runtime.inputs import output_tensors

DESTROYED = 0.9
"""An output error above this says that the network is likely of no use: at 1, nothing is left of its outputs."""


@dataclass(frozen=True)
class Assessment:
    """Relative error of the network's outputs on held-out probes, after plain pruning and after restoration."""

    pruned: float
    restored: float


def outputs_error(reference: Any, outputs: Any) -> float:
    """``min_a |a f'(x) - f(x)| / |f(x)|`` over all floating-point outputs, both less the mean of f.

    ``reference`` is what one network gave, ``outputs`` what another did, in the same structure. The mean is taken
    over the batch. The common factor ``a`` is left free because decisions taken from outputs do not depend on it,
    while pruning shrinks them: 0 says that nothing changed, 1 that nothing is left.
    """
    expected = [t for t in output_tensors(reference) if t.is_floating_point()]
    found = [t for t in output_tensors(outputs) if t.is_floating_point()]
    cross = own = theirs = 0.0
    for a, b in zip(expected, found, strict=True):
        mean = a.double().mean(0, keepdim=True)
        x, y = a.double() - mean, b.double() - mean
        cross += float((x * y).sum())
        own += float(x.square().sum())
        theirs += float(y.square().sum())
    if not math.isfinite(cross) or cross <= 0:
        return 1.0
    return math.sqrt(max(0.0, 1 - cross**2 / (own * theirs)))
