"""Chooses the width of every group, such that the predicted error is least at the cost that the budget allows."""

from __future__ import annotations

import glob
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations, product

from torch import nn

from lbyl.budget.budget import REACHED_WITHIN, SAVED_WITHIN, Budget
from lbyl.budget.costs import Cost, Costing, Term, counted, widths_of
from lbyl.budget.curves import Curve, Curves
from lbyl.budget.latency import timed
from lbyl.errors import BudgetError
from lbyl.graph import Graph
from lbyl.io.huggingface import is_language_model, is_pretrained_model
from lbyl.io.onnx.network import OnnxNetwork
from lbyl.runtime.inputs import ExampleInputs
from lbyl.selection.select import KeptCounts


def smallest_cost(graph: Graph, curves: Sequence[Curve], terms: Sequence[Term], budget: Budget) -> float:
    """The cost of the network if every group that has a curve gets its smallest width."""
    widths = {index: group.width for index, group in enumerate(graph.groups)}
    widths |= {curve.group: widths_of(graph.groups[curve.group], budget)[-1] for curve in curves}
    return sum(term.at(widths) for term in terms)


def allocate(
    graph: Graph, curves: Sequence[Curve], terms: Sequence[Term], target: float, budget: Budget
) -> dict[int, int]:
    """Choose the kept channels of every group that has a curve, such that the cost is at most ``target``.

    The search is greedy: each step shrinks the group that adds the least error for each unit of cost that it saves, to
    any of its smaller widths, because an error curve may first be steep and then flat.

    Raises:
        BudgetError: even the smallest widths cost more than ``target``; the message says how much.
    """
    widths, bundles = {index: group.width for index, group in enumerate(graph.groups)}, bundled(graph, curves, budget)
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
        raise BudgetError(
            f"the budget can't be reached: it allows {target:,.0f}, but with every group at its smallest width, "
            f"{floor:,.0f} of {cost:,.0f} {budget.unit} are left ({floor / cost:.1%}); raise the budget or max_ratio, "
            f"or {'use a smaller min_keep' if budget.min_keep > 1 else 'exclude less'}",
            floor / cost,
        )

    def error(first: int, width: int) -> float:
        return sum(float(curve_of[group].error[width]) for group in bundles[first])

    def best(first: int) -> tuple[float, int, float]:
        """Error added for each unit of cost saved, the width, and the cost saved."""
        now = widths[first]
        before, so_far = sum(term.at(widths) for term in touching[first]), error(first, now)
        found = (math.inf, now, 0.0)
        for width in offered[first]:
            if width >= now:
                continue
            saved = before - sum(term.at(widths | dict.fromkeys(bundles[first], width)) for term in touching[first])
            # The last step must not go far below the target.
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
    _widen(widths, bundles, offered, terms, error, target)
    _exchange(widths, bundles, offered, terms, error, target)
    return {group: widths[group] for group in first_of}


def _widen(
    widths: dict[int, int],
    bundles: Mapping[int, Sequence[int]],
    offered: Mapping[int, Sequence[int]],
    terms: Sequence[Term],
    error: Callable[[int, int], float],
    target: float,
) -> None:
    """Widen groups, in place, where a coarse last step went far below the target: those that save most for the cost."""
    cost = sum(term.at(widths) for term in terms)
    while cost < target * (1 - REACHED_WITHIN):
        found: tuple[float, int, int, float] | None = None
        for first, bundle in bundles.items():
            now = widths[first]
            for width in (width for width in offered[first] if width > now):
                after = sum(term.at(widths | dict.fromkeys(bundle, width)) for term in terms)
                if cost < after <= target:
                    rate = (error(first, now) - error(first, width)) / (after - cost)
                    found = max(found or (-math.inf, 0, 0, 0.0), (rate, first, width, after))
        if found is None:
            return
        _, first, width, cost = found
        widths |= dict.fromkeys(bundles[first], width)


_MOST_PAIRS = 50_000
"""So many pairs of widths are tried. Where there are more, single steps are small enough."""


