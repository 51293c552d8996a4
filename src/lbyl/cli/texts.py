"""Parses the texts of options. An invalid text is a usage error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import typer


@dataclass(frozen=True)
class InputSpec:
    """Shape and dtype of one positional input, as written in ``--input``, and whether the dtype was written there.

    >>> InputSpec.parse("1x3x224x224")
    InputSpec(shape=(1, 3, 224, 224), dtype='float32', stated=False)
    >>> InputSpec.parse("int64:1x128")
    InputSpec(shape=(1, 128), dtype='int64', stated=True)
    >>> InputSpec.parse("1,128").shape
    (1, 128)
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    stated: bool = False

    @staticmethod
    def parse(text: str) -> InputSpec:
        """Parse ``1x3x224x224`` or ``int64:1x128``; anything else is a usage error."""
        named, separator, sizes = text.rpartition(":")
        dtype = named if separator else "float32"
        if dtype not in _DTYPES:
            raise typer.BadParameter(f"{text!r}: {dtype!r} is not a dtype; write one of {', '.join(_DTYPES)}")
        try:
            shape = tuple(int(size) for size in sizes.replace(",", "x").split("x"))
        except ValueError:
            shape = (0,)
        if min(shape) < 1:
            raise typer.BadParameter(f"{text!r} is not a shape; write sizes such as 1x3x224x224 or int64:1x128")
        return InputSpec(shape, dtype, bool(separator))


def check_source(text: str | None) -> str | None:
    """Check that a text has the form of a source; whether the model exists is only known when it is built."""
    kind, _, name = (text or "").rpartition(":")
    if text is not None and not (kind and name):
        from lbyl.io.network_files import is_file
        from lbyl.io.sources import FORMS

        if is_file(text) or Path(text).is_dir():
            return text
        raise typer.BadParameter(f"{text!r} names no model; write {FORMS}, or a folder that compress wrote")
    return text


_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")


def check_inputs(texts: list[str] | None) -> list[str]:
    """Check that each text is the shape of an input."""
    for text in texts or []:
        InputSpec.parse(text)
    return texts or []  # not None: typer 0.15 asks for its length


def parse_ratio(texts: list[str]) -> float | dict[str, float]:
    """One number for every group, or ``GLOB=R`` as often as needed; a number among globs stands for ``*``.

    >>> parse_ratio(["0.3"])
    0.3
    >>> parse_ratio(["0.3", "layer4.*=0.5", "fc=0"])
    {'*': 0.3, 'layer4.*': 0.5, 'fc': 0.0}
    """
    ratios: dict[str, float] = {}
    for text in texts:
        pattern, _, number = text.rpartition("=")
        pattern = pattern or "*"
        try:
            share = float(number)
        except ValueError:
            raise typer.BadParameter(f"{text!r}: {number!r} is not a number; write 0.3 or 'layer4.*=0.3'") from None
        if not 0 <= share < 1:
            raise typer.BadParameter(f"{text!r}: the share of channels to drop must be at least 0 and below 1")
        if pattern in ratios:
            raise typer.BadParameter(f"two ratios for {pattern!r}")
        ratios[pattern] = share
    return ratios["*"] if list(ratios) == ["*"] else ratios


def check_ratios(texts: list[str] | None) -> list[str]:
    """Check that the texts are ratios."""
    if texts:
        parse_ratio(texts)
    return texts or []  # not None: see above


def parse_budget(text: str) -> tuple[str, float]:
    """The name and the amount in a budget.

    >>> parse_budget("macs=0.5")
    ('macs', 0.5)
    """
    name, _, number = text.partition("=")
    try:
        if name not in ("agreement", "accuracy_drop", "macs", "params", "size_mb", "latency"):
            raise ValueError
        return name, float(number)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: write agreement=0.95, accuracy_drop=0.01, macs=0.5, params=0.5, latency=0.5 or size_mb=10"
        ) from None


def check_one_budget(texts: list[str] | None) -> list[str]:
    """Check that there is at most one text, and that it is a budget."""
    for text in texts or []:
        parse_budget(text)
    if texts and len(texts) > 1:
        raise typer.BadParameter(f"{' and '.join(texts)}: give only one budget; lbyl sweep takes several")
    return texts or []  # not None: see above


def parse_budgets(texts: list[str]) -> list[tuple[str, float]]:
    """The names and the amounts in budgets, one pair for each amount.

    >>> parse_budgets(["macs=0.9,0.8", "params=0.5"])
    [('macs', 0.9), ('macs', 0.8), ('params', 0.5)]
    """
    found: list[tuple[str, float]] = []
    for text in texts:
        name, _, amounts = text.partition("=")
        for amount in amounts.split(","):
            budget = parse_budget(f"{name}={amount}")
            if budget in found:
                raise typer.BadParameter(f"{name}={amount} is given twice")
            found.append(budget)
    return found


def check_budgets(texts: list[str]) -> list[str]:
    """Check that the texts are budgets."""
    parse_budgets(texts)
    return texts


_WIDEST = 2**20
"""No layer is wider, so no multiple of channels is larger."""


def check_multiple(text: str | None) -> str | None:
    """Check that a text is a positive whole number or auto; None passes."""
    if text not in ("auto", None) and not (text.isascii() and text.isdigit() and 0 < int(text) <= _WIDEST):
        raise typer.BadParameter(f"{text!r}: write a whole number from 1 to {_WIDEST}, or auto")
    return text


def parse_numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas: one for all color channels, or one for each.

    >>> parse_numbers("0.485,0.456,0.406")
    (0.485, 0.456, 0.406)
    """
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise typer.BadParameter(f"{text!r}: write numbers such as 0.5 or 0.485,0.456,0.406")
    return numbers


def parse_divisors(text: str) -> tuple[float, ...]:
    """Numbers that pixels are divided by."""
    numbers = parse_numbers(text)
    if min(numbers) <= 0:
        raise typer.BadParameter(f"{text!r}: pixels are divided by these numbers; they must be above 0")
    return numbers
