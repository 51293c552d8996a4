"""From a budget to widths: what each group's channels are worth, measured on probes or read off the weights."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lbyl.assessment import outputs_error
from lbyl.budget import TOLERANCE, Budget, Curve, allocate, error_curve, smallest_cost, spread_over_blocks
from lbyl.costs import Cost, Costing, counted
from lbyl.errors import InputError
from lbyl.filters import State, columns_second, describe, paper_form_applies, reader_energy, seats
from lbyl.graph import Graph, Slot
from lbyl.inputs import ExampleInputs
from lbyl.measure import count_macs
from lbyl.moments import Probes, Progress
from lbyl.moments.synthesis import batch_size, split
from lbyl.pace import timed
from lbyl.probing import ReaderCall, run
from lbyl.regression import ChannelSums
from lbyl.restoration import fold
from lbyl.restorers.base import Delivery
from lbyl.selection import Choose, generator_for

_READERS = 6
"""The curve of a group with more readers (a residual stream) is taken on so many of them."""
_CORRECTIONS = 6
_LOUDEST = 0.1
"""A measurement that may be off by more than this share of the budget can't tell whether that is met."""
_TRIED = 24
"""Held-out probes that each group's error is followed through the network with."""
_TRIALS = 5e11
"""Multiply-accumulates that measuring how far errors travel may take; beyond, every error counts alike."""


@dataclass(frozen=True)
class Given:
    """Probes that are there already."""

    made: Probes

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """The same ones again."""
        return self.made


@dataclass(frozen=True)
class Widths:
    """What was chosen: kept channels by group index, and the ratio mapping that `select` takes."""

    kept: Mapping[int, int]
    notes: tuple[str, ...] = ()

    def ratios(self, graph: Graph) -> dict[str, float]:
        """A ratio for each group, by its name as a pattern."""
        found = {"*": 0.0}
        for index, kept in self.kept.items():
            group = graph.groups[index]
            found[glob.escape(group.name)] = 1 - kept / group.width
        return found


@dataclass(frozen=True)
class Curves:
    """What the channels of every group are worth: measured once, good for any number of budgets."""

    curves: tuple[Curve, ...]
    notes: tuple[str, ...] = ()


def measure_curves(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    groups: Sequence[int],
    state: State,
    choose: Choose,
    probes: Probes | None,
    seed: int,
    progress: Progress | None = None,
) -> Curves:
    """The predicted error of every group at each of its widths.

    Args:
        model: the unpruned network in evaluation mode.
        inputs: what it is called with.
        graph: its channel graph.
        groups: indices of the groups that may lose channels.
        state: its tensors.
        choose: which channels are kept, asked for all of them in order.
        probes: what moments are measured on; without them the weights have to tell.
        seed: for the criterion and sampled positions.
        progress: called as ``progress(stage, done, total)``.
    """
    orders = {}
    for index in groups:
        group = graph.groups[index]
        generator = generator_for(seed, f"{group.name}#0")
        orders[index] = spread_over_blocks(choose(describe(group, state), group.width, generator), group.blocks)
    with torch.no_grad():
        if probes is None:
            return Curves(tuple(_from_weights(graph, index, orders[index], state) for index in groups))
        curves, note = _from_probes(model, inputs, graph, orders, state, probes, seed, progress)
    return Curves(tuple(curves), (note,) if note else ())


