"""Predicts and counts what a network costs at given widths: multiply-accumulates, parameters, bytes."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from lbyl.budget.budget import Budget
from lbyl.graph import NOT_OURS, Graph, Group
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import named_once, tensors_of
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.macs import count_parameters, macs_by_parameter, macs_by_shapes

_PRODUCTS = ("scaled_dot_product_attention", "matmul", "bmm", "einsum")
_STEPS = 48
"""Largest number of widths to choose from for a group: more would take longer with almost the same result."""


@dataclass(frozen=True)
class Term:
    """A cost that is proportional to the lengths of some dimensions.

    ``dims`` holds, for each dimension, the length that belongs to no group and, for each group (index in the graph),
    the number of entries of each of its channels. ``lengths`` are the uncut lengths. If the cost is not proportional to
    the product of the lengths, ``curve`` gives it as points (share of the product, share of the cost), in ascending
    order, with straight lines between them.
    """

    cost: float
    dims: tuple[tuple[float, Mapping[int, float]], ...]
    lengths: tuple[float, ...]
    curve: tuple[tuple[float, float], ...] = ()

    def share(self, widths: Mapping[int, int]) -> float:
        """The ratio of the lengths' product with these widths to the uncut one."""
        share = 1.0
        for (fixed, groups), length in zip(self.dims, self.lengths, strict=True):
            share *= (fixed + sum(widths[g] * places for g, places in groups.items())) / length
        return share

    def at(self, widths: Mapping[int, int]) -> float:
        """The cost with these kept widths."""
        share = self.share(widths)
        if not self.curve:
            return self.cost * share
        above = bisect.bisect_left(self.curve, (share, -math.inf))
        above = min(max(above, 1), len(self.curve) - 1)
        (x0, y0), (x1, y1) = self.curve[above - 1], self.curve[above]
        return self.cost * (y0 + (y1 - y0) * (share - x0) / (x1 - x0))


def cost_terms(graph: Graph, costs: Mapping[str, float]) -> list[Term]:
    """A term for every parameter that has a cost, proportional to the lengths of its dimensions.

    The cost named "" is that of products of activations. It is divided evenly among the groups in these products.
    """
    dims: dict[str, dict[tuple[int, int], tuple[int, int, dict[int, float]]]] = defaultdict(dict)
    for index, group in enumerate(graph.groups):
        for slot in (*group.carriers, *group.consumers):
            length = len(slot.channels)
            ours = sum(channel != NOT_OURS for channel in slot.channels)
            # A second slot of the group holds the other channels of products of two: its share is another factor.
            second = index in dims[slot.parameter].get((slot.dim, 0), (0, 0, {}))[2]
            _, free, groups = dims[slot.parameter].get((slot.dim, second), (length, length, {}))
            groups[index] = ours / group.width
            dims[slot.parameter][slot.dim, second] = (length, free - ours, groups)
    terms = []
    costs = dict(costs)
    rest = costs.pop("", 0.0)
    if rest:
        heads = [index for index, group in enumerate(graph.groups) if any(s.op in _PRODUCTS for s in group.steps)]
        for index in heads:
            width = graph.groups[index].width
            terms.append(Term(rest / len(heads), ((0, {index: 1}),), (width,)))
        if not heads:
            terms.append(Term(rest, (), ()))
    for name, cost in costs.items():
        known = dims.get(name, {})
        terms.append(
            Term(
                cost,
                tuple((free, groups) for _, free, groups in known.values()),
                tuple(length for length, _, _ in known.values()),
            )
        )
    return terms


def widths_of(group: Group, budget: Budget, layers: int = 1) -> list[int]:
    """The widths that a group may be cut to, the largest first; ``round_to`` is not "auto" (see :meth:`Budget.on`).

    If several ``layers`` share a width, each step saves more, so there are more steps.
    """
    labels = len(set(group.blocks)) * group.multiple
    rows = max(1, sum(channel != NOT_OURS for channel in group.producers[0].weight.channels) // group.width)
    multiple = budget.multiple(group.width)
    step = math.lcm(labels, multiple // math.gcd(multiple, rows))
    if step >= group.width:
        step = labels
    least = max(budget.min_keep, math.ceil(group.width * (1 - budget.max_ratio) - 1e-9), 1)
    unit, steps = step, math.ceil((group.width - least) / step / (_STEPS * min(layers, 4)))
    step *= max(1, steps)
    choices = [k for k in range(step, group.width, step) if k >= least]
    # Below one step, each width is a little smaller than the one before.
    below = _smaller(step // unit, math.ceil(least / unit))
    return [group.width, *reversed(choices), *(k * unit for k in below)]


def _smaller(number: int, least: int) -> Iterator[int]:
    """Numbers down to the least one, each at most 19 twentieths of the one before."""
    while number > least:
        number = max(19 * number // 20, least)
        yield number


@dataclass(frozen=True)
class Cost:
    """The actual cost of a cut network.

    Attributes:
        amount: the cost in the budget's unit.
        margin: its margin of error; 0 if it is counted and not measured.
        notes: notes for the report.
    """

    amount: float
    margin: float = 0.0
    notes: tuple[str, ...] = ()


class Costing(Protocol):
    """One way to measure cost: ``terms`` predict it from widths, ``target`` is the cost that is allowed."""

    @property
    def terms(self) -> Sequence[Term]:
        """The terms whose sum is the predicted cost of the network."""
        ...

    @property
    def target(self) -> float:
        """The cost that is allowed."""
        ...

    def of(self, smaller: nn.Module) -> Cost:
        """The cost of a cut network."""
        ...


@dataclass(frozen=True)
class Counted:
    """Multiply-accumulates, parameters or bytes."""

    terms: tuple[Term, ...]
    target: float
    count: Callable[[nn.Module], int]

    def of(self, smaller: nn.Module) -> Cost:
        """The cost of a cut network, counted exactly, because the sum of the terms is only a prediction."""
        return Cost(float(self.count(smaller)))


def counted(model: nn.Module, inputs: ExampleInputs, graph: Graph, budget: Budget) -> Counted:
    """The cost that a budget of MACs, parameters or bytes limits.

    Args:
        model: the unpruned network in evaluation mode.
        inputs: its inputs; MACs are counted on them.
        graph: its channel graph.
        budget: the budget.
    """
    named = named_once(model)
    count = counter(inputs, budget)
    if budget.macs is not None:
        total = count(model)
        costs = macs_by_parameter(model, inputs, total)
        return Counted(tuple(cost_terms(graph, costs)), budget.macs * total, count)
    if budget.params is not None:
        costs = {name: float(p.numel()) for name, p in named.items() if isinstance(p, nn.Parameter)}
        return Counted(tuple(cost_terms(graph, costs)), budget.params * count(model), count)
    assert budget.size_mb is not None
    costs = {name: float(_bytes([t])) for name, t in named.items()}
    terms = tuple(cost_terms(graph, costs))
    return Counted(terms, budget.size_mb * 1e6, count)


def counter(inputs: ExampleInputs, budget: Budget) -> Callable[[nn.Module], int]:
    """The function that counts what a budget of MACs, parameters or bytes limits; MACs on these inputs."""
    if budget.macs is not None:

        def macs(network: nn.Module) -> int:
            with undisturbed(network):
                return macs_by_shapes(network, inputs)

        return macs
    if budget.params is not None:
        return count_parameters
    return lambda network: _bytes(tensors_of(network).values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    # Tied tensors are saved once.
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
