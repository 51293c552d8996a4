"""The command line where terminals, streams and folders are not as they should be: no traceback, nothing is lost."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = pytest.mark.posix

LBYL = f"{shlex.quote(sys.executable)} -m lbyl"
SAVED = Path(__file__).with_name("saved_0_1_0") / "own"
SHOW = f"{LBYL} show {shlex.quote(str(SAVED))}"


HIDDEN = ("COLUMNS", "PYTHONIOENCODING", "PYTHONUNBUFFERED")
"""Variables that change what commands write, and that few users set."""


@dataclass(frozen=True)
class Row:
    """A command of the shell, what it must end with, and what must be said."""

    name: str
    command: str
    code: int = 0
    out: str = ""
    err: str = ""
    env: dict[str, str] = field(default_factory=dict)


NO_ROOM = "error: can't write the output: No space left on device\n"
ROWS = [
    Row("no columns", f"{SHOW}", out=" -> ", env={"COLUMNS": "0", "PYTHONIOENCODING": "ascii"}),
    Row("columns in words", f"{LBYL} --help", out="compress", env={"COLUMNS": "many"}),
    Row("one column", f"{LBYL} compress --help", out="--output", env={"COLUMNS": "1"}),
    Row("Latin 1", f"{LBYL} compress --help", out="--output", env={"PYTHONIOENCODING": "latin-1"}),
    Row("closed stdout", f"{SHOW} >&-"),
    Row("all closed", f"{LBYL} --help >&- 2>&- <&-"),
    Row("closed stderr and an error", f"{LBYL} show 2>&-", code=2),
    Row("full stdout", f"{LBYL} --help > /dev/full", code=1, err=NO_ROOM),
    Row("full stdout for JSON", f"{SHOW} --json -q > /dev/full", code=1, err=NO_ROOM),
    Row("full stderr and an error", f"{LBYL} show 2> /dev/full", code=1),
    Row("a reader that has seen enough", f"{LBYL} compress --help | head -n 1"),
    Row(
        "no working folder",
        f"mkdir gone && cd gone && rmdir ../gone && {SHOW}",
        code=1,
        err="working folder no longer exists",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_output(row: Row, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in HIDDEN} | row.env
    found = subprocess.run(["sh", "-c", row.command], cwd=tmp_path, env=env, capture_output=True, check=False)
    said = found.stderr.decode()
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert found.returncode == row.code, said
    assert row.out in found.stdout.decode(row.env.get("PYTHONIOENCODING", "utf-8"))
    assert row.err in said
    assert len(said.splitlines()) <= 1


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM")],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_signal_ends_in_one_line(number: signal.Signals, code: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("import time\ndef slow():\n    open('begun', 'w').close()\n    time.sleep(60)\n")
    command = [sys.executable, "-m", "lbyl", "inspect", "net.py:slow", "--quiet"]
    child = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # Shells let what they start in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "begun").exists():
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(number)
    assert child.communicate()[1] == f"{says}\n"
    assert child.returncode == code
