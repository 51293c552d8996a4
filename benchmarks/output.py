"""One JSON file a benchmark, all of one shape, so that `tables.py` can render any of them."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from provenance import ROOMS, Stamp, current

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
    ``pieced`` together of several runs, it says nothing of how long it took. ``rooms`` are the folders of src/lbyl
    whose code is measured. ``checked`` is the code that was last seen to give the same, and how that was seen.
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
    rooms: Sequence[str] = ROOMS
    checked: dict[str, Any] | None = None
    started: float = field(default_factory=time.perf_counter)

    def join(self, networks: Sequence[str]) -> None:
        """Keep what was measured of these networks, beside what the file holds of others by now."""
        others = [cell for cell in known_cells(self.name) if cell["network"] not in networks]
        self.measurements = [*others, *(cell for cell in self.measurements if cell["network"] in networks)]

    def save(self, tabulate: Callable[[Run], None]) -> Path:
        """Make the tables anew, and write the file."""
        tabulate(self)
        return self.write()

    def write(self) -> Path:
        """Write ``benchmarks/results/NAME.json``. What has no stamp yet was measured by this process."""
        for cell in self.measurements:
            cell.setdefault("code", current().key)
        RESULTS.mkdir(exist_ok=True)
        stamps = {current().key: current().to_dict(), **_read(self.name).get("code", {})}
        used = {cell["code"] for cell in self.measurements}
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
            "rooms": list(self.rooms),
            "code": {key: stamp for key, stamp in stamps.items() if key in used},
            "checked": self.checked,
            "tables": [asdict(table) for table in self.tables],
            "details": [asdict(table) for table in self.details],
            "measurements": self.measurements,
        }
        return _store(self.name, data)


def confirm(name: str, how: str) -> None:
    """Note in a results file that the code as it is now was seen to give the same."""
    data = _read(name)
    data["checked"] = {"how": how, **current().to_dict()}
    _store(name, data)


def measured(name: str) -> list[dict[str, Any]]:
    """Everything that a results file holds, of whatever version."""
    return [{"code": None, **cell} for cell in _read(name).get("measurements", [])]


def known_cells(name: str) -> list[dict[str, Any]]:
    """What an earlier run of a benchmark measured. It outlives releases: stamps and daggers say how old its code is."""
    return [cell for cell in measured(name) if "lbyl" in cell]


def stamps_of(data: dict[str, Any], cells: Sequence[dict[str, Any]]) -> list[Stamp | None]:
    """The code that these cells of a results file were measured with; None where that was not recorded."""
    known = {key: Stamp(**stamp) for key, stamp in data.get("code", {}).items()}
    return [known.get(cell.get("code")) for cell in cells]


def _read(name: str) -> dict[str, Any]:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _store(name: str, data: dict[str, Any]) -> Path:
    """Write it whole: a benchmark that is stopped while it writes must not lose what it had."""
    path = RESULTS / f"{name}.json"
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
    return path
