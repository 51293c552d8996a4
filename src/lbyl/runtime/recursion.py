"""Modules inside modules inside modules: Python's limit of nested calls, raised while a deep model is worked on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch import nn

_SHALLOW = 40
"""Models of so many levels stay far from Python's usual limit."""
_CALLS = 40
"""Nested calls for each level: its module, our hooks around it, torch's own, and copies of all of them."""

_LOCK = Lock()
_LIMITS: list[int] = []


@contextmanager
def deep_calls(model: nn.Module) -> Iterator[None]:
    """Room for the nested calls that a deep model takes. Calls at the same time, in threads, are counted."""
    depth = _depth(model)
    if depth <= _SHALLOW:
        yield
        return
    with _LOCK:
        if not _LIMITS:
            _LIMITS.append(sys.getrecursionlimit())
        _LIMITS.append(_LIMITS[0] + _CALLS * depth)
        sys.setrecursionlimit(max(_LIMITS))
    mine = _LIMITS[0] + _CALLS * depth
    try:
        yield
    finally:
        with _LOCK:
            _LIMITS.remove(mine)
            sys.setrecursionlimit(max(_LIMITS))
            if len(_LIMITS) == 1:
                _LIMITS.clear()


def _depth(model: nn.Module) -> int:
    """The most modules that are inside each other, without recursion."""
    deepest, level, seen = 0, [model], {id(model)}
    while level:
        deepest += 1
        level = [c for module in level for c in module.children() if not (id(c) in seen or seen.add(id(c)))]
    return deepest
