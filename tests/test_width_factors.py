"""Factors that the code computes from a number of channels are those of the original after a cut."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lbyl

Formula = Callable[[Tensor, Tensor], Tensor]
FORMULAS: dict[str, Formula] = {
    "factor last": lambda x, g: functional.normalize(x, dim=1) * g * (x.shape[1] ** 0.5),
    "factor before the weight": lambda x, g: functional.normalize(x, dim=1) * (x.shape[1] ** 0.5) * g,
    "root of a size": lambda x, g: g * (math.sqrt(x.size(1)) * x / x.norm(dim=1, keepdim=True)),
    "divided": lambda x, g: functional.normalize(x, dim=1) / (x.shape[1] ** -0.5) * g,
    "factor of the weight": lambda x, g: functional.normalize(x, dim=1) * (g * x.shape[1] ** 0.5),
}


class Norm(nn.Module):
    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.g, self.formula = nn.Parameter(torch.rand(1, 16, 1) + 0.5), formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.g)


class Kept(nn.Module):
    """The factor is kept as a number, or spelled out, and the code also asks for sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.scale = nn.Parameter(torch.rand(1, 16, 1) + 0.5), 4.0

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] > 0
        return functional.normalize(x, dim=1) * self.g * self.scale


class Spelled(Kept):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] > 0
        return functional.normalize(x, dim=1) * self.g * 4.0


def network(norm: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv1d(3, 16, 3), norm(), nn.SiLU()),
        *(nn.Conv1d(16, 16, 3), norm(), nn.SiLU()),
        nn.Conv1d(16, 4, 1),
    ).eval()


def check(norm: Callable[[], nn.Module]) -> None:
    x = torch.randn(2, 3, 9)
    result = lbyl.compress(network(norm), x, ratio=0.5, scope="all", restore="prune", forecast=False)
    assert [row.after for row in result.report.rows] == [8, 8]
    zeroed = network(norm)
    with torch.no_grad():
        for cut in result.plan.cuts:
            gone = [index for index in range(cut.size) if index not in cut.keep]
            zeroed.get_parameter(cut.parameter).index_fill_(cut.dim, torch.tensor(gone), 0)
        torch.testing.assert_close(result.model(x), zeroed(x))


@pytest.mark.parametrize("name", FORMULAS)
def test_a_factor_from_a_width_stays_that_of_the_original(name: str) -> None:
    check(lambda: Norm(FORMULAS[name]))


@pytest.mark.parametrize("kind", [Kept, Spelled])
def test_a_factor_that_stays_by_itself_is_not_corrected(kind: type[Kept]) -> None:
    check(kind)


SCORES: dict[str, Formula] = {
    "times a power": lambda q, k: (q @ k.transpose(1, 2)) * q.size(-1) ** -0.5,
    "divided by a root": lambda q, k: torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(k.size(-1)),
    "of the queries": lambda q, k: (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2),
    "of a sum": lambda q, k: torch.einsum("bid,bjd->bij", q, k) / (q.shape[-1] ** 0.5),
}


class Attention(nn.Module):
    """Attention with a single head."""

    def __init__(self, scores: Formula) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scores = scores
        self.enter, self.q, self.k, self.v = nn.Linear(6, 10), nn.Linear(10, 16), nn.Linear(10, 16), nn.Linear(10, 20)
        self.leave = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        return self.leave(self.scores(self.q(x), self.k(x)).softmax(-1) @ self.v(x))


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_one_head_keep_their_factor(name: str) -> None:
    x = torch.randn(2, 5, 6)
    result = lbyl.compress(Attention(SCORES[name]).eval(), x, ratio=0.5, restore="prune", forecast=False)
    assert {row.group: row.after for row in result.report.rows} == {"enter": 5, "q": 8, "v": 10}
    zeroed = Attention(SCORES[name]).eval()
    with torch.no_grad():
        for cut in result.plan.cuts:
            gone = [index for index in range(cut.size) if index not in cut.keep]
            zeroed.get_parameter(cut.parameter).index_fill_(cut.dim, torch.tensor(gone), 0)
        torch.testing.assert_close(result.model(x), zeroed(x))


def test_restored_scores_keep_their_factor() -> None:
    net = Attention(SCORES["times a power"]).eval()
    report = lbyl.compress(net, torch.randn(2, 5, 6), ratio=0.5, restore="lbyl", forecast=False).report
    assert {row.group for row in report.rows} == {"enter", "q", "v"}