def choose_widths(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    measured: Curves,
    budget: Budget,
    cut: Callable[[Mapping[str, float]], nn.Module],
) -> Widths:
    """The widths with the least predicted error at which the network costs what the budget allows.

    Args:
        model: the unpruned network in evaluation mode.
        inputs: what it is called with; MACs are counted and time is measured on it.
        graph: its channel graph.
        measured: the error curves of the groups that may lose channels.
        budget: what may stay.
        cut: cuts by a ratio mapping, so that the real cost can be told, which the prediction may miss.

    Raises:
        InputError: the budget can't be reached within 2 %; or, for a latency, within the margin of its measurement
            where that is wider.
    """
    curves = [curve for curve in measured.curves if not budget.excludes(graph.groups[curve.group])]
    budget = budget.on(inputs.tensors()[0].device)
    if budget.latency is None:
        costing: Costing = counted(model, inputs, graph, budget)
    else:
        costing = timed(model, inputs, graph, curves, budget, lambda kept: cut(Widths(kept).ratios(graph)))
    terms, target = costing.terms, costing.target
    smallest = smallest_cost(graph, curves, terms, budget)
    # A count is what it is; the smallest time is only predicted, so it is tried.
    aim = target if budget.latency is None else max(target, smallest)
    tried: list[tuple[float, Cost]] = []
    for _ in range(_CORRECTIONS):
        kept = allocate(graph, curves, terms, aim, budget)
        cost = costing.of(cut(Widths(kept).ratios(graph)))
        if abs(cost.amount - target) <= max(TOLERANCE * target, min(cost.margin, _LOUDEST * target)):
            return Widths(kept, (*measured.notes, *cost.notes))
        tried.append((aim, cost))
        aim = max(_next_aim(tried, target), smallest)
        if any(aim == earlier for earlier, _ in tried):
            break
    whole = {index: group.width for index, group in enumerate(graph.groups)}
    raise InputError(_missed([cost for _, cost in tried], target, sum(term.at(whole) for term in terms), budget))


def _next_aim(tried: Sequence[tuple[float, Cost]], target: float) -> float:
    """What to allocate for, after what the last aims led to: between those on both sides, or scaled."""
    below = max((t for t in tried if t[1].amount <= target), key=lambda t: t[1].amount, default=None)
    above = min((t for t in tried if t[1].amount > target), key=lambda t: t[1].amount, default=None)
    if below and above:
        share = (target - below[1].amount) / (above[1].amount - below[1].amount)
        return below[0] + share * (above[0] - below[0])
    aim, cost = tried[-1]
    return aim * target / cost.amount


def _missed(reached: Sequence[Cost], target: float, total: float, budget: Budget) -> str:
    """What to say of a budget that was not met."""
    nearest = min(reached, key=lambda cost: abs(cost.amount - target))
    share = f"{nearest.amount / total:.3f}" + (f" ± {nearest.margin / total:.3f}" if nearest.margin else "")
    advice = "ask for that, or take a smaller round_to"
    if budget.latency is not None:
        advice = "ask for that, or take another round_to or a larger max_ratio"
    if nearest.margin > _LOUDEST * target:
        advice = "the measurements scatter too much: close other programs, or measure on a larger batch"
    return (
        f"the budget of {target:,.0f} {budget.unit} can't be met within {TOLERANCE:.0%}: the nearest that was reached "
        f"is {nearest.amount:,.0f} of {total:,.0f} ({share}); {advice}"
    )


def _from_weights(graph: Graph, index: int, order: tuple[int, ...], state: State) -> Curve:
    """The curve under the paper's assumptions, or by the filters' norms where they do not apply."""
    group = graph.groups[index]
    filters = describe(group, state)
    rows = filters.weight[list(order)]
    gram = rows @ rows.T
    if paper_form_applies(group, state):
        gram = torch.diag(gram.diagonal())
    energy = torch.stack([reader_energy(slot, _source(state, slot), group.width) for slot in group.readers]).sum(0)
    return Curve(index, order, error_curve(gram, energy[list(order)]))


