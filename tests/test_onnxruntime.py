"""Latency in onnxruntime, where networks are deployed: of two networks, and as a budget."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from nets import images, mlp
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app

X = images(1, 6)


def test_two_networks_are_timed_as_files() -> None:
    net = mlp(6, 64, 64)
    smaller = lbyl.compress(net, X, ratio=0.5, restore="prune", forecast=False).model
    found = lbyl.bench(smaller, X, against=net, runs=3, runtime="onnxruntime")
    assert found.whole.before
    assert found.whole.macs[1] < found.whole.macs[0]
    assert found.layers == ()
    assert "cpu in onnxruntime with 1 thread" in found.summary()[1]


def test_a_budget_of_latency_is_measured_there() -> None:
    budget = lbyl.Budget(latency=0.7, runtime="onnxruntime", round_to=8)
    net, x = mlp(64, 512, 512), images(16, 64)
    try:
        told = lbyl.compress(net, x, budget=budget, restore="prune", forecast=False).report.notes
    except lbyl.InputError as error:  # on a machine that does other things besides
        told = (str(error),)
    assert any(re.search("^latency:|scatter|can't be met", note) for note in told)


CALLS: dict[str, tuple[Any, str]] = {
    "bench": (lambda: lbyl.bench(mlp(), X, against=mlp(), runs=3, runtime="onnxruntime"), "needs onnxruntime"),
    "compress": (
        lambda: lbyl.compress(mlp(), X, budget=lbyl.Budget(latency=0.5, runtime="onnxruntime")),
        "needs onnxruntime",
    ),
    "sweep": (
        lambda: lbyl.sweep(mlp(), X, [lbyl.Budget(latency=0.5, runtime="onnxruntime")], "never-made"),
        "needs onnxruntime",
    ),
    "another": (lambda: lbyl.bench(mlp(), X, against=mlp(), runtime="tvm"), "choose one of 'torch', 'onnxruntime'"),
    "a budget of another": (lambda: lbyl.Budget(latency=0.5, runtime="tvm"), "choose 'torch' or 'onnxruntime'"),
    "no latency": (lambda: lbyl.Budget(macs=0.5, runtime="onnxruntime"), "is for a latency"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_measured_is_told_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    call, told = CALLS[name]
    with pytest.raises(lbyl.InputError, match=told):
        call()


def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from nets import mlp\nnet = lambda: mlp(6, 16)\n")
    source, out = f"{tmp_path / 'net.py'}:net", tmp_path / "out"
    options = ("--input", "1x6", "--ratio", "0.5", "--restore", "prune", "--no-forecast", "--runtime", "onnxruntime")
    done = CliRunner().invoke(app, ["compress", source, "-o", str(out), *options])
    assert done.exit_code == 0, done.output
    assert "in onnxruntime with" in done.stdout
    done = CliRunner().invoke(app, ["bench", str(out), "--against", source, "--runs", "3", "--runtime", "onnxruntime"])
    assert done.exit_code == 0, done.output
    assert "in onnxruntime with" in done.stdout
