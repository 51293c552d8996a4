"""Names the axes of factors as einsum does, and finds the linear layers among sums of products."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def spelled_out(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The labels of each operand's axes and of the result's, without an ellipsis and with the result named.

    >>> spelled_out("...i,oi->...o", [3, 2])
    (['YZi', 'oi'], 'YZo')
    >>> spelled_out("bi, oi", [2, 2])
    (['bi', 'oi'], 'bo')
    """
    terms, arrow, out = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    # How many axes each ellipsis stands for; shorter ones are aligned at the right.
    lengths = [rank - len(name) + 3 if "..." in name else 0 for name, rank in zip(names, ranks, strict=True)]
    lead = "".join(x for x in string.ascii_letters[::-1] if x not in equation)[: max(lengths)][::-1]
    names = [name.replace("...", lead[len(lead) - n :]) for name, n in zip(names, lengths, strict=True)]
    if not arrow:
        once = sorted(x for x in set("".join(names)) if x not in lead and "".join(names).count(x) == 1)
        return names, lead + "".join(once)
    return names, out.replace("...", lead)


def dotted(ranks: tuple[int, int], summed: tuple[Sequence[int], Sequence[int]]) -> tuple[list[str], str]:
    """The same for two factors of which some axes are summed in pairs, as by ``tensordot``.

    >>> dotted((2, 2), ([1], [0]))
    (['ab', 'bB'], 'aB')
    """
    first, second = string.ascii_lowercase[: ranks[0]], list(string.ascii_uppercase[: ranks[1]])
    for mine, other in zip(*summed, strict=True):
        second[other] = first[mine]
    out = "".join(x for x in first if x not in second) + "".join(x for x in second if x not in first)
    return [first, "".join(second)], out


@dataclass(frozen=True)
class LinearAxes:
    """A sum of products that is a linear layer.

    Attributes:
        read: the input's axis whose channels the matrix reads.
        made: the result's axis whose channels it makes.
        dim: the matrix's dimension that reads; the other one makes.
    """

    read: int
    made: int
    dim: int


def linear_axes(x: str, matrix: str, out: str) -> LinearAxes | None:
    """The axes if the matrix reads one axis of the input and makes one of the result; None otherwise.

    >>> linear_axes("bti", "oi", "bto")
    LinearAxes(read=2, made=2, dim=1)
    """
    read = [label for label in matrix if label in x and label not in out]
    made = [label for label in matrix if label in out and label not in x]
    rest = x.replace(read[0], "") if read else ""
    if len(matrix) != 2 or len(read) != 1 or len(made) != 1 or sorted(out) != sorted(rest + made[0]):
        return None
    return LinearAxes(x.index(read[0]), out.index(made[0]), matrix.index(read[0]))


def factors_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[str], str] | None:
    """The two factors of a call of einsum, tensordot, an inner product or a matrix product, with their labels.

    None for other calls and for other spellings.
    """
    if func is torch.einsum and args and isinstance(args[0], str):
        values = list(args[1]) if len(args) == 2 and isinstance(args[1], (list, tuple)) else list(args[1:])
        if len(values) != 2 or not all(isinstance(value, Tensor) for value in values):
            return None
        return values, *spelled_out(args[0], [value.dim() for value in values])
    if len(args) < 2 or not all(isinstance(value, Tensor) for value in args[:2]):
        return None
    values, ranks = list(args[:2]), (args[0].dim(), args[1].dim())
    if func is torch.tensordot:
        dims = args[2] if len(args) > 2 else kwargs.get("dims", 2)
        if isinstance(dims, int):
            dims = range(ranks[0] - dims, ranks[0]), range(dims)
        pair = [[axes] if isinstance(axes, int) else list(axes) for axes in dims]
        return values, *dotted(ranks, (pair[0], pair[1]))
    if func in (torch.inner, torch.Tensor.inner) and min(ranks) and not kwargs:
        return values, *dotted(ranks, ([-1], [-1]))
    if func in PRODUCTS and ranks[0] == 2 and ranks[1] > 1 and not kwargs:
        lead = string.ascii_uppercase[: ranks[1] - 2]
        return values, ["oi", f"{lead}ix"], f"{lead}ox"
    return None


PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__)
