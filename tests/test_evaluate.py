"""What a function does to the network that it evaluates has no effect on the network that is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import images
from torch import nn

import lbyl


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    ).eval()


def zeroes(model: nn.Module) -> float:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return 0.5


def trains(model: nn.Module) -> float:
    model.train()(torch.randn(8, 3, 12, 12) * 5)
    return 0.5


def halves(model: nn.Module) -> float:
    model.half()
    return 0.5


def adds(model: nn.Module) -> float:
    model.add_module("more", nn.Linear(2, 2))
    return 0.5


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("judge", [zeroes, trains, halves, adds])
@pytest.mark.parametrize("asked", [{"ratio": 0.5}, {"budget": lbyl.Budget(accuracy_drop=0.1)}])
def test_the_result_is_what_it_is_without_evaluation(
    judge: Callable[[nn.Module], float], asked: dict[str, Any], tmp_path: Path
) -> None:
    x = images(2, 3, 12, 12)
    result = lbyl.compress(net(), x, restore="prune", evaluate=judge, forecast=False, **asked)
    result.save(tmp_path / "out")
    loaded = lbyl.load(tmp_path / "out", net())
    if "ratio" in asked:
        expected = lbyl.compress(net(), x, restore="prune", forecast=False, **asked).model
        torch.testing.assert_close(state_of(loaded), state_of(expected), rtol=0, atol=0)
    assert loaded(x).abs().sum() > 0
    assert not result.model.training


def test_points_of_a_sweep_are_not_changed_either(tmp_path: Path) -> None:
    x = images(2, 3, 12, 12)
    places = [tmp_path / name for name in ("judged", "plain")]
    for place, judge in zip(places, (trains, None), strict=True):
        lbyl.sweep(net(), x, [lbyl.Budget(macs=0.625)], place, restore="prune", evaluate=judge, forecast=False)
    found, expected = (lbyl.load(next(place.rglob("lbyl.json")).parent, net()) for place in places)
    torch.testing.assert_close(state_of(found), state_of(expected), rtol=0, atol=0)


def test_a_function_that_ends_the_process_is_named() -> None:
    with pytest.raises(lbyl.InputError, match="leaves failed on the unpruned network: SystemExit: 3"):
        lbyl.compress(net(), images(2, 3, 12, 12), ratio=0.5, restore="prune", evaluate=leaves, forecast=False)


def leaves(model: nn.Module) -> float:
    raise SystemExit(3)


def test_a_search_that_ends_early_says_so() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(16, 4096), nn.ReLU(), nn.Linear(4096, 4)).eval()
    asked: dict[str, Any] = {"restore": "prune", "forecast": False, "evaluate": lambda model: 1.0}
    budget = lbyl.Budget(accuracy_drop=0.1, max_ratio=0.9999)
    result = lbyl.compress(wide, torch.randn(2, 16), budget=budget, **asked)
    (note,) = (note for note in result.report.notes if "networks of several sizes" in note)
    assert result.report.macs is not None
    assert result.report.macs[1] < 0.025 * result.report.macs[0]
    assert note.endswith("the search ended after 7 tries, and the smallest may have between 0.00 and 0.02")


def test_a_search_that_ends_by_itself_does_not_say_so() -> None:
    asked: dict[str, Any] = {"restore": "prune", "forecast": False}
    whole = sum(parameter.numel() for parameter in net().parameters())

    def judge(model: nn.Module) -> float:
        return float(sum(parameter.numel() for parameter in model.parameters()) > 0.7 * whole)

    result = lbyl.compress(net(), images(2, 3, 12, 12), budget=lbyl.Budget(accuracy_drop=0.1), evaluate=judge, **asked)
    assert "tries" not in " ".join(result.report.notes)
