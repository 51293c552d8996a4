"""Modules that compare a number with the width of their input, and stop if both differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lbyl


class Upsampled(nn.Module):
    """A layer that insists on the width of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.steps = channels, channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def check(self, x: Tensor) -> None:
        assert x.shape[1] == self.channels, "another width"

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.conv(functional.interpolate(x, scale_factor=2.0))


class Raising(Upsampled):
    def check(self, x: Tensor) -> None:
        if self.channels != x.size(1):
            raise ValueError("another width")


class Unpacked(Upsampled):
    def check(self, x: Tensor) -> None:
        _, channels, *_ = x.shape
        torch._assert(channels == self.channels, "another width")


class Whole(Upsampled):
    def check(self, x: Tensor) -> None:
        if x.shape != (x.shape[0], self.channels, *x.shape[2:]):
            raise ValueError("another shape")


class Inside(Upsampled):
    """The width is compared by a module inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.inner = Upsampled(channels)

    def check(self, x: Tensor) -> None:
        self.inner.check(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Network(nn.Module):
    def __init__(self, kind: type[Upsampled], block: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.block = block or nn.Conv2d(16, 16, 3, padding=1)
        self.up = kind(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.up(x + self.block(torch.relu(x))))


@pytest.mark.parametrize("kind", [Upsampled, Raising, Unpacked, Whole, Inside])
def test_the_number_follows_the_width(kind: type[Upsampled]) -> None:
    torch.manual_seed(0)
    net, x = Network(kind).eval(), torch.randn(2, 3, 8, 8)
    result = lbyl.compress(net, x, ratio=0.5, scope="all", restore="prune", forecast=False)
    assert result.model.first.out_channels == 8
    assert (result.model.up.inner if kind is Inside else result.model.up).channels == 8
    assert result.model(x).shape == net(x).shape
    assert net.up.channels == 16
    assert type(net.up.channels) is int


class Scaled(Upsampled):
    """The number is compared with the width, but also used to compute."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.channels


def test_a_number_that_also_computes_keeps_its_layers_whole() -> None:
    torch.manual_seed(0)
    net, x = Network(Scaled).eval(), torch.randn(2, 3, 8, 8)
    report = lbyl.compress(net, x, ratio=0.5, scope="all", restore="prune", forecast=False).report
    assert any("verification" in why for name, why in report.left if name == "first")
