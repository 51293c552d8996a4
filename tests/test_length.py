"""Functions fit on a screen, or say why they don't."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "lbyl"
MOST = 60
REASON = "# Long:"
"""A comment that begins so, anywhere in a function, says why it is longer."""


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def test_functions_fit_on_a_screen() -> None:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or length(node) <= MOST:
                continue
            if not any(REASON in line for line in lines[node.lineno - 1 : node.end_lineno]):
                found.append(f"{file.relative_to(PACKAGE)}: {node.name}, {length(node)} lines")
    assert not found, f"split them, or write a comment {REASON!r} into them that says why they are long"