def _from_probes(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    orders: Mapping[int, tuple[int, ...]],
    state: State,
    probes: Probes,
    seed: int,
    progress: Progress | None,
) -> tuple[list[Curve], str]:
    sums: dict[str, list[tuple[int, Slot, ChannelSums]]] = defaultdict(list)
    for index in orders:
        group = graph.groups[index]
        every = max(1, -(-len(group.readers) // _READERS))
        for slot in group.readers[::every]:
            generator = generator_for(seed, f"{slot.parameter}#widths")
            sums[slot.parameter].append((index, slot, ChannelSums(seats(slot, group.width), 4000, generator)))

    def on_read(call: ReaderCall) -> None:
        for _, slot, item in sums.get(call.weight, ()):
            item.add(call, _source(state, slot))

    for batch in probes.batches:
        run(model, batch, on_read=on_read, batch_statistics=probes.batch_statistics)
    seen: dict[int, list[tuple[Slot, ChannelSums]]] = defaultdict(list)
    for entries in sums.values():
        for index, slot, item in entries:
            if item.moments is not None:
                seen[index].append((slot, item))

    some = min(_TRIED, available := batch_size(probes.held_out))
    probes = replace(probes, held_out=split(probes.held_out, [some, available - some])[0])
    pixels = max(
        1, sum(t.numel() for t in probes.held_out.tensors()) // max(1, sum(t.numel() for t in inputs.tensors()))
    )
    affordable = len(orders) * pixels * count_macs(model, inputs) <= _TRIALS
    expected = run(model, probes.held_out, batch_statistics=probes.batch_statistics) if affordable else None
    curves = []
    for done, index in enumerate(orders):
        group, order = graph.groups[index], orders[index]
        if not seen[index]:
            curves.append(_from_weights(graph, index, order, state))
            continue
        at = torch.tensor(order)
        parts = []
        for slot, item in seen[index]:
            assert item.moments is not None
            mean = item.moments.p / item.moments.count
            covariance = item.moments.pp / item.moments.count - torch.outer(mean, mean)
            energy = reader_energy(slot, _source(state, slot), group.width)
            parts.append(error_curve(covariance.cpu()[at][:, at], energy[at]))
        curve = Curve(index, order, torch.stack(parts).mean(0))
        if expected is not None:
            curve = replace(curve, weight=_travels(model, graph, curve, seen[index], state, probes, expected))
        curves.append(curve)
        if progress:
            progress("weighing groups", done + 1, len(orders))
    note = "" if affordable else "widths: too large to measure how far each group's error travels; all count alike"
    return curves, note


def _travels(
    model: nn.Module,
    graph: Graph,
    curve: Curve,
    seen: Sequence[tuple[Slot, ChannelSums]],
    state: State,
    probes: Probes,
    expected: object,
) -> float:
    """Squared relative error of the network's output for each unit of the group's own, with half of it gone.

    Layer norms keep their statistics: the group's own error does not count what the cut changes in them either.
    """
    group = graph.groups[curve.group]
    kept = max(1, group.width // 2)
    own = float(curve.error[kept])
    if own <= 1e-9 or kept == group.width:
        return 1.0
    keep, drop = (torch.tensor(sorted(part)) for part in (curve.order[:kept], curve.order[kept:]))
    values: dict[str, Tensor] = {}
    for slot, item in seen:
        assert item.moments is not None
        # Not centered: no constant is corrected here, so the kept channels have to carry the mean as well.
        gram = (item.moments.pp / item.moments.count).cpu()
        ridge = 0.01 * float(gram.diagonal().mean()) + 1e-12
        matrix = torch.linalg.solve(gram[keep][:, keep] + ridge * torch.eye(len(keep)).double(), gram[keep][:, drop])
        weight = values.get(slot.parameter, state[slot.parameter].detach().clone())
        delivery = Delivery(matrix, torch.ones(len(keep)).double())
        fold(columns_second(weight, slot), _source(state, slot), slot, group.width, keep, drop, delivery)
        values[slot.parameter] = weight
    found = run(model, probes.held_out, values=values, batch_statistics=probes.batch_statistics)
    return max(outputs_error(expected, found) ** 2 / own, 1e-6)


def _source(state: State, slot: Slot) -> Tensor:
    return columns_second(state[slot.parameter].detach(), slot)
