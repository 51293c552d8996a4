"""How many channels go, and where: ratios, globs, scopes, blocks, seeds."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import compress, images, mlp, residual, settle
from torch import Tensor, nn
from torch.nn import functional as F

import lbyl
from lbyl.runtime.seeding import generator_for
from lbyl.selection.select import kept_count

STREAM = images(2, 3, 8, 8)


def widths(result: lbyl.Result) -> dict[str, int]:
    return {group.name: len(group.keep) for group in result.plan.groups}


@given(st.integers(1, 4096), st.integers(0, 99))
def test_kept_count_is_the_exact_floor(width: int, percent: int) -> None:
    """In exact arithmetic: 10 (1 - 0.9) must be 1, though floating point says 0.9999999999999998."""
    exact = width * (1 - Fraction(percent, 100))
    assert kept_count(width, percent / 100) == max(1, exact.__floor__())


def test_one_ratio_for_all_inner_groups() -> None:
    result = compress(residual(), STREAM, ratio=0.25)
    assert widths(result) == {"a.conv1": 6, "b.conv1": 12}
    assert {name for name, _ in result.report.left} == {"stem.0", "b.conv2", "fc"}


def test_scope_all_takes_the_stream_too() -> None:
    result = compress(residual(), STREAM, ratio=0.25, scope="all")
    assert widths(result) == {"stem.0": 6, "a.conv1": 6, "b.conv1": 12, "b.conv2": 12}


def test_globs_match_groups_and_producing_layers_and_the_last_one_counts() -> None:
    assert widths(compress(residual(), STREAM, ratio={"a.*": 0.5})) == {"a.conv1": 4}
    by_layer = compress(residual(), STREAM, ratio={"a.conv2": 0.5}, scope="all")
    assert widths(by_layer) == {"stem.0": 4}  # a.conv2 writes the stem's stream
    last = compress(residual(), STREAM, ratio={"*": 0.5, "b.*": 0.25, "a.conv1": 0})
    assert widths(last) == {"b.conv1": 12}
    assert ("a.conv1", "ratio 0") in last.report.left


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(lbyl.InputError, match=r"'c\.\*' matches no group"):
        compress(residual(), STREAM, ratio={"c.*": 0.5})


@pytest.mark.parametrize("ratio", [1, 1.5, -0.1, float("nan"), "half", True])
def test_ratios_out_of_range_are_errors(ratio: object) -> None:
    with pytest.raises(lbyl.InputError, match="at least 0 and below 1"):
        compress(mlp(), images(2, 6), ratio=ratio)  # pyright: ignore[reportArgumentType]
    with pytest.raises(lbyl.InputError, match="at least 0 and below 1"):
        compress(mlp(), images(2, 6), ratio={"*": ratio})  # pyright: ignore[reportArgumentType]


def test_an_unknown_scope_is_an_error() -> None:
    with pytest.raises(lbyl.InputError, match="inner"):
        compress(mlp(), images(2, 6), scope="outer")


def test_nothing_to_prune_is_an_error_that_says_why() -> None:
    with pytest.raises(lbyl.InputError, match="ratio 0"):
        compress(mlp(), images(2, 6), ratio=0)
    with pytest.raises(lbyl.InputError, match="output"):
        compress(nn.Sequential(nn.Linear(6, 3)), images(2, 6))


def test_at_least_one_channel_stays() -> None:
    assert widths(compress(mlp(6, 10, 8), images(2, 6), ratio=0.99)) == {"0": 1, "2": 1}


def test_every_block_of_a_grouped_convolution_loses_equally_many() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 2, 1))
    settle(model)
    with torch.no_grad():
        model[0].weight[:4] *= 100  # by norm alone, all of the first block would stay
        model[2].weight[6:] *= 100
    result = compress(model, images(2, 3, 5, 5), ratio=0.5)
    keep = {group.name: group.keep for group in result.plan.groups}
    assert [sum(k < 4 for k in keep["0"]), sum(k >= 4 for k in keep["0"])] == [2, 2]
    assert [sum(k < 6 for k in keep["2"]), sum(k >= 6 for k in keep["2"])] == [3, 3]
    assert result.model[2].groups == 2
    assert result.model[2].weight.shape == (6, 2, 3, 3)


def test_no_group_s_draws_depend_on_another_group() -> None:
    def drawn(ratio: object) -> tuple[int, ...]:
        result = compress(mlp(6, 16, 16), images(2, 6), ratio=ratio, criterion="random", seed=3)  # pyright: ignore
        return next(group.keep for group in result.plan.groups if group.name == "2")

    assert drawn(0.5) == drawn({"2": 0.5}) == drawn({"0": 0.9, "2": 0.5})


def test_groups_of_equal_width_draw_differently() -> None:
    result = compress(mlp(6, 64, 64), images(2, 6), criterion="random")
    first, second = (group.keep for group in result.plan.groups)
    assert first != second
    assert generator_for(0, "a").initial_seed() != generator_for(1, "a").initial_seed()


def test_parameters_of_the_network_itself_are_called_by_their_names() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.w1, self.w2 = nn.Parameter(torch.randn(24, 16)), nn.Parameter(torch.randn(20, 24))
            self.w3 = nn.Parameter(torch.randn(5, 20))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(F.linear(x, self.w1).relu(), self.w2).relu(), self.w3)

    x = torch.randn(2, 16)
    result = lbyl.compress(Bare(), x, ratio={"w1": 0.5}, restore="prune", forecast=False)
    assert [(row.group, row.after) for row in result.report.rows] == [("w1", 12)]
    assert dict(result.report.left) == {"w2": "ratio 0", "w3": "the model's output"}


def test_what_a_budget_leaves_whole_is_told_so() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 512), nn.Linear(512, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).relu()).relu())

    budget = lbyl.Budget(params=0.9, exclude=("a",))
    result = lbyl.compress(Uneven(), torch.randn(2, 6), budget=budget, restore="prune", forecast=False)
    assert dict(result.report.left)["a"] == "excluded"
    almost = lbyl.Budget(params=0.9, min_keep=16)
    others = lbyl.compress(Uneven(), torch.randn(2, 6), budget=almost, restore="prune", forecast=False)
    assert dict(others.report.left)["a"] == "the budget leaves it at full width"
