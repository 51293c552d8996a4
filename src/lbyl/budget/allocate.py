"""Choose the width of every group: the least predicted error at the cost that the budget allows."""

from __future__ import annotations

import glob
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lbyl.budget.budget import REACHED_WITHIN, Budget
from lbyl.budget.costs import Cost, Costing, Term, counted, widths_of
from lbyl.budget.curves import Curve, Curves
from lbyl.budget.latency import timed
from lbyl.errors import InputError
from lbyl.graph import Graph
from lbyl.io.huggingface import is_language_model, is_pretrained_model
from lbyl.runtime.inputs import ExampleInputs
from lbyl.selection.select import KeptCounts


def smallest_cost(graph: Graph, curves: Sequence[Curve], terms: Sequence[Term], budget: Budget) -> float:
    """What the network costs with every group that has a curve as small as it may be."""
    widths = {index: group.width for index, group in enumerate(graph.groups)}
    widths |= {curve.group: widths_of(graph.groups[curve.group], budget)[-1] for curve in curves}
    return sum(term.at(widths) for term in terms)


def allocate(
    graph: Graph, curves: Sequence[Curve], terms: Sequence[Term], target: float, budget: Budget
) -> dict[int, int]:
    """Kept channels of every group that has a curve, such that the cost is at most ``target``.

    Greedy: each step makes one group smaller, the one that adds the least error for each unit of cost that it saves.
    All smaller widths of a group are candidates, not only the next one, for an error curve may be steep at first and
    flat after that.

    Raises:
        InputError: even the smallest widths cost more; the message says how much.
    """
    widths = {index: group.width for index, group in enumerate(graph.groups)}
    bundles = bundled(graph, curves, budget)
    offered = {first: widths_of(graph.groups[first], budget, len(bundle)) for first, bundle in bundles.items()}
    first_of = {group: first for first, bundle in bundles.items() for group in bundle}
    touching: dict[int, list[Term]] = defaultdict(list)
    neighbors: dict[int, set[int]] = defaultdict(set)
    for term in terms:
        near = {first_of[group] for _, groups in term.dims for group in groups if group in first_of}
        for first in near:
            touching[first].append(term)
            neighbors[first] |= near
    curve_of = {curve.group: curve for curve in curves}

    floor = smallest_cost(graph, curves, terms, budget)
    cost = sum(term.at(widths) for term in terms)
    if floor > target * (1 + REACHED_WITHIN):
        raise InputError(
            f"the budget can't be reached: it allows {target:,.0f}, and with every group as small as it may be "
            f"{floor:,.0f} of {cost:,.0f} {budget.unit} are left ({floor / cost:.1%}); raise the budget or max_ratio, "
            "or exclude less"
        )

    def error(first: int, width: int) -> float:
        return sum(curve_of[group].weight * float(curve_of[group].error[width]) for group in bundles[first])

    def best(first: int) -> tuple[float, int, float]:
        """Error added for each unit of cost saved, the width, and the cost saved."""
        now = widths[first]
        before, so_far = sum(term.at(widths) for term in touching[first]), error(first, now)
        found = (math.inf, now, 0.0)
        for width in offered[first]:
            if width >= now:
                continue
            after = widths | dict.fromkeys(bundles[first], width)
            saved = before - sum(term.at(after) for term in touching[first])
            # A step must not go far below the target.
            if saved <= 0 or (cost - saved < target * (1 - REACHED_WITHIN / 2) and width < _next(offered[first], now)):
                continue
            found = min(found, ((error(first, width) - so_far + 1e-12) / saved, width, saved), key=lambda each: each[0])
        return found

    steps = {first: best(first) for first in offered}
    while cost > target:
        group = min(steps, key=lambda g: steps[g][0])
        rate, width, saved = steps[group]
        if math.isinf(rate):
            break
        fitting = [g for g in steps if steps[g][1] < widths[g] and cost - steps[g][2] >= target * (1 - REACHED_WITHIN)]
        if cost - saved < target * (1 - REACHED_WITHIN) and fitting:
            group = min(fitting, key=lambda g: steps[g][0])
            rate, width, saved = steps[group]
        widths |= dict.fromkeys(bundles[group], width)
        cost = sum(term.at(widths) for term in terms)
        for other in neighbors[group] & steps.keys():
            steps[other] = best(other)
    return {group: widths[group] for group in first_of}


def bundled(graph: Graph, curves: Sequence[Curve], budget: Budget) -> dict[int, tuple[int, ...]]:
    """The groups that get one width, by the first of them: each by itself, or those of one name in all layers."""
    found: dict[object, list[int]] = defaultdict(list)
    for curve in curves:
        group = graph.groups[curve.group]
        alike = _LAYER.sub("*", group.name), group.width, len(set(group.blocks))
        found[alike if budget.uniform_layers else curve.group].append(curve.group)
    return {bundle[0]: tuple(bundle) for bundle in found.values()}


_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")
"""The number of a layer in a name."""


