"""Rules: one small function for each operation, which says how channels pass through it.

To support an operation, write a function ``(builder, node, args, kwargs) -> value`` in one of these files
and decorate it with ``@rule("aten_name", ...)``. Nothing else has to change. ``args`` holds shadows (integer
tensors of channel ids), :class:`ParameterRef` for parameters, and plain Python values.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import fx

from lbyl.graph.builder import Builder

Rule = Callable[[Builder, fx.Node, tuple[Any, ...], dict[str, Any]], Any]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function for these ATen operations, by their names without overload and trailing underscore."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in _RULES:
                raise ValueError(f"two rules for {name}")
            _RULES[name] = function
        return function

    return register


def find_rule(name: str) -> Rule | None:
    """The rule for an operation; an in-place variant shares the rule of the plain one."""
    return _RULES.get(name) or (_RULES.get(name[:-1]) if name.endswith("_") else None)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
