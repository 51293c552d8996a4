"""An exception of ``progress`` ends what reports it: that is how users cancel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lbyl


class Stop(RuntimeError):
    pass


def net() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "compress": lambda stop, place: lbyl.compress(net(), X, ratio=0.5, progress=stop),
    "prune": lambda stop, place: lbyl.compress(net(), X, ratio=0.5, restore="prune", progress=stop),
    "budget": lambda stop, place: lbyl.compress(net(), X, budget=lbyl.Budget(macs=0.5), progress=stop),
    "compare": lambda stop, place: lbyl.compare(net(), X, restores=["auto"], ratios=[0.5], progress=stop),
    "sweep": lambda stop, place: lbyl.sweep(
        net(), X, [lbyl.Budget(macs=0.5)], place / f"{len(list(place.iterdir()))}", progress=stop
    ),
    "bench": lambda stop, place: lbyl.bench(net(), X, against=net(), runs=3, progress=stop),
    "calibration": lambda stop, place: lbyl.calibration_batches(net(), X, progress=stop),
}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("at", ["first", "last"])
def test_cancel(name: str, at: str, tmp_path: Path) -> None:
    """Whether at the first report or at the last one: nothing else is tried in its place."""
    reports: list[str] = []
    CALLS[name](lambda stage, done, total: reports.append(stage), tmp_path)
    wanted, count = (1 if at == "first" else len(reports)), 0

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count == wanted:
            raise Stop("enough")

    assert reports
    with pytest.raises(Stop, match="enough"):
        CALLS[name](stop, tmp_path)
