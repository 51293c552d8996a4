"""Raises Python's recursion limit while a deeply nested model is processed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch import nn

_SHALLOW = 40
"""Models with at most this many levels stay far below Python's usual limit."""
_CALLS = 40
"""Nested calls for each level of modules, with hooks and copying."""

_LOCK = Lock()
_LIMITS: list[int] = []


@contextmanager
def deep_calls(model: nn.Module) -> Iterator[None]:
    """Raise the recursion limit for a deep model. Several threads may do so at the same time."""
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
    """The number of nested levels of modules, found without recursion."""
    deepest, level, seen = 0, [model], {id(model)}
    while level:
        deepest += 1
        level = [c for module in level for c in module.children() if not (id(c) in seen or seen.add(id(c)))]
    return deepest