def _exchange(
    widths: dict[int, int],
    bundles: Mapping[int, Sequence[int]],
    offered: Mapping[int, Sequence[int]],
    terms: Sequence[Term],
    error: Callable[[int, int], float],
    target: float,
) -> None:
    """Change two groups at once, in place, where no single step comes close to the target, as with few channels."""

    def is_close(cost: float) -> bool:
        return abs(cost - target) <= REACHED_WITHIN * target

    pairs = list(combinations(bundles, 2))
    if is_close(sum(term.at(widths) for term in terms)):
        return
    if sum(len(offered[a]) * len(offered[b]) for a, b in pairs) > _MOST_PAIRS:
        return
    found: list[tuple[bool, float, dict[int, int]]] = []
    for a, b in pairs:
        for one, other in product(offered[a], offered[b]):
            tried = widths | dict.fromkeys(bundles[a], one) | dict.fromkeys(bundles[b], other)
            if is_close(cost := sum(term.at(tried) for term in terms)):
                added = error(a, one) + error(b, other) - error(a, widths[a]) - error(b, widths[b])
                found.append((cost > target, added, tried))
    if found:
        widths |= min(found, key=lambda each: each[:2])[-1]


def bundled(graph: Graph, curves: Sequence[Curve], budget: Budget) -> dict[int, tuple[int, ...]]:
    """The groups that share a width, by the first of them: single groups, or those with one name in all layers."""
    found: dict[object, list[int]] = defaultdict(list)
    for curve in curves:
        group = graph.groups[curve.group]
        alike = _LAYER.sub("*", group.name), group.width, len(set(group.blocks))
        found[alike if budget.uniform_layers else curve.group].append(curve.group)
    return {bundle[0]: tuple(bundle) for bundle in found.values()}


_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")
"""The number of a layer in a name."""


def _next(options: Sequence[int], now: int) -> int:
    """The largest width below the current one."""
    return max((width for width in options if width < now), default=now)


_CORRECTIONS = 6
_LOUDEST = 0.1
"""If the margin of a measured cost is a larger share of the budget, it can't be decided whether the budget is met."""


@dataclass(frozen=True)
class Widths:
    """The chosen widths: kept channels by group index."""

    kept: Mapping[int, int]
    notes: tuple[str, ...] = ()

    def counts(self, graph: Graph) -> KeptCounts:
        """The widths in the form that `select` uses, for groups that lose channels."""
        counts = {index: kept for index, kept in self.kept.items() if kept < graph.groups[index].width}
        return KeptCounts(counts, others="the budget leaves it at full width")

    def ratios(self, graph: Graph) -> dict[str, float]:
        """The ratio of each group, under a pattern that matches only its name, as stored in the plan."""
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
    """Choose the widths with the least predicted error for a budget.

    A cost that is up to 5% below the budget also meets it, if no widths come closer, and so does any measured latency
    below it, of which a note tells.

    Args:
        model: the unpruned network in evaluation mode.
        inputs: its inputs; MACs are counted and time is measured on them.
        graph: its channel graph.
        measured: the error curves of the groups that may lose channels.
        budget: the budget.
        cut: cuts the network to kept counts. The cost of the result is measured, because predictions are inexact.

    Raises:
        BudgetError: no network is within 2% of the budget or up to 5% below it; or for a latency, none is below it or
            within its margin of error.
    """
    *coarse, fine = _ways_to_round(model, budget)
    for rounded in coarse:
        with suppress(BudgetError):  # of finer widths, some may meet it
            return _chosen(model, inputs, graph, measured, rounded, cut, below=REACHED_WITHIN)
    return _chosen(model, inputs, graph, measured, fine, cut)


def _ways_to_round(model: nn.Module, budget: Budget) -> list[Budget]:
    """The budget with the multiples to try in turn where it names none, the coarse ones first."""
    if budget.round_to is not None:
        return [budget]
    fine = replace(budget, round_to=1)
    if isinstance(model, OnnxNetwork):
        # Files are run by onnxruntime, which pads channels to whole vectors.
        return [replace(budget, round_to="auto"), fine]
    return [budget, fine] if is_language_model(model) else [fine]


