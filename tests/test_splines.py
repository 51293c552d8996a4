"""Layers of Kolmogorov-Arnold networks are cut: their weights are views of parameters with one more axis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lbyl


class Splines(nn.Module):
    """As in efficient-kan, with bumps in place of splines."""

    grid: Tensor

    def __init__(self, inputs: int, outputs: int, scaled: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scaled = inputs, outputs, scaled
        self.base = nn.Parameter(torch.randn(outputs, inputs) / 3)
        self.spline, self.scaler = nn.Parameter(torch.randn(outputs, inputs, 5) / 3), None
        if scaled:
            self.scaler = nn.Parameter(torch.randn(outputs, inputs))
        self.register_buffer("grid", torch.linspace(-1, 1, 5).expand(inputs, -1).contiguous())

    @property
    def weight(self) -> Tensor:
        return self.spline * (1.0 if self.scaler is None else self.scaler.unsqueeze(-1))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, self.in_features)
        bumps = torch.exp(-((x.unsqueeze(-1) - self.grid) ** 2))
        assert bumps.size() == (x.size(0), self.in_features, 5)
        y = functional.linear(functional.silu(x), self.base)
        y = y + functional.linear(bumps.view(x.size(0), -1), self.weight.view(self.out_features, -1))
        return y.reshape(*shape[:-1], self.out_features)


def network(scaled: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Splines(6, 16, scaled), Splines(16, 12, scaled), Splines(12, 3, scaled)).eval()


@pytest.mark.parametrize("scaled", [True, False])
def test_splines_are_cut_with_what_they_read(scaled: bool) -> None:
    x = torch.rand(8, 6) * 2 - 1
    result = lbyl.compress(network(scaled), x, ratio=0.5, restore="prune", forecast=False)
    assert [row.after for row in result.report.rows] == [8, 6]
    assert result.model.get_parameter("1.spline").shape == (6, 8, 5)
    zeroed = network(scaled)
    with torch.no_grad():
        for cut in (cut for cut in result.plan.cuts if cut.dim == 1):
            gone = torch.tensor([index for index in range(cut.size) if index not in cut.keep])
            zeroed.get_parameter(cut.parameter).index_fill_(1, gone, 0)
        torch.testing.assert_close(result.model(x), zeroed(x))


def test_the_default_cuts_them_too() -> None:
    report = lbyl.compress(network(scaled=True), torch.rand(8, 6), ratio=0.5).report
    assert [row.after for row in report.rows] == [8, 6]
    assert report.verified is not None
