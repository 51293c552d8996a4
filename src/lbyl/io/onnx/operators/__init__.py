"""ONNX operators: one small function for each turns a node into PyTorch functions or modules."""

from __future__ import annotations

import importlib
import pkgutil

from lbyl.io.onnx.operators.base import OPERATORS, Build


def find_operator(name: str) -> Build | None:
    """The function that reads nodes of this operator; None if there is none."""
    _load()
    return OPERATORS.get(name)


def operator_names() -> list[str]:
    """The names of all operators that can be read."""
    _load()
    return sorted(OPERATORS)


def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
