"""One JSON file a benchmark, all of one shape, so that `tables.py` can render any of them."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table of measurements; ``None`` marks what was not measured or not published."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass
class Run:
    """Everything that one run of a benchmark found out.

    ``details`` are tables for docs/ alone; ``about`` and ``sections`` (title: text) are prose made of measurements.
    ``pieced`` together of several runs, it says nothing of how long it took.
    """

    name: str
    title: str
    command: str
    settings: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    details: list[Table] = field(default_factory=list)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    about: str = ""
    sections: dict[str, str] = field(default_factory=dict)
    pieced: bool = False
    started: float = field(default_factory=time.perf_counter)

    def join(self, networks: Sequence[str]) -> None:
        """Keep what was measured of these networks, beside what the file holds of others by now."""
        others = [cell for cell in known_cells(self.name) if cell["network"] not in networks]
        self.measurements = [*others, *(cell for cell in self.measurements if cell["network"] in networks)]

    def write(self) -> Path:
        """Write ``benchmarks/results/NAME.json``."""
        RESULTS.mkdir(exist_ok=True)
        data = {
            "title": self.title,
            "command": self.command,
            "lbyl": version("lbyl"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "seconds": None if self.pieced else round(time.perf_counter() - self.started, 1),
            "settings": self.settings,
            "about": self.about,
            "sections": self.sections,
            "tables": [asdict(table) for table in self.tables],
            "details": [asdict(table) for table in self.details],
            "measurements": self.measurements,
        }
        path = RESULTS / f"{self.name}.json"
        # A benchmark that is stopped while it writes must not lose what it had.
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)
        return path


def known_cells(name: str) -> list[dict[str, Any]]:
    """What an earlier run of a benchmark measured with this version of lbyl."""
    file, current = RESULTS / f"{name}.json", version("lbyl")
    cells = json.loads(file.read_text(encoding="utf-8"))["measurements"] if file.is_file() else []
    return [cell for cell in cells if cell["lbyl"] == current]