def _chosen(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    measured: Curves,
    budget: Budget,
    cut: Callable[[KeptCounts], nn.Module],
    below: float = SAVED_WITHIN,
) -> Widths:
    """Choose the widths with one way to round; a count may be this share ``below`` the budget."""
    curves = [curve for curve in measured.curves if not budget.excludes(graph.groups[curve.group])]
    budget = budget.on(inputs.tensors()[0].device)
    names = (name for group in graph.groups for name in (group.name, *group.layers))
    notes = (*measured.notes, *budget.unmatched((*names, *(path for path, _ in model.named_modules()))))
    if budget.uniform_layers is None:
        budget = replace(budget, uniform_layers=is_pretrained_model(model))
        if budget.uniform_layers:
            curves, told = _of_layers(graph, curves)
            notes += told
    if budget.latency is None:
        costing: Costing = counted(model, inputs, graph, budget)
    else:
        costing = timed(model, inputs, graph, curves, budget, lambda kept: cut(Widths(kept).counts(graph)))
    terms, target = costing.terms, costing.target
    whole = {index: group.width for index, group in enumerate(graph.groups)}
    total = sum(term.at(whole) for term in terms)
    if budget.latency is None and total <= target:
        raise BudgetError(
            f"the network has {total:,.0f} {budget.unit}, and the budget allows {target:,.0f}: there is nothing to cut",
            1.0,
        )
    smallest = smallest_cost(graph, curves, terms, budget)
    # Counts are exact. The smallest latency is only predicted, so it is tried even if it is above the target.
    aim = target if budget.latency is None else max(target, smallest)
    tried: list[tuple[float, Cost]] = []
    least = target * (1 - below) if budget.latency is None else 0.0
    saving: tuple[Cost, Widths] | None = None
    for _ in range(_CORRECTIONS):
        kept = allocate(graph, curves, terms, aim, budget)
        cost = costing.of(cut(Widths(kept).counts(graph)))
        if abs(cost.amount - target) <= max(REACHED_WITHIN * target, min(cost.margin, _LOUDEST * target)):
            return Widths(kept, (*notes, *cost.notes))
        tried.append((aim, cost))
        if least <= cost.amount and _is_below(cost, target) and (not saving or cost.amount > saving[0].amount):
            saving = cost, Widths(kept, notes)
        aim = max(_next_aim(tried, target), smallest)
        if any(aim == earlier for earlier, _ in tried):
            break
    if saving:
        cost, widths = saving
        told = (_told_below(cost, target, total),) if budget.latency is not None else ()
        return replace(widths, notes=(*widths.notes, *told))
    closest = min((cost for _, cost in tried), key=lambda cost: abs(cost.amount - target))
    raise BudgetError(_missed(closest, target, total, budget), closest.amount / total)


def _of_layers(graph: Graph, curves: list[Curve]) -> tuple[list[Curve], tuple[str, ...]]:
    """The curves of groups inside of a model's layers, and a note on others, such as a pooler; all if there are none.

    Configurations of transformers have numbers for the widths in layers. The others have that of the stream.
    """
    inside = [curve for curve in curves if _LAYER.search(graph.groups[curve.group].name)]
    others = [name for curve in curves if not _LAYER.search(name := graph.groups[curve.group].name)]
    if not inside or not others:
        return curves, ()
    told = f"{', '.join(others)}: left whole, for configurations have no width for what is outside of layers"
    return inside, (f"{told} (uniform_layers=False cuts it as well)",)


def _is_below(cost: Cost, target: float) -> bool:
    """Whether a cost is below the target, as far as the measurement can tell if it is measured."""
    return cost.amount <= target and cost.margin <= max(_LOUDEST * target, target - cost.amount)


def _told_below(cost: Cost, target: float, total: float) -> str:
    return (
        f"latency: {cost.amount / total:.3f} ± {cost.margin / total:.3f} was reached, asked for {target / total:.3f}: "
        "no widths that were tried come closer from below"
    )


def _next_aim(tried: Sequence[tuple[float, Cost]], target: float) -> float:
    """The predicted cost to try next: between one try below the target and one above, or the last one scaled."""
    below = max((t for t in tried if t[1].amount <= target), key=lambda t: t[1].amount, default=None)
    above = min((t for t in tried if t[1].amount > target), key=lambda t: t[1].amount, default=None)
    if below and above:
        share = (target - below[1].amount) / (above[1].amount - below[1].amount)
        return below[0] + share * (above[0] - below[0])
    aim, cost = tried[-1]
    return aim * target / cost.amount


def _missed(nearest: Cost, target: float, total: float, budget: Budget) -> str:
    """The message for a budget that was not met."""
    share = f"{nearest.amount / total:.3f}" + (f" ± {nearest.margin / total:.3f}" if nearest.margin else "")
    advice = "use that as the budget" + (", or a smaller round_to" if budget.round_to not in (None, 1) else "")
    if budget.latency is not None:
        advice = "use that as the budget, or another round_to or a larger max_ratio"
    if nearest.margin > _LOUDEST * target and abs(nearest.amount - target) <= 2 * nearest.margin:
        advice = "the measurements vary too much: close other programs, or measure on a larger batch"
    return (
        f"the budget of {target:,.0f} {budget.unit} can't be met within {REACHED_WITHIN:.0%}: the nearest "
        f"that was reached is {nearest.amount:,.0f} of {total:,.0f} ({share}); {advice}"
    )
