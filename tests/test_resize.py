"""An analysis that is kept: another size of the same network is what compress gives, and nothing is measured twice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import images, mlp, settle
from torch import Tensor, nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.errors import ArtifactError, InputError
from lbyl.moments import Probes
from lbyl.runtime.inputs import ExampleInputs

SOURCE = "nets_to_resize.py:build"
CODE = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    return body.eval()
"""


@dataclass(frozen=True)
class Counting:
    """Noise that writes a line whenever probes are made."""

    log: str

    def probes(self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Any) -> Probes:
        with Path(self.log).open("a") as file:
            file.write("probes\n")
        return lbyl.Noise(images=16).probes(model, inputs, generator, progress)


def net() -> tuple[nn.Module, Tensor]:
    return mlp(6, 32, 32), images(2, 6)


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


def test_another_size_is_what_compress_gives_and_probes_are_made_once(tmp_path: Path) -> None:
    (model, x), log = net(), tmp_path / "log"
    restore = lbyl.LeastSquares(Counting(str(log)))
    for budget in (lbyl.Budget(macs=0.8), lbyl.Budget(params=0.5), lbyl.Budget(macs=0.8)):
        kept = lbyl.compress(model, x, budget=budget, restore=restore, forecast=False, analysis=tmp_path / "kept")
        assert same(kept.model, lbyl.compress(model, x, budget=budget, restore=restore, forecast=False).model)
    assert log.read_text().splitlines().count("probes") == 1 + 3
    ratio = lbyl.compress(model, x, ratio=0.5, restore=restore, forecast=False, analysis=tmp_path / "kept")
    straight = lbyl.compress(model, x, ratio=0.5, restore=restore, forecast=False)
    for name, tensor in straight.model.state_dict().items():
        # The same sums, added up in another order.
        torch.testing.assert_close(ratio.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def other_network(folder: Path) -> None:
    lbyl.compress(settle(mlp(6, 32, 32), 5), images(2, 6), budget=lbyl.Budget(macs=0.5), analysis=folder)


def other_seed(folder: Path) -> None:
    lbyl.compress(*net(), budget=lbyl.Budget(macs=0.5), seed=7, analysis=folder)


def own_data(folder: Path) -> None:
    restore = lbyl.LeastSquares(lbyl.Data([images(16, 6)]))
    lbyl.compress(*net(), budget=lbyl.Budget(macs=0.5), restore=restore, analysis=folder)


def depth(folder: Path) -> None:
    lbyl.compress(*net(), budget=lbyl.Budget(macs=0.5, depth=True), analysis=folder)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (other_network, "holds the analysis of another network: weights differ"),
        (other_seed, "seed was 0, now it is 7"),
        (own_data, "never written to disk"),
        (depth, "analysis and depth"),
    ],
)
def test_what_does_not_fit_is_told(call: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    model, x = net()
    lbyl.compress(model, x, budget=lbyl.Budget(macs=0.8), forecast=False, analysis=tmp_path / "kept")
    with pytest.raises(InputError, match=says):
        call(tmp_path / "kept")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    model, x = net()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "file").write_text("text")
    for place in ("photos", "file", "none/there"):
        with pytest.raises(InputError, match="analysis: "):
            lbyl.compress(model, x, budget=lbyl.Budget(macs=0.8), forecast=False, analysis=tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["file", "photos"]
    assert os.listdir(tmp_path / "photos") == ["cat.jpg"]


@pytest.mark.parametrize("text", ["[]", "{}", '{"version": 2, "fingerprint": {}}', '{"version": 1}', "no"])
def test_a_damaged_analysis_is_told(text: str, tmp_path: Path) -> None:
    model, x = net()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "analysis.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"analysis\.json"):
        lbyl.compress(model, x, budget=lbyl.Budget(macs=0.8), forecast=False, analysis=tmp_path / "kept")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 64
    file.write_bytes(content)


def linked(file: Path) -> None:
    file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent / "elsewhere")


