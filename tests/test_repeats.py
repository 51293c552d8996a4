"""Of an argument that says how often a layer runs, the report tells for which number the network was cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbyl


class Refining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.step, self.leave = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, rounds: int = 1, other: int = 3) -> Tensor:
        x = torch.relu(self.enter(x))
        for _ in range(rounds):
            x = torch.relu(self.step(x))
        return self.leave(x) * other


def told(inputs: Any) -> list[str]:
    result = lbyl.compress(Refining().eval(), inputs, ratio=0.5, scope="all", restore="prune", forecast=False)
    assert result.report.rows
    return [note for note in result.report.notes if "times" in note]


def test_a_number_of_rounds_by_default_is_told() -> None:
    (note,) = told(torch.randn(4, 6))
    assert "for rounds=1, and may compute something else for more" in note


@pytest.mark.parametrize("how", [lambda x: (x, 3), lambda x: {"x": x, "rounds": 3}])
def test_more_rounds_of_the_example_are_told_and_hold_for_others(how: Any) -> None:
    x = torch.randn(4, 6)
    (note,) = told(how(x))
    assert "rounds=3" in note
    net = Refining().eval()
    result = lbyl.compress(net, how(x), ratio=0.5, scope="all", restore="prune", forecast=False)
    zeroed = Refining().eval()
    with torch.no_grad():
        for cut in result.plan.cuts:
            gone = [index for index in range(cut.size) if index not in cut.keep]
            zeroed.get_parameter(cut.parameter).index_fill_(cut.dim, torch.tensor(gone), 0)
        for rounds in (2, 5):
            torch.testing.assert_close(result.model(x, rounds), zeroed(x, rounds))
