"""Results know the code that they were measured with."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from provenance import Stamp, age, changed, digest_of  # pyright: ignore

CODE = 'def f(x):\n    """Says what it does."""\n    return x + 1\n'


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('def f(x):\n    """Other words."""\n    # why\n    return (x\n            + 1)\n', True),
        ("def f(x):\n    return x + 1\n", True),
        ("def f(x):\n    return x + 2\n", False),
        ("def f(x, y=None):\n    return x + 1\n", False),
        ("def g(x):\n    return x + 1\n", False),
    ],
)
def test_only_code_counts(text: str, same: bool) -> None:
    assert (digest_of({"a.py": text}) == digest_of({"a.py": CODE})) is same
    assert digest_of({"b.py": CODE}) != digest_of({"a.py": CODE})


def test_what_is_older_says_so() -> None:
    rooms = ("graph", "surgery")
    then = Stamp("1a2b3c", "2026-01-02", {"graph": "a", "surgery": "b", "cli": "c"})
    now = Stamp("4d5e6f", "2026-03-04", {"graph": "a", "surgery": "x", "cli": "y"})
    assert changed(then, now, rooms) == ["surgery"]
    assert age([now, replace(now, commit=None)], now, rooms) is None
    assert age([then, now], now, rooms) == (
        "Older than the code: measured on 2026-01-02 (1a2b3c); since then code in surgery has changed."
    )
    assert "before the code was recorded" in str(age([None], now, rooms))
