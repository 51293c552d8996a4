"""Layers that rearrange axes by a pattern, as those of einops do: the lengths that they keep follow a cut."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbyl


def groups(side: str) -> list[list[str]]:
    return [found.strip("()").split() for found in re.findall(r"\([^)]*\)|\w+", side)]


class Rearrange(nn.Module):
    """A stand-in for ``einops.layers.torch.Rearrange``, with the same attributes and the same way of being copied.

    As there, forward reads what was made of the arguments, and not the arguments.
    """

    def __init__(self, pattern: str, **axes_lengths: int) -> None:
        super().__init__()
        self.pattern, self.axes_lengths = pattern, axes_lengths
        self._multirecipe = self.multirecipe()
        self._axes_lengths = tuple(axes_lengths.items())

    def multirecipe(self) -> Any:
        return tuple(groups(side) for side in self.pattern.split("->"))

    def __getstate__(self) -> dict[str, Any]:
        return {"pattern": self.pattern, "axes_lengths": self.axes_lengths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["pattern"], **state["axes_lengths"])

    def forward(self, x: Tensor) -> Tensor:
        return self.arranged(x, *self._multirecipe, dict(self._axes_lengths))

    def arranged(self, x: Tensor, left: list[list[str]], right: list[list[str]], given: dict[str, int]) -> Tensor:
        lengths = dict(given)
        for group, size in zip(left, x.shape, strict=True):
            known = prod(lengths[name] for name in group if name in lengths)
            assert size % known == 0, "mismatch"
            assert size == known or any(name not in lengths for name in group), "mismatch"
            lengths |= {name: size // known for name in group if name not in lengths}
        names = [name for group in left for name in group]
        x = x.reshape([lengths[name] for name in names]) if len(names) > len(left) else x
        x = x.permute([names.index(name) for group in right for name in group])
        merged = any(len(group) > 1 for group in right)
        return x.reshape([prod(lengths[name] for name in group) for group in right]) if merged else x


class Older(Rearrange):
    """What older versions of einops make of the arguments has the lengths in it."""

    def __init__(self, pattern: str, **axes_lengths: int) -> None:
        super().__init__(pattern, **axes_lengths)
        del self._multirecipe, self._axes_lengths
        self._recipe = self.recipe()

    def recipe(self) -> Any:
        return *self.multirecipe(), dict(self.axes_lengths)

    def forward(self, x: Tensor) -> Tensor:
        return self.arranged(x, *self._recipe)


class Attention(nn.Module):
    """Attention whose heads are made and joined by layers."""

    def __init__(self, split: nn.Module, merge: nn.Module) -> None:
        super().__init__()
        self.enter, self.qkv, self.leave = nn.Linear(8, 16), nn.Linear(16, 48, bias=False), nn.Linear(16, 3)
        self.split, self.merge = split, nn.Sequential(merge, nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = map(self.split, self.qkv(x).chunk(3, -1))
        return self.leave(x + self.merge((q @ k.transpose(-1, -2)).softmax(-1) @ v))


class Fused(Attention):
    """Queries, keys and values are split together, as in MONAI."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = self.split(self.qkv(x)).unbind(0)
        return self.leave(x + self.merge((q @ k.transpose(-1, -2)).softmax(-1) @ v))


CASES = {
    "heads": (Attention, lambda: Rearrange("b n (h d) -> b h n d", h=4), lambda: Rearrange("b h n d -> b n (h d)")),
    "as long as a head": (
        Attention,
        lambda: Rearrange("b n (h d) -> b h n d", d=4, h=4),
        lambda: Rearrange("b h n d -> b n (h d)", h=4),
    ),
    "given again": (
        Attention,
        lambda: Rearrange("b n (h d) -> b h n d", h=4),
        lambda: Rearrange("b h n d -> b n (h d)", h=4, d=4),
    ),
    "size of a head": (
        Attention,
        lambda: Rearrange("b n (h d) -> b h n d", d=4),
        lambda: Rearrange("b h n d -> b n (h d)", d=4),
    ),
    "fused": (
        Fused,
        lambda: Rearrange("b n (three h d) -> three b h n d", three=3, h=4),
        lambda: Rearrange("b h n d -> b n (h d)"),
    ),
    "older": (Attention, lambda: Older("b n (h d) -> b h n d", h=4), lambda: Older("b h n d -> b n (h d)", h=4)),
}


@pytest.mark.parametrize("case", CASES)
def test_heads_are_cut_and_the_lengths_follow(case: str, tmp_path: Path) -> None:
    kind, split, merge = CASES[case]
    torch.manual_seed(0)
    net, x = kind(split(), merge()).eval(), torch.randn(2, 5, 8)
    expected = net(x)
    result = lbyl.compress(net, x, ratio=0.5, restore="prune", forecast=False)

    assert [row.group for row in result.report.rows] == ["qkv"]
    assert result.report.verified < 1e-12
    after = {**result.model.split.axes_lengths, **result.model.merge[0].axes_lengths}
    given = {**net.split.axes_lengths, **net.merge[0].axes_lengths}
    assert after == {name: 2 if name == "h" else length for name, length in given.items()}
    assert torch.equal(net(x), expected)

    result.save(tmp_path / "saved")
    loaded = lbyl.load(tmp_path / "saved", kind(split(), merge()))
    torch.testing.assert_close(loaded(x), result.model(x))


def test_lengths_of_a_layer_that_other_modules_keep_too_stay_theirs() -> None:
    """Layers that are made from one dictionary do not change each other."""
    torch.manual_seed(0)
    split, other = Rearrange("b n (h d) -> b h n d", h=4), Rearrange("b (h d) -> b h d", h=4)
    other.axes_lengths = split.axes_lengths
    net = Attention(split, Rearrange("b h n d -> b n (h d)")).eval()
    net.other = other
    result = lbyl.compress(net, torch.randn(2, 5, 8), ratio=0.5, restore="prune", forecast=False)
    assert result.model.split.axes_lengths == {"h": 2}
    assert result.model.other.axes_lengths == {"h": 4}
