"""The working folder of a compression from folder to folder: finished layers are in it until all of them are done.

It lies beside the folder that is to be written, with a hidden name. A killed run leaves it there, and the same call
goes on with the first layer that is not finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lbyl.errors import ArtifactError, InputError
from lbyl.io.files import TEMPORARY, digest, write_whole, writing
from lbyl.io.report.report import Report
from lbyl.runtime.documents import document_text, read_as, read_json
from lbyl.surgery.plan import Plan

_STATE, _CONTENT, _LOCK = "state.json", "content", "lock"


@dataclass(frozen=True)
class Done:
    """What was done to a layer: its plan and its report; None where the layer was left whole."""

    plan: Plan | None
    report: Report | None


@dataclass(frozen=True)
class _Record:
    """The file of a finished layer."""

    layer: int
    sha256: str
    plan: Any
    report: Any


@dataclass(frozen=True)
class Work:
    """A working folder.

    Attributes:
        place: the folder.
        count: the number of decoder layers.
    """

    place: Path
    count: int

    @property
    def content(self) -> Path:
        """The folder that gets the final name at the end."""
        return self.place / _CONTENT

    def shard(self, number: int) -> Path:
        """The file of some weights: 0 for the embedding, then the layers, then the rest."""
        return self.content / f"model-{number + 1:05d}-of-{self.count + 2:05d}.safetensors"

    def shards(self) -> list[str]:
        """The names of all files of weights."""
        return [self.shard(number).name for number in range(self.count + 2)]

    def done(self, index: int) -> Done | None:
        """What was done to a layer; None if it is not finished, or if its weights are not those that were written."""
        try:
            record = read_as(_Record, read_json(self._record(index)), f"layer {index}")
            if record.layer != index or record.sha256 != digest(self.shard(index + 1)):
                return None
            if record.plan is None:
                return Done(None, None)
            return Done(Plan.from_dict(record.plan), Report.from_dict(record.report))
        except (ArtifactError, OSError):
            return None  # a layer whose files are missing or damaged is made again

    def finish(self, index: int, done: Done) -> None:
        """Say that a layer, whose weights are written, is finished."""
        plan, report = done.plan, done.report
        data = {
            "layer": index,
            "sha256": digest(self.shard(index + 1)),
            "plan": plan and plan.to_document(),
            "report": report and report.to_dict(),
        }
        write_whole(self._record(index), document_text(data, f"layer {index}"))

    def _record(self, index: int) -> Path:
        return self.place / f"layer-{index:05d}.json"


@contextmanager
def working_folder(target: Path, count: int, fingerprint: Mapping[str, Any]) -> Iterator[Work]:
    """The working folder for a target, alone; it stays if the work is not brought to its end.

    Raises:
        InputError: another process works in it, it was begun with other settings, or it can't be written.
    """
    place = target.with_name(f".{target.name}.layers")
    work = Work(place, count)
    with writing(place):
        _check_own(work, target)
        work.content.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another process is writing {target}; wait for it, or choose another name") from error
    except (OSError, NotImplementedError) as error:  # the latter where the file system knows no locks
        raise InputError(f"can't write {place}: {getattr(error, 'strerror', None) or error}") from error
    try:
        _check_begun(place / _STATE, fingerprint, target)
        _clear(work)
        yield work
    except BaseException:
        lock.release()
        if not any(place.glob("layer-*")):  # there is nothing to go on with
            shutil.rmtree(place, ignore_errors=True)
        raise
    lock.release()
    shutil.rmtree(place, ignore_errors=True)


def _check_own(work: Work, target: Path) -> None:
    """Raise InputError if there is something else in the place of the working folder, which would be lost."""
    place = work.place
    for link in (place, work.content):
        if link.is_symlink():
            raise InputError(f"{link} is a link; remove it, or choose another name than {target.name}")
    if not place.exists():
        return
    if not place.is_dir() or (work.content.exists() and not work.content.is_dir()):
        raise InputError(f"{place} is in the way; move it elsewhere, or choose another name than {target.name}")
    own = (_LOCK, _CONTENT)
    others = [file for file in place.iterdir() if file.name not in own and not file.name.startswith(TEMPORARY)]
    others += work.content.iterdir() if work.content.exists() else ()
    if others and not (place / _STATE).is_file():
        raise InputError(
            f"{others[0]} is where the work on {target.name} would be; move it elsewhere, or choose another name than "
            f"{target.name}"
        )


def _clear(work: Work) -> None:
    """Remove what a killed run has not finished: temporary files, and files beside the weights."""
    for file in work.place.glob(f"{TEMPORARY}*"):
        file.unlink(missing_ok=True)
    for file in work.content.iterdir():
        if file.name in work.shards():
            continue
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)


def _check_begun(state: Path, fingerprint: Mapping[str, Any], target: Path) -> None:
    """Raise InputError if the work was begun with other settings; otherwise note the settings."""
    if not state.is_file():
        write_whole(state, document_text(dict(fingerprint), str(state)))
        return
    try:
        then: Any = read_json(state)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; remove {state.parent} to start anew") from error
    differing = [name for name in fingerprint if not isinstance(then, dict) or then.get(name) != fingerprint[name]]
    if differing:
        raise InputError(
            f"{state.parent} holds the beginning of {target} with another {' and '.join(differing)}: repeat the same "
            "command to go on with it, or remove that folder to start anew"
        )