TENSORS = ("probes.safetensors", "curves.safetensors", "consumer_moments.safetensors")
DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    **{f"a bit of {n}": (lambda here, _, n=n: flip(here / "0" / n), "changed.*delete it") for n in TENSORS},
    **{
        f"{n} of another": (lambda here, other, n=n: shutil.copy(other / "0" / n, here / "0" / n), "another network")
        for n in (*TENSORS, "groups.json")
    },
    "no groups": (lambda here, _: (here / "0" / "groups.json").write_text(""), "delete groups.json, and it will be"),
    "a list of groups": (lambda here, _: (here / "0" / "groups.json").write_text("[]"), "no object.*delete it"),
    "half a fingerprint": (lambda here, _: os.truncate(here / "analysis.json", 90), "remove .*made again"),
    "a link": (lambda here, _: linked(here / "0" / "probes.safetensors"), "is a link"),
    "a linked folder": (lambda here, _: linked(here / "0"), "is a link"),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Analyses of two networks that differ in their weights only."""
    place = tmp_path_factory.mktemp("kept")
    for name, seed in (("one", 0), ("other", 5)):
        keep(place / name, settle(mlp(6, 32, 32), seed))
    return place


def keep(folder: Path, model: nn.Module) -> None:
    restore = lbyl.LeastSquares(lbyl.Noise(images=16))
    lbyl.compress(model, images(2, 6), budget=lbyl.Budget(macs=0.5), restore=restore, forecast=False, analysis=folder)


@pytest.mark.parametrize("name", DAMAGES)
def test_nothing_damaged_is_used(name: str, kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "kept")
    damage, says = DAMAGES[name]
    damage(tmp_path / "kept" / "one", tmp_path / "kept" / "other")
    with pytest.raises(ArtifactError, match=says):
        keep(tmp_path / "kept" / "one", settle(mlp(6, 32, 32), 0))


def test_the_same_weights_in_another_network(kept: Path) -> None:
    model = settle(mlp(6, 32, 32), 0)
    model[1] = nn.GELU()
    with pytest.raises(InputError, match="another network: modules differ"):
        keep(kept / "one", model)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the source of a network."""
    (tmp_path / "nets_to_resize.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    made = CliRunner().invoke(app, [*arguments, "--quiet"])
    assert made.exception is None or isinstance(made.exception, SystemExit)
    return made.exit_code, made.output


QUICK = ("--no-latency", "--no-forecast")


def compress(output: str, budget: str, *more: str) -> None:
    code, said = run("compress", SOURCE, "--input", "2x6", "--budget", budget, "-o", output, *QUICK, *more)
    assert code == 0, said


def test_the_command_cuts_a_saved_folder_to_another_size(place: Path) -> None:
    compress("first", "macs=0.8", "--keep-analysis", "--criterion", "l1", "--seed", "3", "--min-keep", "2")
    compress("straight", "macs=0.4", "--criterion", "l1", "--seed", "3", "--min-keep", "2")
    code, said = run("resize", "first", "--budget", "macs=0.4", "-o", "second", "--model", SOURCE, *QUICK)
    assert code == 0, said
    weights = [(place / folder / "model.safetensors").read_bytes() for folder in ("straight", "second", "first")]
    assert weights[0] == weights[1] != weights[2]
    settings = [
        json.loads((place / folder / "lbyl.json").read_text())["plan"]["settings"] for folder in ("straight", "second")
    ]
    assert settings[0] == settings[1]
    assert (place / "first" / "analysis").is_dir()
    assert not (place / "second" / "analysis").exists()
    assert not [name for name in os.listdir(place) if name.startswith(".")]
    assert lbyl.load("first", lbyl.load_source(SOURCE))


def test_the_command_says_what_it_lacks(place: Path) -> None:
    compress("plain", "macs=0.8")
    code, said = run("resize", "plain", "--budget", "macs=0.4", "-o", "second", *QUICK)
    assert code == 1
    assert "plain keeps no analysis" in said
    assert "nowhere is not a folder" in run("resize", "nowhere", "--budget", "macs=0.4", "-o", "second", *QUICK)[1]
    compress("first", "macs=0.8", "--keep-analysis")
    code, said = run("resize", "first", "--budget", "macs=0.4", "-o", "second", *QUICK)
    assert code == 1
    assert "pass --model" in said
    assert run("resize", "first", "--budget", "accuracy_drop=0.4", "-o", "second", *QUICK)[0] == 2
    file = place / "first" / "analysis" / "settings.json"
    for text in (
        "[]",
        '{"seed": "much"}',
        file.read_text().replace('"auto"', '"none"'),
        file.read_text().replace("2x6", "?"),
    ):
        file.write_text(text)
        code, said = run("resize", "first", "--budget", "macs=0.4", "-o", "second", "--model", SOURCE, *QUICK)
        assert code == 1
        assert "settings.json" in said
    assert not (place / "second").exists()


@pytest.mark.parametrize("other", [("--depth",), ("--data", ".")])
def test_what_is_not_kept_is_a_usage_error(other: tuple[str, ...], place: Path) -> None:
    code, said = run(
        "compress", SOURCE, "--input", "2x6", "--budget", "macs=0.8", "-o", "out", "--keep-analysis", *other
    )
    assert code == 2
    assert other[0] in said
    assert not (place / "out").exists()
