"""Budgets: the error curve is the least-squares error, costs are what the cut network costs, targets are met."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from nets import Depthwise, Residual, flat_convnet, images, mlp, settle
from test_rules import Attention, OnImage
from torch import Tensor, nn

import lbyl
from lbyl.budget.allocate import allocate
from lbyl.budget.costs import Term, cost_terms, widths_of
from lbyl.budget.curves import Curve, at_the_outputs, error_curve, measured_widths
from lbyl.graph import Graph, Group, Slot
from lbyl.graph.types import Producer
from lbyl.runtime.macs import count_parameters

PROBED = lbyl.LeastSquares(moments=lbyl.Noise(images=16))


def gram(count: int = 7, seed: int = 0) -> Tensor:
    rows = torch.randn(count, 2 * count, generator=torch.Generator().manual_seed(seed)).double()
    return rows @ rows.T / count


def test_the_curve_is_what_least_squares_leaves_at_every_width() -> None:
    covariance, energy, ridge = gram(), torch.arange(1.0, 8.0).double(), 0.05
    curve = error_curve(covariance, energy, ridge)
    total = (energy * covariance.diagonal()).sum()
    strength = ridge * float(covariance.diagonal().mean())
    for kept in range(8):
        k, d = slice(0, kept), slice(kept, 7)
        solved = torch.linalg.solve(covariance[k, k] + strength * torch.eye(kept).double(), covariance[k, d])
        left = covariance.diagonal()[d] - (covariance[k, d] * solved).sum(0)
        assert curve[kept].item() == pytest.approx(float((energy[d] * left).sum() / total), rel=1e-9)
    assert curve[0].item() == pytest.approx(1)
    assert curve[7].item() == 0
    assert bool((curve[:-1] >= curve[1:]).all())


def test_channels_that_others_can_make_up_for_cost_nothing() -> None:
    rows = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).double()
    copies = rows.repeat(2, 1)
    curve = error_curve(copies @ copies.T, torch.ones(6).double(), 1e-9)
    assert curve[3].item() < 1e-6 < curve[2].item()


def test_dead_channels_make_no_curve_of_nan() -> None:
    assert error_curve(torch.zeros(4, 4).double(), torch.ones(4).double()).tolist() == [0.0] * 5
    dead = gram(5)
    dead[2], dead[:, 2] = 0, 0
    assert bool(error_curve(dead, torch.ones(5).double()).isfinite().all())


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (settle(Residual(16)), images(1, 3, 8, 8)),
        (settle(Depthwise(12)), images(1, 3, 6, 6)),
        (flat_convnet(), images(1, 3, 4, 4)),
        (settle(OnImage(Attention("fused"))), images(1, 5, 7)),
    ],
    ids=["residual", "depthwise", "flattened", "attention"],
)
def test_terms_add_up_to_the_parameters_of_the_cut_network(model: nn.Module, x: Tensor, scope: str) -> None:
    graph = lbyl.inspect(model, x).graph
    terms = cost_terms(graph, {name: float(p.numel()) for name, p in model.named_parameters()})
    result = lbyl.compress(model, x, ratio=0.5, scope=scope, restore="prune", forecast=False)
    kept = {plan.name: len(plan.keep) for plan in result.plan.groups}
    widths = {index: kept.get(group.name, group.width) for index, group in enumerate(graph.groups)}
    assert sum(term.at(widths) for term in terms) == pytest.approx(count_parameters(result.model))


@pytest.mark.parametrize("restore", ["prune", "lbyl", PROBED], ids=["prune", "lbyl", "probed"])
@pytest.mark.parametrize(("what", "share"), [("macs", 0.6), ("params", 0.5), ("size_mb", None)])
def test_budgets_are_met_within_two_percent(restore: Any, what: str, share: float | None) -> None:
    model, x = settle(Residual(24)), images(2, 3, 8, 8)
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 1e6
    budget = lbyl.Budget(**{what: share or 0.7 * size})  # pyright: ignore
    result = lbyl.compress(model, x, budget=budget, scope="all", restore=restore, forecast=False)
    before, after = result.report.parameters if what == "params" else result.report.macs or (1, 1)
    if what == "size_mb":
        left = sum(t.numel() * t.element_size() for t in [*result.model.parameters(), *result.model.buffers()])
        assert left / 1e6 == pytest.approx(0.7 * size, rel=0.02)
    else:
        assert after / before == pytest.approx(share, rel=0.02)
    assert result.report.verified is not None
    assert result.plan.settings["budget"]["name"] == "Budget"


def test_attention_scores_are_counted_though_no_parameter_has_them() -> None:
    model, x = settle(OnImage(Attention("matmul", heads=4))), images(1, 60, 7)
    half = lbyl.compress(model, x, ratio=0.5, restore="prune", forecast=False).report.macs
    assert half is not None
    result = lbyl.compress(model, x, budget=lbyl.Budget(macs=half[1] / half[0]), restore="prune", forecast=False)
    assert result.report.macs == half
    assert [row.after for row in result.report.rows] == [2]


def test_the_budget_goes_where_it_hurts_least() -> None:
    """Half of one layer's channels are small copies of the others, so more of them go, and uniform ratios do worse."""
    model, x = mlp(6, 24, 24), images(4, 6)
    with torch.no_grad():
        for part in model[2].parameters():
            part[12:] = part[:12] / 10  # the last ones by their norms
    probed = lbyl.LeastSquares(moments=lbyl.Noise(images=256))
    same = lbyl.compress(model, x, ratio=0.3, restore=probed, forecast=False).report
    share = same.parameters[1] / same.parameters[0]
    chosen = lbyl.compress(model, x, budget=lbyl.Budget(params=share), restore=probed, forecast=False).report
    assert chosen.parameters[1] <= 1.02 * same.parameters[1]
    assert same.assessment is not None
    assert chosen.assessment is not None
    assert chosen.assessment.restored < 0.7 * same.assessment.restored


