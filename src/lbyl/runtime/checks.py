"""Checks of numbers that users pass: one clear error that names the setting, the value and what it may be."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from lbyl.errors import InputError


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
) -> None:
    """Raise InputError unless a value is a finite number within bounds.

    Args:
        place: what it is, with the value in place of braces: ``"Dream(lr={})"``.
        value: what was passed.
        whole: whether it must be a whole number.
        optional: whether it may be None.
        least: it may not be less.
        above: it must be more.
        most: it may not be more.
        below: it must be less.

    >>> check_number("Dream(lr={})", -0.5, above=0)
    Traceback (most recent call last):
    lbyl.errors.InputError: Dream(lr=-0.5): must lie above 0
    """
    if value is None and optional:
        return
    kind = Integral if whole else Real
    fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if fits:
        fits = (least is None or value >= least) and (above is None or value > above)
        fits = fits and (most is None or value <= most) and (below is None or value < below)
    if not fits:
        bounds = [(least, "at least"), (above, "above"), (most, "not above"), (below, "below")]
        told = " and ".join(f"{word} {bound:g}" for bound, word in bounds if bound is not None)
        be = "lie" if told and least is None else "be"
        if whole or not told:
            be = f"be {'a whole' if whole else 'a'} number{' of' if told else ''}"
        raise InputError(f"{place.format(repr(value))}: must {be} {told}".rstrip() + ", or None" * optional)
