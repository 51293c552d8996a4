"""Heads whose size the code takes from the width of what they read are cut together with it."""

from __future__ import annotations

import pytest
import torch
from nets import images
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import lbyl
from lbyl.runtime.output_error import outputs_error


class Attention(nn.Module):
    """As many vision transformers have it: ``C // num_heads`` is the size of a head."""

    def __init__(self, width: int, heads: int, own_size: bool) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        if own_size:
            self.head_dim = width // heads

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        size = self.head_dim if hasattr(self, "head_dim") else width // self.num_heads
        q, k, v = self.qkv(x).reshape(count, tokens, 3, self.num_heads, size).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(count, tokens, -1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, own_size: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads, own_size)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.down(self.up(self.second(x)).relu())


class Transformer(nn.Module):
    def __init__(self, heads: int = 6, own_size: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 48)
        self.blocks = nn.Sequential(*(Block(48, heads, own_size) for _ in range(2)))
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


HEADS, STREAM = ("blocks.0.attention.qkv", "blocks.1.attention.qkv"), "embed"


def counts(result: lbyl.Result) -> dict[str, tuple[int, int]]:
    return {row.group: (row.before, row.after) for row in result.report.rows}


@pytest.mark.parametrize(("ratio", "left"), [(0.1, (6, 48)), (0.3, (5, 40)), (0.4, (4, 32)), (0.5, (3, 24))])
def test_both_lose_the_same_share_at_any_ratio(ratio: float, left: tuple[int, int]) -> None:
    net, x = Transformer().eval(), images(2, 7, 5)
    result = lbyl.compress(net, x, ratio=ratio, scope="all", restore="prune", strict=True, forecast=False)
    found = counts(result)
    whole = left == (6, 48)
    assert [found.get(name) for name in HEADS] == [None if whole else (6, left[0])] * 2
    assert found.get(STREAM) == (None if whole else (48, left[1]))
    assert result.report.verified is not None
    assert result.report.verified < 1e-6


@pytest.mark.parametrize("how", ["a part", "a weight that is computed"])
def test_so_it_is_in_parts_and_beside_layers_that_compute_their_weight(how: str) -> None:
    net, x = Transformer().eval(), images(2, 7, 5)
    part, prefix, whole = ("0", "0.", nn.Sequential(net)) if how == "a part" else (None, "", net)
    if part is None:
        weight_norm(net.blocks[0].get_submodule("up"))
    result = lbyl.compress(whole, x, ratio=0.3, scope="all", restore="prune", submodule=part, forecast=False)
    found = counts(result)
    assert [found[prefix + name] for name in (*HEADS, STREAM)] == [(6, 5), (6, 5), (48, 40)]


def test_restoration_takes_part() -> None:
    net, x = Transformer().eval(), images(2, 7, 5)
    seen, how = images(64, 7, 5, seed=3), {"ratio": 0.34, "scope": "all", "forecast": False}
    restored = lbyl.compress(net, x, restore=lbyl.LeastSquares(lbyl.Noise(128)), **how)
    pruned = lbyl.compress(net, x, restore="prune", **how)
    assert counts(restored)[STREAM] == (48, 32)
    with torch.no_grad():
        whole, one, other = (model(seen) for model in (net, restored.model, pruned.model))
    assert outputs_error(whole, one) < outputs_error(whole, other)


def test_by_themselves_they_stay_and_the_reason_is_said() -> None:
    net, x = Transformer().eval(), images(2, 7, 5)
    result = lbyl.compress(net, x, ratio=0.5, restore="prune", forecast=False)
    assert set(counts(result)) == {"blocks.0.up", "blocks.1.up"}
    left = dict(result.report.left)
    assert all(f"{STREAM!r} has to lose the same share" in left[name] for name in HEADS)


def test_heads_of_a_size_of_their_own_go_by_themselves() -> None:
    net, x = Transformer(own_size=True).eval(), images(2, 7, 5)
    result = lbyl.compress(net, x, ratio=0.5, restore="prune", strict=True, forecast=False)
    assert [counts(result)[name] for name in HEADS] == [(6, 3)] * 2


def test_a_budget_in_scope_all_is_met_without_them() -> None:
    net, x = Transformer().eval(), images(2, 7, 5)
    result = lbyl.compress(net, x, budget=lbyl.Budget(macs=0.7), scope="all", restore="prune", forecast=False)
    assert result.report.macs is not None
    assert result.report.macs[1] <= 0.72 * result.report.macs[0]
    assert any("must lose the same share" in note for note in result.report.notes)


class Reduced(nn.Module):
    """As in pyramid vision transformers: keys and values are made from fewer positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads, self.embed, self.head = 4, nn.Linear(5, 32), nn.Linear(32, 3)
        self.reduce, self.norm, self.first = nn.Conv1d(32, 32, 2, 2), nn.LayerNorm(32), nn.LayerNorm(32)
        self.q, self.kv, self.proj = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        count, tokens, width = x.shape
        y = self.first(x)
        fewer = self.norm(self.reduce(y.transpose(1, 2)).reshape(count, width, -1).transpose(1, 2))
        q = self.q(y).reshape(count, tokens, self.num_heads, width // self.num_heads).transpose(1, 2)
        kv = self.kv(fewer).reshape(count, -1, 2, self.num_heads, width // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + self.proj(mixed.transpose(1, 2).reshape(count, tokens, width))
        return self.head(x.mean(1))


def test_reduced_positions_go_with_them() -> None:
    net, x = Reduced().eval(), images(2, 8, 5)
    result = lbyl.compress(net, x, ratio=0.3, scope="all", restore="prune", strict=True, forecast=False)
    assert counts(result) == {"embed": (32, 24), "q": (4, 3), "reduce": (32, 24)}
    assert result.report.verified is not None
    assert result.report.verified < 1e-6