def test_multiples_least_widths_ratios_and_exclusions() -> None:
    model, x = settle(Residual(32)), images(2, 3, 8, 8)
    options = {"macs": 0.8, "round_to": 8, "min_keep": 16, "max_ratio": 0.6, "exclude": ("a.*",)}
    result = lbyl.compress(model, x, budget=lbyl.Budget(**options), scope="all", restore="prune", forecast=False)
    for row in result.report.rows:
        assert row.after % 8 == 0
        assert row.after >= max(16, 0.4 * row.before)
        assert not row.group.startswith("a.")


def test_heads_are_counted_in_rows() -> None:
    graph = lbyl.inspect(settle(OnImage(Attention("fused", width=12, heads=3))), images(1, 5, 7)).graph
    group = graph.group("1.qkv")  # a head has 4 rows in each of q, k and v
    assert widths_of(group, lbyl.Budget(macs=0.5, round_to=8)) == [3, 2]


def test_every_offered_width_suits_the_blocks() -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=4), nn.Flatten()))
    group = lbyl.inspect(model, images(1, 3, 5, 5)).graph.group("0")
    assert widths_of(group, lbyl.Budget(macs=0.5)) == [12, 8, 4]


@pytest.mark.parametrize("taps", [1, 3])
def test_a_grouped_convolution_with_one_filter_a_group_is_no_mixture_of_experts(taps: int) -> None:
    """Its weight has three dimensions, too, and as many groups as rows."""
    grouped = nn.Conv1d(16, 8, taps, groups=8)
    net = settle(nn.Sequential(nn.Conv1d(2, 16, 3), nn.ReLU(), grouped, nn.ReLU(), nn.Conv1d(8, 24, 3), nn.ReLU()))
    net.append(settle(nn.Conv1d(24, 3, 3)))
    result = lbyl.compress(net, torch.randn(4, 2, 32), budget=lbyl.Budget(macs=0.7), restore=PROBED, forecast=False)
    before, after = result.report.macs
    assert after / before == pytest.approx(0.7, rel=0.02)
    assert result.report.verified is not None


