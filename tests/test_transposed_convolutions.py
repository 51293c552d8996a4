"""Transposed convolutions whose inputs lose channels are restored like other consumers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbyl
from lbyl.restore.targets import taps_inside
from lbyl.runtime.inputs import ExampleInputs

KINDS: dict[int, tuple[type[nn.Module], type[nn.Module]]] = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


def decoder(axes: int, **settings: Any) -> nn.Module:
    """A convolution of which channel 3 is twice channel 0, and a transposed one after it."""
    torch.manual_seed(0)
    conv, transposed = KINDS[axes]
    net = nn.Sequential(conv(2, 6, 3), nn.ReLU(), transposed(6, 4, 3, **settings)).eval()
    first: Any = net[0]
    with torch.no_grad():
        first.weight[3], first.bias[3] = 2 * first.weight[0], 2 * first.bias[0]
    return net


def batch(axes: int, number: int = 16, seed: int = 0) -> Tensor:
    """Inputs."""
    return torch.randn(number, 2, *(9,) * axes, generator=torch.Generator().manual_seed(seed))


class Dropped:
    """Drops channel 3 first, and then channel 5."""

    def score(self, filters: Tensor, generator: torch.Generator) -> Tensor:
        """One score a channel."""
        return torch.tensor([2.0, 2, 2, 0, 2, 1]) + 0 * filters[:, 0]


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1, "output_padding": 1}, {"dilation": 2}])
def test_kept_channels_take_over_and_biases_keep_the_mean(axes: int, settings: dict[str, Any]) -> None:
    net, x = decoder(axes, **settings), [batch(axes, seed=seed) for seed in (1, 2)]
    restore = lbyl.LeastSquares(lbyl.Data(x, 2), ridge=1e-5, renorm=False)
    chosen: dict[str, Any] = {"criterion": Dropped(), "restore": restore, "forecast": False}
    one, two = (lbyl.compress(net, x[0][:1], ratio=ratio, **chosen) for ratio in (1 / 6, 1 / 3))
    plain = lbyl.compress(net, x[0][:1], ratio=1 / 3, **{**chosen, "restore": "prune"})
    with torch.no_grad():
        wanted, same, mean, off = (made(x[0]) for made in (net, one.model, two.model, plain.model))
    assert len(one.model[0].weight) == 5  # pyright: ignore
    torch.testing.assert_close(same, wanted, rtol=1e-3, atol=2e-3)
    assert float((mean - wanted).norm()) > 0.01
    dims = [0, *range(2, wanted.dim())]
    moved, unrestored = ((each.mean(dims) - wanted.mean(dims)).norm().item() for each in (mean, off))
    assert moved < 0.1 * unrestored
    assert not any("did not run" in row.note for row in two.report.rows)


@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"stride": 2, "padding": 1, "output_padding": 1}])
def test_shares_of_kernel_positions_give_the_mean_output(settings: dict[str, Any]) -> None:
    net = nn.ConvTranspose2d(1, 1, 3, bias=False, **settings)
    ones = torch.ones(1, 1, 5, 7)
    inside = taps_inside(net, ExampleInputs.of(ones))["weight"]
    assert float(net.weight.detach().flatten().double() @ inside) == pytest.approx(net(ones).mean().item(), abs=1e-6)


def test_grouped_ones_are_cut_and_left() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, groups=2)).eval()
    report = lbyl.compress(net, batch(2)[:1], ratio=0.5, forecast=False).report
    assert any("cut, not restored" in row.note for row in report.rows)
