"""Files and folders that are there whole or not at all, whenever the process is killed.

Nothing is written through a link, and every file gets the mode that the user's umask gives to new files.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from safetensors.torch import save
from torch import Tensor

from lbyl.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: there, what a killed process has left behind stays
    fcntl = None

TEMPORARY = ".tmp-"
"""How names of unfinished files begin."""

_UNFINISHED = ".lbyl"
"""How names of unfinished folders end."""


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

    What has not been renamed at the end is removed, also after an error. What killed processes have left beside the
    target is removed at the beginning: they no longer hold the lock of their folder. Files written here reach the
    disk, and get their modes, only by :func:`finish`.

    Raises:
        InputError: the folder can't be made, or something in it can't be written.
    """
    with writing(target):
        clear_unfinished(target.parent)
        folder, lock = _new_folder(target)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            found.update(chunk)
    return found.hexdigest()


def clear_unfinished(place: Path) -> None:
    """Remove unfinished folders of processes that are no longer alive."""
    for folder in place.glob(f".*{_UNFINISHED}"):
        lock = _locked(folder) if re.search(r"-\w{8}\.lbyl$", folder.name) else None
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _new_folder(target: Path) -> tuple[Path, int | None]:
    """A temporary folder beside the target, and its open lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=_UNFINISHED, dir=target.parent))
        lock = _locked(folder, wait=True)
        if folder.is_dir():  # before it was locked, another process may have taken it for a dead one's
            return folder, lock
        if lock is not None:
            os.close(lock)


def _locked(folder: Path, wait: bool = False) -> int | None:
    """The open lock of a folder, which the end of the process gives free; None where it can't be had."""
    if fcntl is None:
        return None
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return handle
        except OSError:
            os.close(handle)
    return None


def finish(folder: Path) -> None:
    """Wait until all that was written in a folder is on the disk, and give it the modes of new files."""
    mode = _usual_mode(folder)
    for file in folder.iterdir():
        file.chmod(mode)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    folder.chmod(mode | (mode & 0o444) >> 2)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a temporary file beside the file, then rename it. A link of that name is replaced, not followed.

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
            os.chmod(name, _usual_mode(file.parent))
            os.replace(name, file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _usual_mode(folder: Path) -> int:
    """The mode that a new file in a folder gets. Asking for the umask would change it for other threads."""
    name = folder / f"{TEMPORARY}{token_hex(8)}"
    handle = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)
        name.unlink()


def write_tensors(file: Path, tensors: Mapping[str, Tensor], note: str) -> None:
    """Write tensors as safetensors, with a note of text (JSON, say) in the same file.

    Raises:
        InputError: it can't be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(file, save(plain, {"lbyl": note}))


def files_in(folder: Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """All files in a folder and the folders in it whose names end so, sorted by name; hidden ones are left out.

    Raises:
        InputError: no such folder, or no such file in it; ``what`` is what the errors call them.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of {what}s")
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in suffixes and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise InputError(f"no {what} in {folder} or the folders in it; looked for {', '.join(suffixes)}")
    return files
