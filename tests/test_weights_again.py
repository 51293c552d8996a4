"""A weight that the code gives another shape, and then its own again, is the layer's weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nets import images
from torch import Tensor, nn
from torch.nn import functional

import lbyl


class Reshapes(nn.Module):
    """As Mamba calls its convolution; and a pointwise one whose weight is a matrix in between."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv1d(4, 16, 1), nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.c, self.head, self.again = nn.Conv1d(16, 24, 1), nn.Linear(24, 3), again

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if not self.again:
            return self.head(self.c(self.b(x).relu()).relu().mean(-1))
        taps, matrix = self.b.weight.squeeze(1), self.c.weight.view(self.c.weight.shape[0], -1)
        x = functional.conv1d(x, taps.unsqueeze(1), self.b.bias, padding=1, groups=len(taps)).relu()
        return self.head(functional.conv1d(x, matrix.unsqueeze(-1), self.c.bias).relu().mean(-1))


def test_it_is_cut_and_restored_as_if_nothing_was_done_to_it() -> None:
    x, noise = images(2, 4, 10), lbyl.LeastSquares(lbyl.Noise(32))
    plain, again = (
        lbyl.compress(Reshapes(how).eval(), x, ratio=0.5, restore=noise, forecast=False) for how in (False, True)
    )
    assert {row.group: row.after for row in again.report.rows} == {"a": 8, "c": 12}
    errors = [[row.errors for row in result.report.rows] for result in (plain, again)]
    assert errors[0] == [pytest.approx(pair, rel=1e-4) for pair in errors[1] if pair]
    assert all(pair and pair[1] < 0.95 * pair[0] for pair in errors[0])


@pytest.mark.parametrize("name", ["all_head_size", "hidden"])
def test_the_width_of_all_heads_together_follows_whatever_it_is_called(name: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.attention_head_size = 4, 6
            setattr(self, name, 24)
            self.q, self.k, self.v = (nn.Linear(8, 24) for _ in range(3))
            self.out = nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            shape = (*x.shape[:2], self.heads, self.attention_head_size)
            q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
            y = (q @ k.transpose(2, 3)).softmax(-1) @ v
            return self.out(y.transpose(1, 2).reshape(*x.shape[:2], getattr(self, name)))

    torch.manual_seed(0)
    result = lbyl.compress(Attention().eval(), images(2, 5, 8), ratio=0.5, restore="prune", strict=True, forecast=False)
    assert [(row.before, row.after) for row in result.report.rows] == [(4, 2)]
    assert getattr(result.model, name) == 12


@pytest.mark.parametrize("persistent", [False, True])
def test_a_buffer_that_filters_each_channel_loses_channels_too(persistent: bool, tmp_path: Path) -> None:
    class Blur(nn.Module):
        """As the blurred pooling of timm, which knows its number of channels by heart."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.channels = channels
            kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
            self.register_buffer("filt", kernel.repeat(channels, 1, 1), persistent=persistent)

        def forward(self, x: Tensor) -> Tensor:
            return functional.conv1d(x, self.get_buffer("filt"), stride=2, groups=self.channels)

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv1d(4, 16, 1), nn.ReLU(), Blur(16), nn.Conv1d(16, 6, 1)).eval()

    torch.manual_seed(0)
    x = images(2, 4, 11)
    result = lbyl.compress(build(), x, ratio=0.25, restore="prune", strict=True, forecast=False)
    assert [(row.group, row.after) for row in result.report.rows] == [("0", 12)]
    assert result.model.get_buffer("2.filt").shape == (12, 1, 3)
    result.save(tmp_path / "out")
    torch.testing.assert_close(lbyl.load(tmp_path / "out", build())(x), result.model(x))
