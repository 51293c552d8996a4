"""Operators of ONNX, one small function each: what PyTorch makes of a node."""

from __future__ import annotations

import importlib
import pkgutil

from lbyl.io.onnx.operators.base import OPERATORS, Build


def find_operator(name: str) -> Build | None:
    """What makes a step of a node with this operator; None where there is nothing."""
    _load()
    return OPERATORS.get(name)


def operator_names() -> list[str]:
    """The operators that are read, by name."""
    _load()
    return sorted(OPERATORS)


def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
