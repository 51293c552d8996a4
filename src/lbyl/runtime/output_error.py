"""The relative error of a cut network's outputs on held-out probes: a measure of what was lost, without data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbyl.errors import InputError
from lbyl.runtime.inputs import output_tensors
from lbyl.runtime.probabilities import class_axis, to_scores
from lbyl.runtime.sentinels import meaningful


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
    do not depend on it. An error of 0 means that nothing changed, and 1 that nothing is left. Outputs that are
    probabilities of classes are compared by the scores behind them. Where no output is a floating-point number, bytes
    and truth values are compared as numbers; and if all are larger integers, such as the numbers of classes, the error
    is the share of them that differ.

    Raises:
        InputError: the reference holds no finite number, or the sizes of both differ.
    """
    return error_of_parts([output_tensors(reference)], [output_tensors(outputs)])


def error_of_parts(expected: Sequence[Sequence[Tensor]], found: Iterable[Sequence[Tensor]]) -> float:
    """The same of outputs that come part by part, as those of large batches; means are taken over all parts.

    One part of ``found`` is asked for at a time, and nothing as large as a part is made.
    """
    if not any(holds_amounts(tensor) for part in expected for tensor in part):
        return _share_that_differs(expected, found)
    expected = [_numbers(part) for part in expected]
    axes = [_class_axis(same) for same in zip(*expected, strict=True)]
    expected = [_as_scores(part, axes) for part in expected]
    cross = own = theirs = 0.0
    for part, other, means in zip(expected, found, _means(expected), strict=True):
        floats = _as_scores(_numbers(other), axes)
        for a, b, mean in zip(part, floats, means, strict=True):
            _check_sizes(a, b)
            for x, y in _chunks(a, b):
                x, y = x - mean, y - mean
                cross += float((x * y).sum())
                own += float(x.square().sum())
                theirs += float(y.square().sum())
    if own == theirs == 0:
        return 0.0
    if not math.isfinite(cross) or cross <= 0:
        return 1.0
    return math.sqrt(max(0.0, 1 - cross**2 / (own * theirs)))


_BYTES = (torch.uint8, torch.bool)
"""Outputs of these types are images or masks: amounts, and not the numbers of classes or places."""


def holds_amounts(tensor: Tensor) -> bool:
    """Whether the output holds amounts, and not the numbers of classes or places, of which none is close to another."""
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype in _BYTES


def _numbers(part: Sequence[Tensor]) -> list[Tensor]:
    """The floating-point outputs, of complex ones both parts; bytes and truth values as such where there are none."""
    floats = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in part]
    floats = [tensor for tensor in floats if tensor.is_floating_point()]
    return floats or [tensor.float() for tensor in part if tensor.dtype in _BYTES]


def _check_sizes(expected: Tensor, found: Tensor) -> None:
    if expected.shape != found.shape:
        given, other = ("x".join(map(str, tensor.shape)) or "one number" for tensor in (expected, found))
        raise InputError(
            f"an output has {given} elements, and {other} after a cut, as lists of what was found do: they can't be "
            "compared; compress the network that returns the scores behind them"
        )


def _share_that_differs(expected: Sequence[Sequence[Tensor]], found: Iterable[Sequence[Tensor]]) -> float:
    """The share of answers that are not the same."""
    differ = count = 0
    for part, other in zip(expected, found, strict=True):
        for a, b in zip(part, other, strict=True):
            _check_sizes(a, b)
            differ += int((a != b).sum())
            count += a.numel()
    return differ / max(1, count)


def _class_axis(parts: Sequence[Tensor]) -> int | None:
    """The axis along which an output holds probabilities in every part; None if there is none."""
    first, *others = {class_axis(tensor) for tensor in parts}
    return None if others else first


def _as_scores(tensors: Sequence[Tensor], axes: Sequence[int | None]) -> list[Tensor]:
    pairs = zip(tensors, axes, strict=True)
    return [tensor if axis is None else to_scores(tensor, axis) for tensor, axis in pairs]


_CHUNK = 2**22
"""Elements that are widened to float64 at a time."""


def _chunks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two tensors in float64, some rows at a time, where the first one holds what is no sentinel."""
    if not a.dim():
        a, b = a[None], b[None]
    rows = max(1, _CHUNK * len(a) // max(1, a.numel()))
    for x, y in zip(a.split(rows), b.split(rows), strict=True):
        here = meaningful(x)  # others are masked on purpose
        x, y = x.double(), y.double()
        yield (x, y) if bool(here.all()) else (x[here], y[here])


def _means(parts: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The mean for each tensor of each part; parts that are alike have one."""
    kinds = {tuple(t.shape[1:] if t.dim() else None for t in part) for part in parts}
    if len(kinds) == 1 and None not in next(iter(kinds)):
        means = [_mean(same) for same in zip(*parts, strict=True)]
        return [means] * len(parts)
    return [[_mean([tensor]) for tensor in part] for part in parts]


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean of every feature; of all together where each is there only once, or some values are sentinels."""
    first, count = parts[0], sum(tensor.numel() for tensor in parts)
    axis = 1 if first.dim() > 3 else first.dim() - 1
    others = [dim for dim in range(first.dim()) if dim != axis]
    if not all(bool(meaningful(tensor).all()) for tensor in parts):
        finite = [x for tensor in parts for x, _ in _chunks(tensor, tensor)]
        if not any(x.numel() for x in finite):
            raise InputError("the network's outputs on the probes are not finite")
        return torch.stack([x.sum() for x in finite]).sum() / sum(x.numel() for x in finite)
    if not others or count <= first.shape[axis]:
        return torch.stack([tensor.sum(dtype=torch.float64) for tensor in parts]).sum() / count
    sums = [tensor.sum(others, keepdim=True, dtype=torch.float64) for tensor in parts]
    return torch.stack(sums).sum(0) * (first.shape[axis] / count)
