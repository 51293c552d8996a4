"""Criteria and restorers of the user's own, by name: in Python and on the command line."""

from __future__ import annotations

import json
import re
import runpy
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.io.sources import load_source
from lbyl.runtime import registry

MODULE = """
    import torch
    import lbyl
    from lbyl.surgery.masking import Delivery

    print("modules may talk")

    class Last:
        "The last channels go first."

        def score(self, filters, generator):
            return -torch.arange(len(filters), dtype=filters.dtype)

    class Halve:
        "The kept channels are halved, and nothing else is done."

        def deliver(self, filters, keep, drop, generator):
            matrix = torch.zeros(len(keep), len(drop)).double()
            return Delivery(matrix, torch.full((len(keep),), 0.5).double(), "halved")

    lbyl.register("criterion", "mine", Last)
    lbyl.register("restorer", "mine", Halve)
    lbyl.register("moments", "mine", lambda: lbyl.Noise(images=3))
"""
FACTORY = """
    import torch
    from torch import nn

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
"""
SHAPE = ("--input", "1x3x8x8")


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_REGISTERED", {family: {} for family in registry.FAMILIES})


@pytest.fixture
def module(tmp_path: Path) -> Path:
    file = tmp_path / "my_pruning.py"
    file.write_text(textwrap.dedent(MODULE))
    return file


@pytest.fixture
def source(tmp_path: Path) -> str:
    file = tmp_path / "tiny.py"
    file.write_text(textwrap.dedent(FACTORY))
    return f"{file}:net"


@pytest.fixture
def importable(module: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.syspath_prepend(str(module.parent))
    yield module.stem
    sys.modules.pop(module.stem, None)


def command(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def said(result: Any) -> str:
    return " ".join(re.sub("[│\n]", " ", result.stderr).split())


def halved(net: torch.nn.Module) -> torch.Tensor:
    """The weight of the consumer, by hand: the first four channels stay, at half of what they weighed."""
    return net.get_parameter("2.weight")[:, :4] / 2


def test_by_name_in_python(module: Path, source: str) -> None:
    runpy.run_path(str(module))
    net = load_source(source)
    made = lbyl.compress(net, torch.zeros(1, 3, 8, 8), ratio=0.5, criterion="mine", restore="mine")
    assert torch.allclose(made.model.get_parameter("2.weight"), halved(net))


@pytest.mark.parametrize("form", ["file", "module"])
def test_compress_by_name(module: Path, importable: str, source: str, tmp_path: Path, form: str) -> None:
    plugin = module if form == "file" else importable
    names = ("--plugin", plugin, "--criterion", "mine", "--restore", "mine")
    result = command(
        "compress", source, "-o", tmp_path / "out", *SHAPE, *names, "--ratio", "0.5", "--no-latency", "--json"
    )
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)["plan"]["settings"]
    assert settings["criterion"]["name"] == "Last"
    assert "modules may talk" in result.stderr
    net = load_source(source)
    loaded = lbyl.load(tmp_path / "out", net)
    assert torch.allclose(loaded.get_parameter("2.weight"), halved(net))


def test_sweep_by_name(module: Path, source: str, tmp_path: Path) -> None:
    names = ("--plugin", module, "--criterion", "mine", "--restore", "mine")
    result = command("sweep", source, "-o", tmp_path / "out", *SHAPE, "--budget", "params=0.75", *names, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)


def test_moments_by_name(module: Path, source: str, tmp_path: Path) -> None:
    names = ("--plugin", module, "--moments", "mine")
    result = command(
        "compress", source, "-o", tmp_path / "out", *SHAPE, *names, "--ratio", "0.5", "--no-latency", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plan"]["settings"]["restore"]["moments"].items() >= {"images": 3}.items()


def test_the_module_of_a_factory_may_register(module: Path, tmp_path: Path) -> None:
    with module.open("a") as file:
        file.write(textwrap.dedent(FACTORY))
    names = ("--criterion", "mine", "--restore", "mine")
    result = command(
        "compress", f"{module}:net", "-o", tmp_path / "out", *SHAPE, *names, "--ratio", "0.5", "--no-latency", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plan"]["settings"]["criterion"]["name"] == "Last"


@pytest.mark.parametrize("name", ["compress", "sweep"])
def test_an_unknown_name_is_told_the_registered_ones(name: str, module: Path, tmp_path: Path) -> None:
    budget = ("--budget", "macs=0.5")
    arguments = ("torchvision:resnet18", "-o", tmp_path / "out", *budget, "--plugin", module, "--criterion", "yours")
    result = command(name, *arguments)
    assert result.exit_code == 2
    assert "'yours' is not a criterion; choose one of auto, l2, l1, gm, energy, obs, random, mine" in said(result)
    assert not result.stdout


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "there is no such file"),
        ("import lbyl\nlbyl.register('criterion', 'l2', list)", "'l2' is already used by lbyl"),
        ("import lbyl\nlbyl.register('norm', 'mine', list)", "unknown family 'norm'"),
        ("1 / 0", "can't be run: ZeroDivisionError"),
        ("def broken(:", "can't be run: SyntaxError"),
        ("raise SystemExit(3)", "can't be run: SystemExit"),
        ("import no_such_package", "can't be run: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_a_plugin_that_fails_is_one_line(code: str | None, message: str, source: str, tmp_path: Path) -> None:
    file = tmp_path / "plugin.py"
    if code is not None:
        file.write_text(code)
    result = command("compress", source, "-o", tmp_path / "out", *SHAPE, "--plugin", file, "-q")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert message in result.stderr
    assert result.stderr.startswith("error: --plugin ")
    assert result.stderr.count("\n") == 1


def test_a_plugin_that_is_no_module(source: str, tmp_path: Path) -> None:
    result = command("compress", source, "-o", tmp_path / "out", *SHAPE, "--plugin", "no.such.module")
    assert result.exit_code == 1
    assert "error: --plugin no.such.module can't be imported" in result.stderr


def test_no_plugin_runs_for_a_folder_that_exists(module: Path, source: str, tmp_path: Path) -> None:
    result = command("compress", source, "-o", tmp_path, *SHAPE, "--plugin", module)
    assert result.exit_code == 1
    assert "modules may talk" not in result.output


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("criterion", "l2", "'l2' is already used by lbyl"),
        ("restorer", "lbyl", "'lbyl' is already used by lbyl"),
        ("restorer", "auto", "'auto' is already used by lbyl"),
        ("moments", "noise", "'noise' is already used by lbyl"),
        ("norm", "mine", "unknown family 'norm'; choose one of criterion, restorer, moments"),
        ("criterion", "", "pass a name and a class"),
    ],
)
def test_names_that_can_not_be_registered(family: str, name: str, message: str) -> None:
    with pytest.raises(lbyl.InputError, match=re.escape(message)):
        lbyl.register(family, name, list)


def test_a_member_that_can_not_be_called() -> None:
    with pytest.raises(lbyl.InputError, match="pass a name and a class"):
        lbyl.register("criterion", "mine", 3)


@pytest.mark.parametrize("argument", ["criterion", "restore"])
def test_an_unknown_name_in_python(module: Path, source: str, argument: str) -> None:
    runpy.run_path(str(module))
    arguments: dict[str, Any] = {argument: "yours", "ratio": 0.5}
    with pytest.raises(lbyl.InputError, match=r"'yours'; choose one of .*mine"):
        lbyl.compress(load_source(source), torch.zeros(1, 3, 8, 8), **arguments)