def test_a_budget_out_of_reach_says_what_can_be_reached() -> None:
    model, x = settle(Residual(16)), images(2, 3, 8, 8)
    with pytest.raises(lbyl.InputError, match=r"can't be reached.*at its smallest width.*left \("):
        lbyl.compress(model, x, budget=lbyl.Budget(macs=0.05, max_ratio=0.5), restore="prune", forecast=False)
    with pytest.raises(lbyl.InputError, match="nearest that was reached"):
        lbyl.compress(mlp(6, 4), images(1, 6), budget=lbyl.Budget(params=0.9), restore="prune", forecast=False)
    with pytest.raises(lbyl.InputError, match="exclude less"):
        lbyl.compress(model, x, budget=lbyl.Budget(macs=0.5, exclude=("*",)), restore="prune", forecast=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"macs": 0.5, "params": 0.5}, "macs, params"),
        ({"macs": 0.0}, "above 0"),
        ({"params": 1.5}, "not above 1"),
        ({"latency": 0.0}, "above 0"),
        ({"latency": 0.5, "macs": 0.5}, "macs, latency"),
        ({"size_mb": -1.0}, "above 0"),
        ({"size_mb": math.inf}, "above 0"),
        ({"macs": 0.5, "round_to": 0}, "round_to"),
        ({"macs": 0.5, "round_to": "some"}, "round_to"),
        ({"macs": 0.5, "min_keep": 0}, "at least 1"),
        ({"macs": 0.5, "max_ratio": 1.0}, "largest ratio"),
    ],
)
def test_budgets_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(lbyl.InputError, match=message):
        lbyl.Budget(**arguments)


def test_a_ratio_and_a_budget_are_too_much_and_so_is_a_restorer_that_chooses() -> None:
    with pytest.raises(lbyl.InputError, match="not both"):
        lbyl.compress(mlp(), images(1, 6), ratio=0.5, budget=lbyl.Budget(macs=0.5), forecast=False)
    with pytest.raises(lbyl.InputError, match="Coreset chooses channels by itself"):
        lbyl.compress(mlp(), images(1, 6), budget=lbyl.Budget(macs=0.5), restore="coreset", forecast=False)


def test_equal_seeds_give_equal_widths() -> None:
    model, x = settle(Residual(16)), images(2, 3, 8, 8)
    plans = [
        lbyl.compress(model, x, budget=lbyl.Budget(macs=0.7), restore=PROBED, seed=4, forecast=False).plan
        for _ in range(2)
    ]
    assert plans[0].groups == plans[1].groups


def test_greedy_finds_the_best_of_a_small_case() -> None:
    """Two independent groups with known curves: every pair of widths is tried."""
    graph = lbyl.inspect(mlp(6, 6, 6), images(1, 6)).graph
    errors = [torch.tensor([1, 0.8, 0.5, 0.3, 0.2, 0.1, 0.0]), torch.tensor([1, 0.4, 0.2, 0.1, 0.05, 0.01, 0.0])]
    curves = [Curve(index, tuple(range(6)), error.double()) for index, error in enumerate(errors)]
    terms = [Term(6.0, ((0, {0: 1}),), (6,)), Term(6.0, ((0, {1: 1}),), (6,))]
    found = allocate(graph, curves, terms, 7.0, lbyl.Budget(params=0.5))
    tried = {(a, b): float(errors[0][a] + errors[1][b]) for a in range(1, 7) for b in range(1, 7) if a + b <= 7}
    assert sum(found.values()) <= 7
    assert float(errors[0][found[0]] + errors[1][found[1]]) <= min(tried.values()) + 0.11


def test_the_error_at_the_outputs_is_measured_at_several_widths() -> None:
    """Half of the channels change all of the outputs, as an eighth nearly does: outputs can't differ more than that."""
    width = 16
    own = Curve(0, tuple(range(width)), torch.linspace(1, 0, width + 1).double())
    assert measured_widths(own, (0.125, 0.5, 0.875)) == [14, 8, 2]
    found = at_the_outputs(own, {14: 0.8, 8: 1.0, 2: 1.0})
    assert [float(found.error[kept]) for kept in (14, 8, 2)] == pytest.approx([0.8, 1, 1])
    assert float(found.error[15]) == pytest.approx(0.4)  # the ratio of both errors goes on as it was
    assert bool((found.error.diff() <= 0).all())
    assert float(at_the_outputs(own, {8: 1.0}).error[14]) == pytest.approx(0.25)


def test_groups_whose_cuts_change_nothing_or_are_not_tried_keep_their_curve() -> None:
    flat = Curve(0, (0, 1, 2, 3), torch.tensor([1.0, 0, 0, 0, 0]).double())
    assert measured_widths(flat, (0.125, 0.5)) == []
    assert measured_widths(flat, ()) == []
    assert at_the_outputs(flat, {}) is flat


