"""Sums of values from different inputs are no residual connections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lbyl


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(8, 32), nn.Linear(4, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(torch.relu(self.a(x) + self.b(y)))


class FiLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(4, 32), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale, shift = self.b(y)[:, :, None, None].chunk(2, 1)
        return self.last(torch.relu((1 + scale) * self.a(x) + shift))


class Timed(nn.Module):
    """A residual block of a diffusion network, which is told the time step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.time = nn.GroupNorm(4, 16), nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 16))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.a(functional.silu(x)) + self.time(y)[:, :, None, None]
        return self.last(x + self.b(functional.silu(self.norm(h))))


class TimedTwice(nn.Module):
    """A second block: there, the image has already met the time step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Timed(), Timed()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.second(self.first(x, y), y)


def coupled(net: nn.Module, *inputs: Tensor) -> dict[str, bool]:
    return {group.name: group.coupled for group in lbyl.inspect(net.eval(), inputs).graph.groups}


@pytest.mark.parametrize("kind", [Sum, FiLM, Timed])
def test_layers_in_front_of_a_sum_of_two_inputs_are_cut(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = kind().eval()
    inputs = torch.randn(2, 8) if kind is Sum else torch.randn(2, 3, 8, 8), torch.randn(2, 4)
    restore = lbyl.LeastSquares(lbyl.Data([tuple(each.repeat_interleave(16, 0) for each in inputs)]))
    smaller = lbyl.compress(net, inputs, ratio=0.5, restore=restore, forecast=False).model
    assert smaller.a.weight.shape[0] == net.a.weight.shape[0] // 2
    if kind is Timed:
        assert smaller.stem.weight.shape[0] == 16


def test_what_is_passed_by_a_layer_stays_coupled() -> None:
    found = coupled(Timed(), torch.randn(2, 3, 8, 8), torch.randn(2, 4))
    assert found == {"stem": True, "a": False, "time.0": False, "last": False}

    again = coupled(TimedTwice(), torch.randn(2, 3, 8, 8), torch.randn(2, 4))
    assert again["second.stem"]
    assert not again["second.a"]

    class Mixed(Sum):
        """Both summands come from both inputs."""

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            both = torch.cat([x, y], 1)
            return self.last(torch.relu(self.a(both[:, :8]) + self.b(both[:, -4:])))

    assert coupled(Mixed(), torch.randn(2, 8), torch.randn(2, 4))["a"]
    assert not coupled(Sum(), torch.randn(2, 8), torch.randn(2, 4))["a"]
