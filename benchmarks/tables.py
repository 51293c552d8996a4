"""Turn every JSON file in benchmarks/results/ into docs/results.md, docs/*.svg and the blocks of README.md.

    python benchmarks/tables.py

A block of README.md lies between ``<!-- results:NAME -->`` and ``<!-- /results -->``, NAME being that of a
JSON file; without such a block README.md is left alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from output import RESULTS
from plots import CAPTIONS, draw

ROOT = Path(__file__).parent.parent
# The paper's story first; whatever else there is follows by name.
ORDER = ("paper", "accuracy", "speed")


def cell(value: Any) -> str:
    """How a value is written."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(data: dict[str, Any]) -> str:
    """One table in Markdown, with its title above and its note below."""
    rows = [list(map(str, data["columns"])), *([cell(value) for value in row] for row in data["rows"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        first = row[0].ljust(widths[0])
        rest = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if not i else ":") for i, w in enumerate(widths)) + "|"
    parts = [f"**{data['title']}**", "\n".join([line(rows[0]), rule, *map(line, rows[1:])])]
    return "\n\n".join([*parts, data["note"]] if data["note"] else parts)


def benchmark(data: dict[str, Any]) -> str:
    """All tables of one benchmark."""
    return "\n\n".join(map(table, data["tables"]))


def page(results: dict[str, dict[str, Any]]) -> str:
    """docs/results.md."""
    parts = ["# Results", "Written by `python benchmarks/tables.py`; do not edit by hand."]
    for data in results.values():
        took = "cell by cell" if data["seconds"] is None else f"in {data['seconds']:,.0f} s when it last ran"
        made = (
            f"Measured by `{data['command']}` {took}, with lbyl {data['lbyl']}, torch {data['torch']}, "
            f"{data['threads']} thread{'s' * (data['threads'] != 1)}."
        )
        plots = [f"![{caption}]({name}.svg)" for name, caption in data.get("plots", {}).items()]
        parts += [f"## {data['title']}", *plots, benchmark(data), *map(table, data.get("details", ())), made]
    return "\n\n".join(parts) + "\n"


def coverage(data: dict[str, Any]) -> str:
    """docs/coverage.md."""
    parts = [
        "# Architectures",
        "Written by `python benchmarks/tables.py` from `benchmarks/results/coverage.json`; do not edit by hand.",
        data["about"],
        *map(table, data["details"]),
        *map(table, data["tables"]),
        *(f"## {title}\n\n{text}" for title, text in data["sections"].items()),
        f"`{data['command']}` with lbyl {data['lbyl']}, torch {data['torch']}, one thread a cell.",
    ]
    return "\n\n".join(parts) + "\n"


def fill(text: str, results: dict[str, dict[str, Any]]) -> str:
    """Replace what stands in the blocks."""

    def block(match: re.Match[str]) -> str:
        data = results.get(match[2])
        return f"{match[1]}\n{benchmark(data)}\n{match[3]}" if data else match[0]

    return re.sub(r"(<!-- results:(\w+) -->).*?(<!-- /results -->)", block, text, flags=re.DOTALL)


def main() -> None:
    """Read, render, write."""
    files = {path.stem: path for path in sorted(RESULTS.glob("*.json"))}
    names = [*(name for name in ORDER if name in files), *(name for name in files if name not in ORDER)]
    results = {name: json.loads(files[name].read_text(encoding="utf-8")) for name in names}
    (ROOT / "docs").mkdir(exist_ok=True)
    if "accuracy" in results:
        draw(results["accuracy"]["measurements"], results["accuracy"]["settings"]["networks"], ROOT / "docs")
        results["accuracy"]["plots"] = CAPTIONS
    covered = results.pop("coverage", None)
    if covered:
        (ROOT / "docs" / "coverage.md").write_text(coverage(covered), encoding="utf-8")
    (ROOT / "docs" / "results.md").write_text(page(results), encoding="utf-8")
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    # All 79 rows would bury the README; the totals do.
    new = fill(old, results | ({"coverage": {**covered, "tables": covered["details"]}} if covered else {}))
    if new != old:
        readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
