"""Writes files and folders completely or not at all, even if the process is killed.

Symbolic links are never written through, and every file gets the mode that the user's umask gives to new files.
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
except ImportError:  # on Windows, leftovers of killed processes are not removed
    fcntl = None

TEMPORARY = ".tmp-"
"""Prefix of the names of unfinished files."""

_UNFINISHED = ".lbyl"
"""Suffix of the names of unfinished folders."""


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn errors of the operating system into an InputError that names the file to be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror or error}") from error


@contextmanager
def stage(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, for files that are written there and then renamed.

    At the end, also after an error, the folder and all files left in it are removed. At the beginning, temporary
    folders of killed processes are removed, which no longer hold the lock of their folder. Call :func:`finish` before
    renaming, to flush files to the disk and give them their modes.

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
        if folder.is_dir():  # another process may have removed it before it was locked
            return folder, lock
        if lock is not None:
            os.close(lock)


def _locked(folder: Path, wait: bool = False) -> int | None:
    """The open lock of a folder, which is released when the process ends; None if another process holds it."""
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
    """Wait until all files in a folder are on the disk, and give them the modes of new files."""
    mode = _usual_mode(folder)
    for file in folder.iterdir():
        file.chmod(mode)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    folder.chmod(mode | (mode & 0o444) >> 2)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file completely or not at all, through a temporary file. A link of that name is replaced, not followed.

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
    """The mode that a new file in a folder gets, found by making one: reading the umask would affect other threads."""
    name = folder / f"{TEMPORARY}{token_hex(8)}"
    handle = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)
        name.unlink()


def write_tensors(file: Path, tensors: Mapping[str, Tensor], note: str) -> None:
    """Write tensors as safetensors, with a text (such as JSON) in the same file.

    Raises:
        InputError: it can't be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(file, save(plain, {"lbyl": note}))


def files_in(folder: Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """All files with one of these suffixes in a folder and its subfolders, sorted by name, without hidden ones.

    Raises:
        InputError: there is no such folder, or no such file in it; the errors call the files ``what``.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of {what}s")
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in suffixes and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise InputError(f"no {what} in {folder} or its subfolders; looked for {', '.join(suffixes)}")
    return files
