"""Files and folders that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from lbyl.errors import InputError

TEMPORARY = ".tmp-"
"""How names of unfinished files begin."""


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Errors of the operating system become an InputError that names what was to be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror or error}") from error


@contextmanager
def stage(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, for files that are written and then renamed.

    What has not been renamed at the end is removed, also after an error. A file written here reaches the disk
    only by :func:`flush`.

    Raises:
        InputError: the folder can't be made, or something in it can't be written.
    """
    with writing(target):
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a temporary file beside the file, then rename it.

    Raises:
        InputError: it can't be written.
    """
    with writing(file):
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def flush(file: Path) -> None:
    """Wait until a written file is on the disk, so that it is whole when it gets its name."""
    with file.open("r+b") as stream:
        os.fsync(stream.fileno())


def write_tensors(file: Path, tensors: Mapping[str, Tensor], note: str) -> None:
    """Write tensors as safetensors, with a note of text (JSON, say) in the same file.

    Raises:
        InputError: it can't be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(file, save(plain, {"lbyl": note}))
