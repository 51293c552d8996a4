"""Parts of one parameter that the code uses as weights of their own are cut with the channels that they read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lbyl

Scores = Callable[["Attention", Tensor], tuple[Tensor, Tensor]]


def of_rows(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    return x @ layer.a[: layer.width, :], torch.matmul(x, layer.a[layer.width :, :])


def of_a_shape(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    width = x.shape[1]
    return x @ layer.a[:width], x @ layer.a[width:]


def of_a_vector(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    column = layer.a[:, 0]
    return (x @ column[: layer.width])[:, None], (x @ column[layer.width :])[:, None]


class Attention(nn.Module):
    """A layer of pyGAT: the halves of one vector score both ends of an edge."""

    def __init__(self, scores: Scores) -> None:
        super().__init__()
        self.scores, self.width = scores, 8
        self.W, self.a = nn.Parameter(torch.randn(10, 8)), nn.Parameter(torch.randn(16, 1))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = torch.mm(x, self.W)
        left, right = self.scores(self, x)
        weights = torch.where(edges > 0, functional.leaky_relu(left + right.T), -9e15 * torch.ones_like(edges))
        return functional.elu(weights.softmax(1) @ x)


class Network(nn.Module):
    def __init__(self, scores: Scores) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.leave = nn.ModuleList(Attention(scores) for _ in range(2)), nn.Linear(16, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.leave(torch.cat([head(x, edges) for head in self.heads], 1))


@pytest.mark.parametrize("scores", [of_rows, of_a_shape, of_a_vector])
def test_halves_of_a_vector_are_cut_with_the_channels_that_they_read(scores: Scores) -> None:
    inputs = torch.randn(7, 10), (torch.rand(7, 7) > 0.3).float()
    result = lbyl.compress(Network(scores).eval(), inputs, ratio=0.5, restore="prune", forecast=False)
    assert [(row.group, row.after) for row in result.report.rows] == [("heads.0", 4), ("heads.1", 4)]
    assert result.model.get_parameter("heads.0.a").shape == (8, 1)
    zeroed = Network(scores).eval()
    with torch.no_grad():
        for cut in result.plan.cuts:
            gone = [index for index in range(cut.size) if index not in cut.keep]
            zeroed.get_parameter(cut.parameter).index_fill_(cut.dim, torch.tensor(gone), 0)
        torch.testing.assert_close(result.model(*inputs), zeroed(*inputs))
