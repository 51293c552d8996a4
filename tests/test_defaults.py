"""The user's default dtype and device, and the modes around a call, change nothing that lbyl does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import images
from torch import Tensor, nn

import lbyl


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
RESTORERS: dict[str, Any] = {
    "prune": "prune",
    "lbyl": "lbyl",
    "merge": "merge",
    "coreset": "coreset",
    "dreams": lbyl.LeastSquares(moments=lbyl.Dream(images=8, steps=2)),
    "noise": lbyl.LeastSquares(moments=lbyl.Noise(images=8)),
    "gaussian": lbyl.LeastSquares(moments=lbyl.Gaussian()),
    "photographs": lbyl.LeastSquares(moments=lbyl.Photographs(images=8)),
    "classes": lbyl.LeastSquares(moments=lbyl.ClassDream(images=8, steps=2)),
    "budget": lbyl.LeastSquares(moments=lbyl.Noise(images=8)),
}


def network(channels: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ]
    return nn.Sequential(*layers).eval()


def compressed(net: nn.Module, x: Tensor, restorer: str) -> lbyl.Result:
    budget = {"budget": lbyl.Budget(params=0.6)} if restorer == "budget" else {"ratio": 0.5}
    return lbyl.compress(net, x, restore=RESTORERS[restorer], **budget, forecast=False)


@pytest.mark.parametrize("restorer", RESTORERS)
@pytest.mark.parametrize("default", DEFAULTS)
def test_defaults_do_not_matter(restorer: str, default: str) -> None:
    net, x = network(3), images(2, 3, 16, 16)
    expected = compressed(net, x, restorer)
    with DEFAULTS[default]():
        found = compressed(net, x, restorer)
    assert found.report.notes == expected.report.notes
    assert found.plan.groups == expected.plan.groups
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("default", ["float16", "bfloat16", "float64"])
def test_a_network_of_the_default_dtype_is_restored(default: str) -> None:
    with DEFAULTS[default]():
        net = network(1)
        result = lbyl.compress(net, torch.randn(2, 1, 16, 16), ratio=0.5, restore=RESTORERS["dreams"])
    assert not any("can't restore" in note for note in result.report.notes)


class MakesItsScale(nn.Module):
    """Makes a tensor while it runs, which the default device holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network(3)

    def forward(self, x: Tensor) -> Tensor:
        assert torch.get_default_device() == torch.device("cpu:0")
        return self.layers(x) * torch.ones(1)


def test_the_network_runs_with_the_users_default_device() -> None:
    net, x = MakesItsScale().eval(), images(2, 3, 16, 16)
    with torch.device("cpu:0"):
        assert lbyl.compress(net, x, ratio=0.5, restore="lbyl").report.rows


def test_other_verbs_take_a_default_device(tmp_path: Path) -> None:
    net, fresh, x = network(3), network(3), images(2, 3, 16, 16)
    folder = lbyl.compress(net, x, ratio=0.5, restore="prune").save(tmp_path / "out")
    with torch.device("meta"):
        assert lbyl.inspect(net, x).to_dict()["groups"]
        smaller = lbyl.load(folder, fresh)
        assert lbyl.bench(smaller, x, against=net, runs=3).whole
        assert lbyl.export(folder, net, format="pt2").file.exists()
        result = lbyl.sweep(net, x, [lbyl.Budget(params=0.524)], tmp_path / "sweep", restore="prune")
    assert [point.reason for point in result.points] == [""]
