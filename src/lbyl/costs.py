"""What a network costs by the measure that a budget limits: predicted from widths, and of a cut network in truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lbyl.budget import Budget, Term, cost_terms
from lbyl.graph import Graph
from lbyl.inputs import ExampleInputs
from lbyl.measure import count_parameters, macs_by_shapes
from lbyl.modes import undisturbed
from lbyl.probing import ReaderCall, run
from lbyl.surgery import tensors_of


@dataclass(frozen=True)
class Cost:
    """What a cut network really costs.

    Attributes:
        amount: in the budget's unit.
        margin: how far that may be off; 0 where it is counted, not measured.
        notes: what the user should know of it.
    """

    amount: float
    margin: float = 0.0
    notes: tuple[str, ...] = ()


class Costing(Protocol):
    """One measure of cost: ``terms`` predict it from widths, ``target`` is what may stay of it."""

    @property
    def terms(self) -> Sequence[Term]:
        """What the network costs, part by part."""
        ...

    @property
    def target(self) -> float:
        """What may stay."""
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
        """The cost of a cut network, which the sum over parameters may miss."""
        return Cost(float(self.count(smaller)))


def counted(model: nn.Module, inputs: ExampleInputs, graph: Graph, budget: Budget) -> Counted:
    """The measure of a budget of MACs, parameters or bytes.

    Args:
        model: the unpruned network in evaluation mode.
        inputs: what it is called with; MACs are counted on it.
        graph: its channel graph.
        budget: what may stay.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    if budget.macs is not None:

        def macs(network: nn.Module) -> int:
            with undisturbed(network):
                return macs_by_shapes(network, inputs)

        total = macs(model)
        costs = _macs_of(model, inputs, total)
        return Counted(tuple(cost_terms(graph, costs)), budget.macs * total, macs)
    if budget.params is not None:
        costs = {name: float(p.numel()) for name, p in named.items()}
        return Counted(tuple(cost_terms(graph, costs)), budget.params * count_parameters(model), count_parameters)
    assert budget.size_mb is not None
    costs = {name: float(_bytes([t])) for name, t in {**named, **dict(model.named_buffers())}.items()}
    terms = tuple(cost_terms(graph, costs))
    return Counted(terms, budget.size_mb * 1e6, lambda network: _bytes(tensors_of(network).values()))


def _macs_of(model: nn.Module, inputs: ExampleInputs, total: int) -> dict[str, float]:
    """Multiply-accumulates by parameter; what belongs to none (attention scores) under the name ""."""
    costs: dict[str, float] = defaultdict(float)
    parameters = dict(model.named_parameters())

    def on_read(call: ReaderCall) -> None:
        weight = parameters.get(call.weight)
        if weight is not None:
            costs[call.weight] += call.out.numel() * weight.numel() / call.out.shape[1 if call.op != "linear" else -1]

    with undisturbed(model), torch.no_grad():
        run(model, inputs, on_read=on_read)
    costs[""] = max(0.0, total - sum(costs.values()))
    return dict(costs)


def _bytes(tensors: Iterable[Tensor]) -> int:
    # Tied tensors are saved once.
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
