"""Writes files and folders completely or not at all, even if the process is killed.

Symbolic links are never written through, and every file gets the mode that the user's umask gives to new files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from filelock import BaseFileLock, FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from lbyl.errors import InputError

TEMPORARY = ".tmp-"
"""Prefix of the names of unfinished files."""

_UNFINISHED = ".lbyl"
"""Suffix of the names of unfinished folders."""
_LOCK = "lock"
"""Name of the file in an unfinished folder that is locked while its process is alive."""


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn errors of the operating system into an InputError that names the file to be written."""
    try:
        yield
    except OSError as error:
        why = "it exists by now: something else has made it" if error.errno in _THERE else error.strerror or error
        raise InputError(f"can't write {target}: {why}") from error


_THERE = (errno.EEXIST, errno.ENOTEMPTY)


@contextmanager
def stage(target: Path) -> Iterator[Path]:
    """A temporary folder near the target, for files that are written there and then renamed.

    It lies in a folder beside the target that also holds a lock. At the end, also after an error, both folders and all
    files left in them are removed. At the beginning, temporary folders of killed processes are removed, whose locks the
    operating system has released. Call :func:`finish` before renaming, to flush files to the disk and give them their
    modes.

    Raises:
        InputError: the folder can't be made, or something in it can't be written.
    """
    with writing(target):
        clear_unfinished(target.parent)
        place, lock = _new_place(target)
        try:
            # The lock stays outside of the folder, because Windows does not rename folders with open files.
            folder = place / "content"
            folder.mkdir()
            yield folder
        finally:
            if lock is not None:
                lock.release()
            shutil.rmtree(place, ignore_errors=True)


def digest(*files: Path) -> str:
    """The SHA-256 of a file, or of several files one after the other."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                found.update(chunk)
    return found.hexdigest()


def clear_unfinished(place: Path) -> None:
    """Remove unfinished folders of processes that are no longer alive."""
    for folder in place.glob(f".*{_UNFINISHED}"):
        if not re.search(r"-\w{8}\.lbyl$", folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        lock = _locked(folder, wait=False)
        if lock is not None:
            # Windows removes no open file, so the lock is released first. It is held by nobody who is alive.
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)


def _new_place(target: Path) -> tuple[Path, BaseFileLock | None]:
    """A temporary folder beside the target, and its lock; None where the file system knows no locks."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=_UNFINISHED, dir=target.parent))
        lock = _locked(place, wait=True)
        if lock is None or (place / _LOCK).exists():  # another process may have removed it before it was locked
            return place, lock
        lock.release()


def _locked(place: Path, wait: bool) -> BaseFileLock | None:
    """The lock of a temporary folder, which ends with its process; None if another process holds it, or without one."""
    lock = FileLock(place / _LOCK)
    try:
        lock.acquire(blocking=wait)
    except (Timeout, OSError, NotImplementedError):  # the last one where the file system knows no locks
        return None
    return lock


def finish(folder: Path) -> None:
    """Wait until all files in a folder and its subfolders are on the disk, and give them the modes of new files."""
    mode = _usual_mode(folder)
    for file in folder.iterdir():
        if file.is_dir():
            finish(file)
            continue
        file.chmod(mode)
        with file.open("r+b") as stream:  # Windows only flushes files that are open for writing
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


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder with these files, whole or not at all.

    Raises:
        InputError: it can't be written.
    """
    with stage(target) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        finish(folder)
        folder.rename(target)


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


def _is_hidden(path: Path) -> bool:
    """Whether a file or a folder that it is in has a name that starts with a dot."""
    return any(part.startswith(".") for part in path.parts)


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
        if file.suffix.lower() in suffixes and not _is_hidden(file.relative_to(folder)) and file.is_file()
    )
    if not files:
        raise InputError(f"no {what} in {folder} or its subfolders; looked for {', '.join(suffixes)}")
    return files
