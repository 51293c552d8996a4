"""Layers that have only some of a group's channels keep at least one: under a norm over a concatenation, or a part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lbyl


class Joined(nn.Module):
    """Two layers whose outputs are normalized together, so that blocks of the norm have channels of both."""

    def __init__(self, norm: nn.Module, faint: str = "a") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 16, 3), norm
        self.last = nn.Conv2d(24, 2, 3)
        with torch.no_grad():
            getattr(self, faint).weight.mul_(1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu())


class LastAxis(nn.Module):
    """A layer norm over a part of a layer's outputs; the other part goes around it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.last = nn.Linear(6, 16), nn.LayerNorm(4), nn.Linear(16, 3)
        self.sizes = [4, 12]
        with torch.no_grad():
            self.a.weight[:4].mul_(1e-3)

    def forward(self, x: Tensor) -> Tensor:
        small, large = self.a(x).split(self.sizes, -1)
        return self.last(torch.cat([self.norm(small), large], -1).tanh())


@pytest.mark.parametrize("faint", ["a", "b"])
@pytest.mark.parametrize("settings", [{"ratio": 0.75}, {"budget": lbyl.Budget(params=0.51)}])
def test_no_layer_before_a_common_norm_loses_all(faint: str, settings: dict[str, Any]) -> None:
    net, x = Joined(nn.GroupNorm(4, 24), faint).eval(), torch.randn(2, 3, 8, 8)
    result = lbyl.compress(net, x, restore="prune", criterion="l1", forecast=False, scope="all", **settings)
    assert [row.group for row in result.report.rows] == ["a"]
    kept = {name: getattr(result.model, name).out_channels for name in "ab"}
    assert min(kept.values()) >= 1
    assert kept[faint] < 8
    assert result.model.norm.num_channels == sum(kept.values()) == result.model.last.in_channels
    assert result.report.verified is not None
    assert result.report.verified < 1e-6


def test_a_part_under_a_layer_norm_keeps_a_channel() -> None:
    net, x = LastAxis().eval(), torch.randn(4, 6)
    result = lbyl.compress(net, x, ratio=0.5, scope="all", restore="prune", criterion="l1", forecast=False)
    assert [(row.group, row.after) for row in result.report.rows] == [("a", 8)]
    assert result.model.norm.normalized_shape == (1,)
    assert result.report.verified is not None
    assert result.report.verified < 1e-6


def test_all_blocks_keep_more_if_one_channel_each_is_too_few() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 12)
            self.readers = nn.ModuleList([nn.Linear(4, 2) for _ in range(3)])
            self.norm, self.sizes = nn.LayerNorm(12), [4, 4, 4]

        def forward(self, x: Tensor) -> Tensor:
            parts = self.norm(self.first(x)).split(self.sizes, -1)
            return sum(reader(part) for reader, part in zip(self.readers, parts, strict=True))  # pyright: ignore

    torch.manual_seed(0)
    result = lbyl.compress(
        Split().eval(), torch.randn(4, 6), ratio=0.9, scope="all", restore="prune", criterion="l1", forecast=False
    )
    assert [row.after for row in result.report.rows] == [3]
    assert [reader.in_features for reader in result.model.readers] == [1, 1, 1]


class Padded(nn.Module):
    """A shortcut without weights: channels of zeros are added to those that there are."""

    def __init__(self, pad: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pad = pad
        self.first, self.inner, self.wide = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.inner(x.relu())
        y = self.wide(x.relu())
        return self.last((self.pad(x[:, :, ::2, ::2], y) + y).relu())


@pytest.mark.parametrize(
    "pad",
    [
        lambda x, y: functional.pad(x, (0, 0, 0, 0, 4, 4)),
        lambda x, y: functional.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])),
        lambda x, y: torch.cat([x, torch.zeros(x.shape[0], y.shape[1] - x.shape[1], *x.shape[2:])], 1),
    ],
    ids=["a number", "the difference", "zeros"],
)
def test_channels_that_a_shortcut_adds_stay_and_the_others_are_cut(pad: Callable[[Tensor, Tensor], Tensor]) -> None:
    result = lbyl.compress(
        Padded(pad).eval(), torch.randn(2, 3, 12, 12), ratio=0.5, scope="all", restore="prune", forecast=False
    )
    assert result.model.first.out_channels == result.model.inner.out_channels == 4
    assert result.model.wide.out_channels == 12
    assert result.report.verified is not None
    assert result.report.verified < 1e-6


class Split(nn.Module):
    """The code takes two parts of a layer's outputs, of sizes that the module keeps."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.by_name, self.most, self.rest = by_name, 12, 4
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
        with torch.no_grad():
            self.a.weight[12:].mul_(0.01)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        first, last = (
            torch.split(y, [self.most, self.rest], 1) if self.by_name else (y[:, : self.most], y[:, self.most :])
        )
        return self.b(torch.cat([first, last], 1).relu())


@pytest.mark.parametrize("by_name", [True, False])
def test_each_part_of_a_split_keeps_a_channel(by_name: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    result = lbyl.compress(Split(by_name).eval(), x, ratio=0.25, criterion="l2", restore="prune", forecast=False)
    assert result.model.b.in_features == 12
    result.save(tmp_path / "out")
    torch.testing.assert_close(lbyl.load(tmp_path / "out", Split(by_name).eval())(x), result.model(x))
