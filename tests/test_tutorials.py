"""Every tutorial does what it says: its blocks of Python and of the command line run in order, without downloads."""

from __future__ import annotations

import re
import shlex
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner

from lbyl.cli.app import app

TUTORIALS = sorted((Path(__file__).parent.parent / "docs" / "tutorials").glob("*.md"))
FILES = {
    "edge": {"smaller.onnx", "smaller-int8.onnx"},
    "file": {"smaller/model.onnx", "smaller/report.html"},
    "huggingface": {"smaller-llama/config.json", "pruned-llama/report.html"},
    "researcher": {"comparison.csv", "comparison.svg"},
}
"""What each leaves behind, among other things."""


def no_network(*_: object, **__: object) -> NoReturn:
    raise AssertionError("a tutorial must not connect to anything")


def on_the_command_line(text: str) -> None:
    for command in text.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(command)
        assert program == "lbyl", command
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{command}: {result.output}"


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(tutorial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    names: dict[str, Any] = {"__name__": "tutorial"}
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", tutorial.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert {language for language, _ in blocks} <= {"python", "bash"}
    for language, code in blocks:
        if language == "bash":
            on_the_command_line(code)
        else:
            exec(compile(code, tutorial.name, "exec"), names)
    for file in FILES[tutorial.stem]:
        assert (tmp_path / file).is_file(), file


def test_every_tutorial_is_known() -> None:
    assert {path.stem for path in TUTORIALS} == FILES.keys()
