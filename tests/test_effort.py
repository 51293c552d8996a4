"""How much time the library's own choice of a restorer may take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import images, residual
from torch import nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.restore.registry import choose_restorer
from lbyl.runtime.inputs import ExampleInputs


def chosen(net: nn.Module, x: torch.Tensor, effort: str) -> lbyl.LeastSquares:
    return choose_restorer(net, ExampleInputs.of(x), effort)[0]


def test_low_effort_dreams_nothing_and_solves_once() -> None:
    small = chosen(residual(), images(2, 3, 8, 8), "low")  # too small for photographs
    assert (small.moments, small.sequential) == (lbyl.Dream(images=64, steps=0), False)
    large = chosen(residual(), images(2, 3, 32, 32), "low")
    assert (large.moments, large.sequential) == (lbyl.Photographs(images=48), False)


def test_classifiers_without_batch_norms_have_their_own_probes() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    found = {effort: chosen(net, images(1, 1, 8, 8), effort) for effort in ("low", "default", "high")}
    moments = {"low": lbyl.Noise(images=256), "default": lbyl.ClassDream(), "high": lbyl.ClassDream(images=640)}
    assert {effort: each.moments for effort, each in found.items()} == moments
    assert found["low"].sequential is False


def test_high_effort_takes_more_of_the_same() -> None:
    high = chosen(residual(), images(2, 3, 8, 8), "high")
    assert high.moments == lbyl.Dream(images=192, steps=20)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    assert chosen(plain, images(1, 3, 64, 64), "high").moments == lbyl.Photographs(images=384)
    assert chosen(plain, images(1, 3, 64, 64), "low").moments == lbyl.Photographs(images=48)


@pytest.mark.parametrize("effort", ["low", "high"])
def test_the_report_says_so(effort: str) -> None:
    result = lbyl.compress(residual(), images(2, 3, 8, 8), ratio=0.25, effort=effort, forecast=False)
    assert any(f"{effort} effort" in note for note in result.report.notes)
    assert any("dreamed probes" in note for note in result.report.notes) == (effort == "high")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"effort": "most"}, "choose 'low', 'default', 'high'"),
        ({"effort": "low", "restore": "prune"}, "is for restore='auto'"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(lbyl.InputError, match=says):
        lbyl.compress(residual(), images(2, 3, 8, 8), ratio=0.25, **settings)


def test_the_command_line_has_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),\n"
        "                               torch.nn.Conv2d(8, 4, 3)).eval()\n"
    )
    source, shape = f"{tmp_path / 'mine.py'}:make", "1x3x16x16"
    words = ["compress", source, "--input", shape, "--ratio", "0.25", "--effort", "low", "-o", str(tmp_path / "out")]
    found = CliRunner().invoke(app, [*words, "--no-latency", "--no-forecast"])
    assert found.exit_code == 0, found.output
    assert "low effort" in (tmp_path / "out" / "report.json").read_text()
    refused = CliRunner().invoke(app, [*words, "--restore", "prune"])
    assert refused.exit_code == 2
