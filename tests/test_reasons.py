"""Reasons why layers stay whole name the tensor or the line, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lbyl


class Scaled(nn.Module):
    """Its channels are multiplied with numbers that come from somewhere."""

    def __init__(self, scale: Callable[[Scaled], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.table, self.tables = scale, torch.rand(16), [torch.rand(16)]
        self.register_buffer("unsaved", torch.rand(16), persistent=False)
        self.register_buffer("saved", torch.rand(16))
        self.enter, self.inner, self.leave = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x)) * self.scale(self)
        return self.leave(torch.relu(self.inner(x)))


SCALES: dict[str, tuple[Callable[[Scaled], Tensor], str]] = {
    "attribute": (lambda net: net.table, "attribute 'table' of 'net', a tensor of fixed size; as a buffer"),
    "part of an attribute": (lambda net: net.table[None].to(net.enter.weight.dtype).expand(4, -1), "'table' of 'net'"),
    "list": (lambda net: net.tables[0], "attribute 'tables' of 'net', a tensor of fixed size"),
    "unsaved": (lambda net: net.get_buffer("unsaved"), "buffer 'net.unsaved', of fixed size as it is not saved"),
    "line": (lambda net: torch.linspace(0, 1, 16), "a value of fixed size (test_reasons.py:"),
}


def reason(net: nn.Module, x: Tensor, group: str) -> str:
    result = lbyl.compress(net.eval(), x, ratio=0.5, restore="prune", forecast=False)
    return dict(result.report.left).get(group, "")


@pytest.mark.parametrize("name", SCALES)
def test_values_of_fixed_size_are_named(name: str) -> None:
    scale, told = SCALES[name]
    assert told in reason(Whole(scale), torch.randn(4, 6), "net.enter")


def test_the_advice_helps() -> None:
    assert not reason(Whole(lambda net: net.get_buffer("saved")), torch.randn(4, 6), "net.enter")


class Whole(nn.Module):
    def __init__(self, scale: Callable[[Scaled], Tensor]) -> None:
        super().__init__()
        self.net = Scaled(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Tokens(nn.Module):
    """An MLP over the positions, of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 3)
        self.mix, self.unmix = nn.Conv1d(10, 40, 1), nn.Conv1d(40, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.unmix(functional.gelu(self.mix(x))))


def test_convolutions_over_positions_are_not_called_unused() -> None:
    result = lbyl.compress(Tokens().eval(), torch.randn(2, 10, 6), ratio=0.5, scope="all", restore="prune")
    assert any("conv1d in 'mix' mixes positions, and no channels" in note for note in result.report.notes)
