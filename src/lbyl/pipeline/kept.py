"""Keeps the analysis of a network in a folder, so that it can be cut to another size in little time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lbyl.errors import ArtifactError, InputError
from lbyl.io.files import clear_unfinished, write_whole
from lbyl.pipeline.analysis import Analysis
from lbyl.pipeline.prepare import Prepared
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Inputs
from lbyl.pipeline.sweep.fingerprint import check_same, fingerprint
from lbyl.pipeline.sweep.ground import Network
from lbyl.pipeline.sweep.state import occupied
from lbyl.runtime.checks import as_path, is_folder
from lbyl.runtime.documents import document_text, read_as, read_json
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Clock

FINGERPRINT = "analysis.json"
_VERSION = 1


@dataclass(frozen=True)
class _Kept:
    """What ``analysis.json`` holds: what the analysis depends on."""

    fingerprint: Mapping[str, str | int | bool | None]


@contextmanager
def kept_analysis(
    model: nn.Module,
    example_inputs: Inputs,
    request: CompressionRequest,
    submodule: str | None,
    place: str | os.PathLike[str],
    clock: Clock,
) -> Iterator[tuple[Prepared, dict[str, Analysis]]]:
    """The prepared network and its analysis, which is read from a folder, or made and kept there.

    The folder is locked meanwhile.

    Raises:
        InputError: the folder holds something else, or the analysis of another network or of other settings; or the
            moments are of the user's data, which is never written to disk.
        ArtifactError: a file in it is damaged.
    """
    folder, inputs = as_path(place), ExampleInputs.of(example_inputs)
    if request.restore is not None and request.restore.keeps_inputs_private:
        raise InputError("analysis: your data is never written to disk; leave out analysis, or make a sweep")
    now = fingerprint(model, inputs, request, submodule)
    begun = _begun(folder)
    if begun:
        check_same(_read(folder).fingerprint, now, str(folder), "the analysis of another network")
    network = Network(model, inputs, request, submodule, clock)
    if not begun and not network.cuttable:
        raise InputError("the model has no part with groups that can be cut; lbyl.inspect lists them")
    with occupied(folder):
        _check_links(folder)
        clear_unfinished(folder)
        if not begun:
            text = document_text({"version": _VERSION, "fingerprint": now}, str(folder / FINGERPRINT), indent=1)
            write_whole(folder / FINGERPRINT, text)
        yield network.prepared, network.ground(folder, now)


def _check_links(folder: Path) -> None:
    """Raise ArtifactError if a link would lead outside of the folder."""
    for file in folder.rglob("*"):
        if file.is_symlink():
            raise ArtifactError(f"{file} is a link, which an analysis never holds; remove it, or choose a new folder")


def _begun(folder: Path) -> bool:
    """Whether the folder holds an analysis.

    Raises:
        InputError: it holds something else, or can't be made.
    """
    if is_folder(folder) and (folder / FINGERPRINT).is_file():
        return True
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"analysis: {folder} is not a folder; choose another place")
    if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise InputError(f"analysis: {folder} holds something else; choose a new folder")
    if not folder.parent.is_dir():
        raise InputError(f"analysis: {folder.parent} is not a folder; create it first")
    return False


def _read(folder: Path) -> _Kept:
    file = folder / FINGERPRINT
    try:
        data: Any = read_json(file)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; remove {folder}, and it will be made again") from error
    if not isinstance(data, dict) or data.get("version") != _VERSION:
        raise ArtifactError(f"{file}: this is no analysis that this version of lbyl reads; remove the folder")
    return read_as(_Kept, data, str(file))
