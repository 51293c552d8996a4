"""The interface of export formats, and the traced program that they write."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lbyl.io.export.inputs import has_batch
from lbyl.io.quiet import quiet
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.inputs import ExampleInputs

Run = Callable[[ExampleInputs], list[Tensor]]
"""Runs a written file on inputs."""


class Format(Protocol):
    """An export format.

    A class with these members can be added by :func:`lbyl.register` under "format"; it is made without arguments.

    Attributes:
        name: its short name, which is also the suffix of its files.
        runtime: the name of the runtime that checks the written file.
    """

    name: str
    runtime: str

    def check_available(self) -> None:
        """Raise InputError if a package is missing."""
        ...

    def write(self, traced: TracedProgram, file: Path) -> None:
        """Write a program. The file must hold neither the user's data nor names of files on this machine."""
        ...

    def open(self, file: Path) -> Run:
        """Load a written file, and return a function that runs it."""
        ...


@runtime_checkable
class FolderFormat(Protocol):
    """An export format that is written from the files of a folder, without building or running the network.

    Attributes:
        name: its short name, which is also the suffix of its files.
        runtime: the name of what reads the written file to check it.
    """

    name: str
    runtime: str

    def check_available(self) -> None:
        """Raise InputError if a package is missing."""
        ...

    def write_folder(self, folder: Path, file: Path) -> str:
        """Write a folder's model into a file and compare their tensors; returns a note for the user, or ""."""
        ...


@dataclass(frozen=True)
class TracedProgram:
    """A traced program, and its dynamic axes (None if all are fixed)."""

    program: Any
    shapes: dict[str, Any] | None


class Refused(Exception):
    """The error of PyTorch or a runtime, in one line."""

    def __init__(self, doing: str, error: Exception) -> None:
        lines = [line.strip(" -") for line in str(error).strip().splitlines() if line.strip(" -")]
        # The first line only says that a constraint is violated; the second one says which, and how.
        if len(lines) > 1 and lines[0].startswith("Constraints violated"):
            lines = lines[1:]
        super().__init__(f"{doing}: {lines[0].split('. ')[0] if lines else type(error).__name__}")


def trace(model: nn.Module, inputs: ExampleInputs, batch: int | None = None) -> TracedProgram:
    """Trace a network with ``torch.export``.

    Args:
        model: the network.
        inputs: the inputs on which it is traced.
        batch: batch size of the inputs; first axes of this size become dynamic. None fixes all sizes.

    Raises:
        Refused: ``torch.export`` can't trace it.
    """
    shapes, doing = None, "torch.export can't trace it"
    if batch is not None:
        axis = torch.export.Dim("batch", min=1)
        args, kwargs = pytree.tree_map(
            lambda leaf: {0: axis} if isinstance(leaf, Tensor) and has_batch(leaf, batch) else None,
            (inputs.args, dict(inputs.kwargs)),
        )
        shapes = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
        doing += " for every batch size"
    try:
        with undisturbed(model), quiet(), torch.no_grad():
            program: Any = torch.export.export(
                model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise Refused(doing, error) from error
    return TracedProgram(program, shapes)


def write(format: Format, traced: TracedProgram, file: Path) -> Run:
    """Write a program in a format, and return a function that runs the written file.

    Raises:
        Refused: the format can't hold the program, or its runtime can't load the file.
        OSError: the file can't be written, for example because the disk is full.
    """
    file.unlink(missing_ok=True)
    try:
        with quiet(), torch.no_grad():
            format.write(traced, file)
    except OSError:
        raise
    except Exception as error:
        # The exporter's own error is a page of advice around the cause.
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise Refused(f"it can't be written as {format.name}", cause) from error
    try:
        with quiet():
            return format.open(file)
    except Exception as error:
        raise Refused(f"{format.runtime} can't load it", error) from error