def _next(options: Sequence[int], now: int) -> int:
    """The largest width below the present one."""
    return max((width for width in options if width < now), default=now)


_CORRECTIONS = 6
_LOUDEST = 0.1
"""A measured cost whose margin is a larger share of the budget can't tell whether the budget is met."""


@dataclass(frozen=True)
class Widths:
    """The chosen widths: kept channels by group index."""

    kept: Mapping[int, int]
    notes: tuple[str, ...] = ()

    def counts(self, graph: Graph) -> KeptCounts:
        """What `select` takes: the groups that lose channels."""
        return KeptCounts({index: kept for index, kept in self.kept.items() if kept < graph.groups[index].width})

    def ratios(self, graph: Graph) -> dict[str, float]:
        """The ratio of each group, under a pattern that matches its name alone: what the plan records."""
        found = {"*": 0.0}
        for index, kept in self.kept.items():
            group = graph.groups[index]
            found[glob.escape(group.name)] = 1 - kept / group.width
        return found


def choose_widths(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    measured: Curves,
    budget: Budget,
    cut: Callable[[KeptCounts], nn.Module],
) -> Widths:
    """The widths with the least predicted error at which the network costs what the budget allows.

    Args:
        model: the unpruned network in evaluation mode.
        inputs: what it is called with; MACs are counted and time is measured on it.
        graph: its channel graph.
        measured: the error curves of the groups that may lose channels.
        budget: what may stay.
        cut: cuts the network to kept counts. The cost of the result is measured, for the prediction may be off.

    Raises:
        InputError: the budget can't be reached within 2 %; or, for a latency, within the margin of its measurement
            where that is wider.
    """
    if budget.round_to is None and is_language_model(model):
        try:
            return _chosen(model, inputs, graph, measured, budget, cut)
        except InputError:  # of finer widths, some may meet it
            pass
    fine = replace(budget, round_to=1) if budget.round_to is None else budget
    return _chosen(model, inputs, graph, measured, fine, cut)


def _chosen(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    measured: Curves,
    budget: Budget,
    cut: Callable[[KeptCounts], nn.Module],
) -> Widths:
    """The same with one way to round."""
    curves = [curve for curve in measured.curves if not budget.excludes(graph.groups[curve.group])]
    budget = budget.on(inputs.tensors()[0].device)
    if budget.uniform_layers is None:
        budget = replace(budget, uniform_layers=is_pretrained_model(model))
    if budget.latency is None:
        costing: Costing = counted(model, inputs, graph, budget)
    else:
        costing = timed(model, inputs, graph, curves, budget, lambda kept: cut(Widths(kept).counts(graph)))
    terms, target = costing.terms, costing.target
    smallest = smallest_cost(graph, curves, terms, budget)
    # A count is exact. The smallest latency is only predicted, so it is tried even where it is above the target.
    aim = target if budget.latency is None else max(target, smallest)
    tried: list[tuple[float, Cost]] = []
    for _ in range(_CORRECTIONS):
        kept = allocate(graph, curves, terms, aim, budget)
        cost = costing.of(cut(Widths(kept).counts(graph)))
        if abs(cost.amount - target) <= max(REACHED_WITHIN * target, min(cost.margin, _LOUDEST * target)):
            return Widths(kept, (*measured.notes, *cost.notes))
        tried.append((aim, cost))
        aim = max(_next_aim(tried, target), smallest)
        if any(aim == earlier for earlier, _ in tried):
            break
    whole = {index: group.width for index, group in enumerate(graph.groups)}
    raise InputError(_missed([cost for _, cost in tried], target, sum(term.at(whole) for term in terms), budget))


def _next_aim(tried: Sequence[tuple[float, Cost]], target: float) -> float:
    """The predicted cost to try next: between a try below the target and one above it, or the last one scaled."""
    below = max((t for t in tried if t[1].amount <= target), key=lambda t: t[1].amount, default=None)
    above = min((t for t in tried if t[1].amount > target), key=lambda t: t[1].amount, default=None)
    if below and above:
        share = (target - below[1].amount) / (above[1].amount - below[1].amount)
        return below[0] + share * (above[0] - below[0])
    aim, cost = tried[-1]
    return aim * target / cost.amount


def _missed(reached: Sequence[Cost], target: float, total: float, budget: Budget) -> str:
    """The message for a budget that was not met."""
    nearest = min(reached, key=lambda cost: abs(cost.amount - target))
    share = f"{nearest.amount / total:.3f}" + (f" ± {nearest.margin / total:.3f}" if nearest.margin else "")
    advice = "ask for that, or take a smaller round_to"
    if budget.latency is not None:
        advice = "ask for that, or take another round_to or a larger max_ratio"
    if nearest.margin > _LOUDEST * target:
        advice = "the measurements scatter too much: close other programs, or measure on a larger batch"
    return (
        f"the budget of {target:,.0f} {budget.unit} can't be met within {REACHED_WITHIN:.0%}: the nearest "
        f"that was reached is {nearest.amount:,.0f} of {total:,.0f} ({share}); {advice}"
    )
