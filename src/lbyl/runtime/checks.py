"""Checks of users' arguments: each error names the argument, its value and the values that are allowed."""

from __future__ import annotations

import math
import os
import stat
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import nn

from lbyl.errors import InputError, shortened


def check_number(
    place: str,
    value: Any,
    *,
    whole: bool = False,
    optional: bool = False,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    unit: str = "",
) -> None:
    """Raise InputError unless a value is a finite number within bounds.

    Args:
        place: the argument's name, with braces where the value is inserted: ``"Dream(lr={})"``.
        value: the value that was passed.
        whole: whether it must be a whole number.
        optional: whether it may be None.
        least: the value must be at least this.
        above: the value must be greater than this.
        most: the value must be at most this.
        below: the value must be less than this.
        unit: what the number counts, for the error.

    >>> check_number("Dream(lr={})", -0.5, above=0)
    Traceback (most recent call last):
    lbyl.errors.InputError: Dream(lr=-0.5): must lie above 0
    """
    if value is None and optional:
        return
    kind = Integral if whole else Real
    fits = isinstance(value, kind) and not isinstance(value, bool) and (whole or math.isfinite(value))
    if fits:
        number: Any = value
        fits = (least is None or number >= least) and (above is None or number > above)
        fits = fits and (most is None or number <= most) and (below is None or number < below)
    if not fits:
        bounds = [(least, "at least"), (above, "above"), (most, "not above"), (below, "below")]
        told = " and ".join(f"{word} {bound:g}" for bound, word in bounds if bound is not None)
        if least is not None and most is not None:
            told = f"between {least:g} and {most:g}"
        be = "lie" if told and (least is None or most is not None) else "be"
        if whole or not told:
            be = f"be {'a whole' if whole else 'a'} number{' of' if told else ''}"
        finite = " and finite" if isinstance(value, Real) and not whole and not math.isfinite(value) else ""
        must = " ".join(filter(None, (be, told, unit)))
        raise InputError(f"{place.format(repr(value))}: must {must}{finite}{', or None' if optional else ''}")


def check_seed(seed: Any) -> None:
    """Raise InputError unless a value is a whole number of 64 bits."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not -(2**63) <= int(seed) < 2**63:
        raise InputError(f"seed={shortened(repr(seed), 50)}: must be a whole number of 64 bits")


def check_switch(place: str, value: Any, *, optional: bool = False) -> None:
    """Raise InputError unless a value is True or False, or None if ``optional``.

    >>> check_switch("LBYL(center={})", "no")
    Traceback (most recent call last):
    lbyl.errors.InputError: LBYL(center='no'): must be True or False
    """
    if not isinstance(value, bool) and not (optional and value is None):
        raise InputError(f"{place.format(repr(value))}: must be True or False{', or None' if optional else ''}")


def check_module(model: object, name: str = "model") -> None:
    """Raise InputError unless a value is a module; ``name`` is the name of the argument."""
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} is {named_kind(model)}; pass a torch.nn.Module with its weights loaded")


def named_kind(value: object) -> str:
    """The kind of a value as text: "a str", or "the class Linear" for a class."""
    kind = type(value).__name__
    return (
        f"the class {value.__name__}"
        if isinstance(value, type)
        else f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
    )


def as_path(path: Any, name: str = "path") -> Path:
    """The argument as a path.

    Raises:
        InputError: it is neither text nor a path, is empty, or holds a zero byte.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise InputError(f"{name} is {path!r}, {named_kind(path)}; pass the name of a folder")
    if "\0" in str(path):
        raise InputError(f"{name} {str(path)!r} holds a zero byte, which no file name can hold")
    return Path(path)


def is_folder(path: Path) -> bool:
    """Whether there is a folder of this name.

    Raises:
        InputError: the system can't look it up: the name is too long, or is in a folder that may not be looked into.
    """
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InputError(f"{shortened(str(path))} can't be used: {error.strerror or error}") from error
