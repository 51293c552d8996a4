"""What is written: through no link, with the modes of the user's umask, and killed processes leave nothing for good."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from nets import flat_convnet, images, mlp

import lbyl
from lbyl.io.artifact import MANIFEST, WEIGHTS
from lbyl.io.files import stage
from lbyl.runtime.documents import parse_json, read_json, to_json

BUDGETS = [lbyl.Budget(params=0.6)]


def save(folder: Path) -> Path:
    return lbyl.compress(flat_convnet(), images(1, 3, 4, 4), restore="prune", ratio=0.5).save(folder)


def sweep(folder: Path) -> lbyl.Sweep:
    return lbyl.sweep(mlp(6, 16), images(2, 6), BUDGETS, folder, restore="prune")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.posix
@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_modes_follow_the_umask(mask: int, file: int, folder: int, tmp_path: Path) -> None:
    with umask(mask):
        small = save(tmp_path / "small")
        lbyl.export(small, flat_convnet(), format="pt2")
        sweep(tmp_path / "swept")
    for place, _, names in os.walk(tmp_path):
        if place != str(tmp_path):
            assert os.stat(place).st_mode & 0o777 == folder, place
            found = {name: os.stat(f"{place}/{name}").st_mode & 0o777 for name in names if name != ".lock"}
            assert set(found.values()) <= {file}, found


def test_a_link_for_a_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("dear")
    for number, link in enumerate((Path.symlink_to, Path.hardlink_to)):
        folder = tmp_path / str(number)
        folder.mkdir()
        link(folder / ".lock", tmp_path / "letters")
        with pytest.raises(lbyl.ArtifactError, match=r"\.lock is .*choose another folder"):
            sweep(folder)
        assert (tmp_path / "letters").read_text() == "dear"


@pytest.mark.parametrize("name", ["groundwork", "groundwork/0"])
def test_a_link_for_a_folder_of_a_sweep_is_not_followed(name: str, tmp_path: Path) -> None:
    folder, other = tmp_path / "swept", tmp_path / "other"
    sweep(folder)
    other.mkdir()
    (other / ".tmp-mine").touch()
    os.rename(folder / name, tmp_path / "away")
    (folder / name).symlink_to(other)
    with pytest.raises(lbyl.ArtifactError, match="is a link"):
        lbyl.sweep(mlp(6, 16), images(2, 6), [lbyl.Budget(params=0.7)], folder, restore="prune")
    assert [entry.name for entry in other.iterdir()] == [".tmp-mine"]


@pytest.mark.parametrize("name", ["README.md", "sweep.json"])
def test_a_link_for_a_file_of_a_sweep_is_replaced(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "swept"
    sweep(folder)
    os.rename(folder / name, tmp_path / "mine")
    before = (tmp_path / "mine").read_bytes()
    (folder / name).symlink_to(tmp_path / "mine")
    lbyl.sweep(mlp(6, 16), images(2, 6), [lbyl.Budget(params=0.7)], folder, restore="prune")
    assert (tmp_path / "mine").read_bytes() == before


def test_a_link_for_an_export_is_replaced(tmp_path: Path) -> None:
    small = save(tmp_path / "small")
    (tmp_path / "mine").write_text("dear")
    (small / "model.pt2").symlink_to(tmp_path / "mine")
    lbyl.export(small, flat_convnet(), format="pt2")
    assert (tmp_path / "mine").read_text() == "dear"


@pytest.mark.posix
@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_file_that_can_t_be_read(name: str, tmp_path: Path) -> None:
    small = save(tmp_path / "small")
    (small / name).unlink()
    (small / name).symlink_to("/proc/self/mem")  # the first byte gives EIO
    with pytest.raises(lbyl.ArtifactError, match=rf"{name} can't be read: Input/output error"):
        lbyl.load(small, flat_convnet())
    with pytest.raises(lbyl.ArtifactError, match="can't be read: File name too long"):
        lbyl.load(tmp_path / ("a" * 300), flat_convnet())


def killed_while_staging(target: Path) -> None:
    child = os.fork()
    if child == 0:
        with stage(target) as folder:
            (folder / "half").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def left(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".") and entry.name != ".lock"]


RUNS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "save": (lambda place: save(place / "small"), "small"),
    "save of another name": (lambda place: save(place / "small"), "other"),
    "export": (lambda place: lbyl.export(save(place / "small"), flat_convnet(), format="pt2"), "small/model.pt2"),
    "sweep": (lambda place: sweep(place / "swept"), "swept/params-0.6"),
}


@pytest.mark.posix
@pytest.mark.parametrize("run", RUNS)
def test_the_next_run_removes_what_a_killed_one_left(run: str, tmp_path: Path) -> None:
    call, target = RUNS[run]
    killed = tmp_path / target
    if run == "export":
        save(tmp_path / "small")
    if run == "sweep":
        sweep(tmp_path / "swept")
    killed_while_staging(killed)
    assert left(killed.parent)
    if run == "export":
        lbyl.export(tmp_path / "small", flat_convnet(), format="pt2")
    else:
        call(tmp_path)
    assert not left(killed.parent)


def test_what_another_process_is_writing_stays_and_so_do_foreign_folders(tmp_path: Path) -> None:
    foreign = [tmp_path / name for name in (".git-abcdefgh", ".cache-abcdefgh.lbyl.d", ".lbyl")]
    for folder in foreign:
        folder.mkdir()
    with stage(tmp_path / "other") as folder:
        save(tmp_path / "small")
        assert folder.is_dir()
    assert all(folder.is_dir() for folder in foreign)
    assert not folder.exists()


DOCUMENTS: dict[str, tuple[bytes, str]] = {
    "many lists": (b"[" + b"[]," * 2_000_000 + b"[]]", "more than 1,000,000 values"),
    "large": (b" " * (9 * 2**20), "larger than 8 MiB"),
    "deep": (b"[" * 40 + b"]" * 40, "more than 32 nested levels"),
    "very deep": (b"[" * 100_000, "damaged"),
    "lone surrogate": (b'{"a": ["\\ud800"]}', r"not valid Unicode - at `\$.a\[0\]`"),
    "surrogate in a name": (b'{"\\ud800": 1}', "not valid Unicode"),
    "long number": (b'{"a": 1' + b"0" * 400 + b"}", r"64 bits - at `\$.a`"),
    "longer number": (b"1" + b"0" * 5000, "damaged"),
    "no text": (b"\xff\xfe", "damaged"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_have_bounds(name: str) -> None:
    content, message = DOCUMENTS[name]
    with pytest.raises(lbyl.ArtifactError, match=message):
        parse_json(content, "it")


def test_json_for_programs_holds_no_nan() -> None:
    assert to_json({"a": (1.5, float("nan"), [float("-inf")]), "b": 1}) == '{"a": [1.5, null, [null]], "b": 1}'


@pytest.mark.posix
def test_an_endless_file_is_read_to_the_bound_only() -> None:
    with pytest.raises(lbyl.ArtifactError, match="larger than"):
        read_json(Path("/dev/zero"))
