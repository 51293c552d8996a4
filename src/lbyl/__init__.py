"""lbyl: structured pruning of trained networks, restored in closed form. No data, no retraining."""

from __future__ import annotations

import importlib
import random
from typing import TYPE_CHECKING, Any

from lbyl._public import HOME

if TYPE_CHECKING:
    from lbyl._public import *  # noqa: F403

__all__ = sorted(HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from lbyl.runtime.version import library_version

        return library_version()
    if name not in HOME:
        raise AttributeError(f"module 'lbyl' has no attribute {name!r}")
    state = random.getstate()
    try:
        value = getattr(importlib.import_module(HOME[name]), name)
    finally:
        random.setstate(state)  # some packages draw random numbers when they are imported
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
