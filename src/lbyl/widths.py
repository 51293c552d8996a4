"""From a budget to widths: what each group's channels are worth, measured on probes or read off the weights."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lbyl.assessment import outputs_error
from lbyl.budget import TOLERANCE, Budget, Curve, allocate, cost_terms, error_curve, spread_over_blocks
from lbyl.errors import InputError
from lbyl.filters import State, columns_second, describe, paper_form_applies, reader_energy, seats
from lbyl.graph import Graph, Slot
from lbyl.inputs import ExampleInputs
from lbyl.measure import count_macs
from lbyl.modes import undisturbed
from lbyl.moments import Probes, Progress
from lbyl.probing import ReaderCall, run
from lbyl.regression import ChannelSums
from lbyl.restoration import fold
from lbyl.restorers.base import Delivery
from lbyl.selection import Choose, generator_for

_READERS = 6
"""The curve of a group with more readers (a residual stream) is taken on so many of them."""
_CORRECTIONS = 5
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


def costs_of(model: nn.Module, inputs: ExampleInputs, budget: Budget) -> tuple[dict[str, float], float]:
    """The cost of every parameter, by name, and how much of all may stay."""
    named: dict[str, Tensor] = dict(model.named_parameters())
    if budget.macs is not None:
        costs: dict[str, float] = defaultdict(float)

        def on_read(call: ReaderCall) -> None:
            weight = model.get_parameter(call.weight) if call.weight in named else None
            if weight is not None:
                costs[call.weight] += (
                    call.out.numel() * weight.numel() / call.out.shape[1 if call.op != "linear" else -1]
                )

        with undisturbed(model), torch.no_grad():
            run(model, inputs, on_read=on_read)
            total = float(count_macs(model, inputs))
        # Products of activations (attention scores) belong to no parameter.
        costs[""] = max(0.0, total - sum(costs.values()))
        return dict(costs), budget.macs * total
    if budget.params is not None:
        count = sum(p.numel() for p in named.values())
        return {name: float(p.numel()) for name, p in named.items()}, budget.params * count
    named |= dict(model.named_buffers())
    assert budget.size_mb is not None
    return {name: float(t.numel() * t.element_size()) for name, t in named.items()}, budget.size_mb * 1e6


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
    measure: Callable[[Mapping[str, float]], float],
) -> Widths:
    """The widths with the least predicted error at which the network costs what the budget allows.

    Args:
        model: the unpruned network in evaluation mode.
        inputs: what it is called with; MACs are counted on it.
        graph: its channel graph.
        measured: the error curves of the groups that may lose channels.
        budget: what may stay.
        measure: cuts by a ratio mapping and tells the real cost, which the sum over parameters may miss.

    Raises:
        InputError: the budget can't be reached within 2 %.
    """
    curves = [curve for curve in measured.curves if not budget.excludes(graph.groups[curve.group])]
    costs, target = costs_of(model, inputs, budget)
    terms, aim, reached = cost_terms(graph, costs), target, []
    for _ in range(_CORRECTIONS):
        found = Widths(allocate(graph, curves, terms, aim, budget), measured.notes)
        cost = measure(found.ratios(graph))
        if abs(cost / target - 1) <= TOLERANCE:
            return found
        reached.append(cost)
        aim *= target / cost
    nearest, total = min(reached, key=lambda cost: abs(cost - target)), sum(costs.values())
    raise InputError(
        f"the budget of {target:,.0f} can't be met within {TOLERANCE:.0%}: the nearest that was reached is "
        f"{nearest:,.0f} of {total:,.0f} ({nearest / total:.3f}); ask for that, or take a smaller round_to"
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
    """Squared relative error of the network's output for each unit of the group's own, with half of it gone."""
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