def test_a_network_somewhat_below_a_budget_meets_it() -> None:
    """One group of eight channels: a share of the cost is a number of eighths."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    asked = {"restore": "prune", "forecast": False}
    result = lbyl.compress(net, torch.randn(1, 6), budget=lbyl.Budget(macs=0.65), **asked)  # pyright: ignore
    assert result.report.macs == (80, 50)
    with pytest.raises(lbyl.BudgetError, match=r"within 2%: the nearest .* \(0\.625\)"):
        lbyl.compress(net, torch.randn(1, 6), budget=lbyl.Budget(macs=0.68), **asked)  # pyright: ignore


def test_a_coarse_last_step_is_made_up_for_elsewhere() -> None:
    """Heads are a third of the cost each. After one goes, neurons come back until the budget is met."""
    coarse = Curve(0, (0, 1), torch.tensor([9.0, 0.5, 0.0]).double())
    fine = Curve(1, tuple(range(100)), torch.linspace(1, 0, 101).double().square())
    groups = tuple(
        Group(name, width, (producer(name, width),), (), (), (0,) * width, False, (), (), None)
        for name, width in (("heads", 2), ("neurons", 100))
    )
    graph = Graph(groups, (), ())
    terms = [Term(60.0, ((0, {0: 1}),), (2,)), Term(40.0, ((0, {1: 1}),), (100,))]
    kept = allocate(graph, [coarse, fine], terms, 60.0, lbyl.Budget(macs=0.6))
    assert kept[0] == 1
    cost = sum(term.at(kept) for term in terms)
    assert 60 * 0.98 <= cost <= 60


def producer(name: str, width: int) -> Producer:
    return Producer(name, Slot(f"{name}.weight", 0, tuple(range(width))), None, ())


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (lbyl.Budget(size_mb=100), "there is nothing to cut"),
        (lbyl.Budget(macs=1.0), "there is nothing to cut"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(budget: lbyl.Budget, told: str) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with pytest.raises(lbyl.InputError, match=told):
        lbyl.compress(net, torch.randn(1, 6), budget=budget, restore="prune", forecast=False)


@pytest.mark.parametrize("amount", [0.0, 0.01])
def test_a_missed_drop_of_accuracy_says_what_it_is(amount: float) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()

    def accuracy(model: nn.Module) -> float:
        return 0.9 if model[0].out_features == 8 else 0.6  # pyright: ignore

    with pytest.raises(lbyl.InputError, match=r"it is 0\.3; raise this budget"):
        lbyl.compress(net, torch.randn(1, 6), budget=lbyl.Budget(accuracy_drop=amount), evaluate=accuracy)


def test_a_pattern_to_exclude_that_matches_nothing_is_told_of() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    budget = lbyl.Budget(macs=0.5, exclude=("layr*", "2"))
    notes = lbyl.compress(net, torch.randn(1, 6), budget=budget, restore="prune", forecast=False).report.notes
    assert [note for note in notes if note.startswith("exclude: 'layr*' matches no group or layer")]
    assert not any("'2'" in note for note in notes)


@pytest.mark.parametrize("widths", [(8, 16), (8, 8, 8), (8, 32, 8)])
def test_few_channels_meet_every_budget(widths: tuple[int, ...]) -> None:
    """Where no single step comes close, one group gets wider and another one narrower."""
    torch.manual_seed(0)
    layers, before = list[nn.Module](), 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)).eval()
    for percent in range(80, 20, -5):
        share = percent / 100
        budget = lbyl.Budget(macs=share)
        report = lbyl.compress(net, images(2, 3, 16, 16), budget=budget, restore="prune", forecast=False).report
        assert -0.05 <= report.macs[1] / report.macs[0] / share - 1 <= 0.02


def test_a_wide_group_gets_narrower_than_one_of_its_steps() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(16, 4096), nn.ReLU(), nn.Linear(4096, 4)).eval()
    for share in (0.02, 0.01, 0.002):
        budget = lbyl.Budget(macs=share, max_ratio=0.9999, round_to=None)
        report = lbyl.compress(wide, torch.randn(2, 16), budget=budget, restore="prune", forecast=False).report
        assert report.macs is not None
        assert 0.94 * share <= report.macs[1] / report.macs[0] <= share * 1.02
