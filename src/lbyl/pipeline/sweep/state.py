"""The state of a sweep in its folder: `sweep.json` lists what is done, and a lock keeps other processes out."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lbyl.errors import ArtifactError, InputError
from lbyl.io.files import TEMPORARY, clear_unfinished, write_whole, writing
from lbyl.pipeline.sweep.pareto import Point
from lbyl.runtime.documents import check_no_faults, document_text, read_as, read_json

STATE = "sweep.json"
ANALYSIS = "groundwork"
_LOCK = ".lock"
_VERSION = 1
_LONGEST_NAME = 60


@dataclass(frozen=True)
class SweepState:
    """The state of a sweep.

    Attributes:
        fingerprint: the fingerprint of the network, its inputs and the settings.
        points: all points in the order in which they were requested, made or not.
        source: the source of the network.
        evaluate: the name of the user's function.
        unpruned: the value of this function for the unpruned network.
        seconds: the time of the work that all points share, by stage.
    """

    fingerprint: Mapping[str, str | int | bool | None]
    points: tuple[Point, ...] = ()
    source: str | None = None
    evaluate: str | None = None
    unpruned: float | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def having(self, point: Point) -> SweepState:
        """The state in which this point replaces the one of the same name, or is added at the end."""
        names = [known.name for known in self.points]
        if point.name not in names:
            return replace(self, points=(*self.points, point))
        return replace(self, points=tuple(point if known.name == point.name else known for known in self.points))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"version": _VERSION, **dataclasses.asdict(self)}

    def write(self, folder: Path) -> SweepState:
        """Write ``sweep.json``, whole or not at all, and return the state.

        Raises:
            InputError: it can't be written.
        """
        write_whole(folder / STATE, document_text(self.to_dict(), str(folder / STATE), indent=1))
        return self

    @staticmethod
    def read(folder: Path) -> SweepState:
        """Read ``sweep.json``.

        Raises:
            ArtifactError: it is damaged, or of another version.
        """
        file = folder / STATE
        data = read_json(file)
        if not isinstance(data, dict) or "version" not in data:
            raise ArtifactError(f"{file} is damaged: it has no version")
        if data["version"] != _VERSION:
            raise ArtifactError(f"{file}: version {data['version']!r} is unknown; update lbyl")
        state = read_as(SweepState, data, str(file))
        check_no_faults(_faults(state), str(file))
        return state


def _faults(state: SweepState) -> Iterator[tuple[str, str]]:
    """Values of the right type that no sweep of lbyl writes, each with its place."""
    for name, value in (("unpruned", state.unpruned), *((f"seconds.{key}", v) for key, v in state.seconds.items())):
        if value is not None and not math.isfinite(value):
            yield f"expected a finite number, found {value}", f"$.{name}"
    known: set[str] = set()
    for index, point in enumerate(state.points):
        place = f"$.points[{index}]"
        if Path(point.name).name != point.name or point.name.startswith("."):
            yield f"the name {point.name!r} leads out of the folder", f"{place}.name"
        if not point.name.isprintable() or not 0 < len(point.name) <= _LONGEST_NAME:
            yield f"{point.name!r} is not a name of a folder", f"{place}.name"
        if point.name in known:
            yield f"the name {point.name!r} is there twice", f"{place}.name"
        known.add(point.name)
        try:
            point.limit  # noqa: B018
        except (InputError, TypeError) as error:
            yield f"this is not a budget: {error}", f"{place}.budget"
        for name in ("pruned", "error", "accuracy", "seconds"):
            value = getattr(point, name)
            if value is not None and not math.isfinite(value):
                yield f"expected a finite number, found {value}", f"{place}.{name}"
        for name in ("parameters", "macs"):
            if min(getattr(point, name) or (0,)) < 0:
                yield "expected numbers from 0", f"{place}.{name}"


def exists(folder: Path) -> bool:
    """Whether a sweep has begun in the folder.

    Raises:
        InputError: a sweep can't use this folder.
    """
    with writing(folder):
        if (folder / STATE).is_file():
            return True
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise InputError(f"{folder} exists already and is not a folder; choose another place")
        if folder.is_dir() and any(not entry.name.startswith((TEMPORARY, _LOCK)) for entry in folder.iterdir()):
            raise InputError(f"{folder} exists already and does not hold a sweep; choose another folder")
    if not folder.parent.is_dir():
        raise InputError(f"{folder.parent} is not a folder; create it first")
    if not os.access(folder if folder.is_dir() else folder.parent, os.W_OK):
        raise InputError(f"{folder.parent} is not writable; choose another place for {folder.name}")
    return False


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that no other process works in it.

    Raises:
        InputError: another process works in it, or it can't be made.
        ArtifactError: something in it is a link to another place.
    """
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        folder.mkdir(exist_ok=True)
        _check_own(folder)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another process is working in {folder}; wait for it, or choose another folder") from error
    except (OSError, NotImplementedError) as error:  # the latter where the file system knows no locks
        raise InputError(f"can't write {folder}: {getattr(error, 'strerror', None) or error}") from error
    try:
        yield
    finally:
        lock.release()


def _check_own(folder: Path) -> None:
    """Raise ArtifactError if a link would lead outside of the folder."""
    for file in (folder / _LOCK, folder / ANALYSIS, *(folder / ANALYSIS).glob("*")):
        if file.is_symlink():
            raise ArtifactError(f"{file} is a link, which a sweep never makes; remove it, or choose another folder")
    if (folder / _LOCK).exists():
        found = (folder / _LOCK).stat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_size:
            raise ArtifactError(f"{folder / _LOCK} is not the lock of a sweep; remove it, or choose another folder")


def clear(folder: Path, points: Collection[str]) -> None:
    """Remove leftovers of killed processes: temporary files, and unfinished folders of these points."""
    for file in (*folder.glob(f"{TEMPORARY}*"), *(folder / ANALYSIS).rglob(f"{TEMPORARY}*")):
        if not file.is_dir():
            file.unlink(missing_ok=True)
    for entry in folder.glob(".*-*"):
        if entry.name[1:].rpartition("-")[0] in points and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
    clear_unfinished(folder)
