"""CONTRIBUTING names every file of the package, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "lbyl"
TOP = {"__init__.py", "__main__.py", "_public.py", "errors.py", "sources.py", "py.typed"}


def mapped() -> set[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- map -->")[2].partition("<!-- /map -->")[0]
    found = set()
    for room, rows in re.findall(r"### `(\w+)`\n(.*?)(?=\n### |\Z)", shown, re.DOTALL):
        found |= {
            f"{room}/{name}" for name, told in re.findall(r"^\| `([\w/]+)` \| (.+) \|$", rows, re.MULTILINE) if told
        }
    return found


def built() -> set[str]:
    found = set()
    for file in PACKAGE.rglob("*.py"):
        inner = file.relative_to(PACKAGE)
        if len(inner.parts) > 1 and not (file.name == "__init__.py" and len(inner.parts) == 2):
            found.add(f"{inner.parent.as_posix()}/" if file.name == "__init__.py" else inner.with_suffix("").as_posix())
    return found


def test_the_map_is_complete() -> None:
    assert mapped() == built()


def test_nothing_but_the_rooms_lies_at_the_top() -> None:
    here = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert here == TOP | rooms
    assert rooms == {
        "cli",
        "pipeline",
        "budget",
        "io",
        "restore",
        "moments",
        "surgery",
        "selection",
        "graph",
        "runtime",
    }
