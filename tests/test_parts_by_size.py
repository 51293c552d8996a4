"""Parts of channels whose bounds the code computes from their number keep their share of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lbyl


class Shifted(nn.Module):
    """Temporal shift: an eighth of the channels comes from the next frame, and another one from the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.share = 8
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 64, 3), nn.Conv2d(64, 24, 3)
        self.leave = nn.Linear(24, 4)

    def shift(self, x: Tensor) -> Tensor:
        count, channels, height, width = x.size()
        x = x.view(count // 4, 4, channels, height, width)
        fold = channels // self.share
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return out.view(count, channels, height, width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(self.shift(torch.relu(self.a(x)))))
        return self.leave(torch.relu(self.c(self.shift(x))).mean((2, 3)))


class Padded(Shifted):
    """The same, by concatenations."""

    def shift(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, 4))
        fold = x.size(2) // self.share
        ahead, behind, rest = x[:, 1:, :fold], x[:, :-1, fold : 2 * fold], x[:, :, 2 * fold :]
        ahead = torch.cat([ahead, torch.zeros_like(ahead[:, :1])], 1)
        behind = torch.cat([torch.zeros_like(behind[:, :1]), behind], 1)
        return torch.cat([ahead, behind, rest], 2).flatten(0, 1)


@pytest.mark.parametrize("kind", [Shifted, Padded])
def test_shifted_channels_are_cut_by_equal_shares(kind: type[Shifted]) -> None:
    x = torch.randn(8, 3, 10, 10)
    result = lbyl.compress(kind().eval(), x, ratio=0.5, restore="prune", forecast=False)
    assert {row.group for row in result.report.rows} == {"a", "b", "c"}
    zeroed = kind().eval()
    with torch.no_grad():
        for cut in result.plan.cuts:
            gone = [index for index in range(cut.size) if index not in cut.keep]
            zeroed.get_parameter(cut.parameter).index_fill_(cut.dim, torch.tensor(gone), 0)
        torch.testing.assert_close(result.model(x), zeroed(x))
