"""Latency as a cost: predicts each layer's time from its widths, after timing a few cut networks.

Time is not proportional to multiply-accumulates: some of it is fixed, and odd widths can be slow. So every layer gets
its own curve through its times in the unpruned network and in a few evenly cut networks. The network with the chosen
widths is timed as well, and the prediction is corrected by the difference. The curves are always PyTorch's; in another
runtime only whole networks are timed.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lbyl.budget.budget import REACHED_WITHIN, Budget
from lbyl.budget.costs import Cost, Term, cost_terms, widths_of
from lbyl.budget.curves import Curve
from lbyl.graph import NOT_OURS, Graph
from lbyl.runtime.bench import Bench, bench
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import named_once
from lbyl.runtime.forward import ConsumerCall, run_intercepted
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.latency import TORCH, Latency, measure_latencies, measure_modules, measure_whole

_KEPT = (0.75, 0.5, 0.25)
"""Shares of kept channels in the networks that are timed."""
_SECONDS = 10.0
_RUNS = (5, 15)
"""Smallest and largest number of runs; in between, as many as fit into as many seconds."""
_MICRO = 1e6


@dataclass(frozen=True)
class LatencyCost:
    """Microseconds of a run. The unpruned network has the sum of its layers' times; a cut one has a share of that sum.

    Attributes:
        terms: one for each layer, and others for the time between the layers.
        target: the allowed time.
        share: the allowed time as a share of the unpruned network's time.
        model: the unpruned network, which is timed in turns with each cut one.
        inputs: the inputs of both.
        runs: how often each is timed.
        runtime: what they are timed in.
        known: what runs the unpruned network there, once that is known.
    """

    terms: tuple[Term, ...]
    target: float
    share: float
    model: nn.Module
    inputs: ExampleInputs
    runs: int
    runtime: str = TORCH
    known: dict[int, Callable[[], Any]] = field(default_factory=dict)

    def of(self, smaller: nn.Module) -> Cost:
        """The time of a cut network. If it seems to meet the target, it is measured again with twice the runs."""
        before, after = measure_whole(
            (self.model, smaller), self.inputs, runs=self.runs, runtime=self.runtime, known=self.known
        )
        ratio, total = after.over(before), self.target / self.share
        if abs(ratio.median - self.share) > max(REACHED_WITHIN * self.share, ratio.margin):
            return Cost(ratio.median * total, ratio.margin * total)
        found = bench(smaller, self.inputs, against=self.model, runs=2 * self.runs, runtime=self.runtime)
        ratio = found.whole.ratio
        assert ratio
        notes = [told_latency(found, self.share)]
        if found.no_speed:
            notes.append(f"latency: these layers were cut but are not faster: {found.without_speed()}")
        return Cost(ratio.median * total, ratio.margin * total, tuple(notes))


@dataclass(frozen=True)
class WholeLatency:
    """Microseconds of whole networks: the unpruned one's, times the ratio that was measured in turns with it.

    Attributes:
        model: the unpruned network.
        inputs: the inputs of all networks.
        runs: how often each is timed.
        runtime: what they are timed in.
        micros: the unpruned network's time.
        known: what was measured already.
    """

    model: nn.Module
    inputs: ExampleInputs
    runs: int
    runtime: str
    micros: float
    known: WeakKeyDictionary[nn.Module, int] = field(default_factory=WeakKeyDictionary)
    sessions: dict[int, Callable[[], Any]] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, inputs: ExampleInputs, runtime: str) -> WholeLatency:
        """Measure the unpruned network."""
        sessions: dict[int, Callable[[], Any]] = {}
        once = measure_whole((model,), inputs, runs=3, warm_up=1, runtime=runtime, known=sessions)[0].median
        runs = _runs(once, 2)
        return WholeLatency(model, inputs, runs, runtime, once * _MICRO, sessions=sessions)

    def __call__(self, network: nn.Module) -> int:
        """The time of a network, rounded."""
        if network is self.model:
            return round(self.micros)
        if network not in self.known:
            before, after = measure_whole(
                (self.model, network), self.inputs, runs=self.runs, runtime=self.runtime, known=self.sessions
            )
            self.known[network] = round(after.over(before).median * self.micros)
        return self.known[network]

    def of_modules(self, names: Iterable[str]) -> dict[str, int]:
        """The time of each module of the unpruned network, by its share in PyTorch.

        Modules of one class with parameters of the same shapes get the same time, because single ones are measured
        less precisely.
        """
        shares = measure_modules(self.model, self.inputs, names, runs=self.runs)
        alike: dict[object, list[str]] = defaultdict(list)
        for name in shares:
            module = self.model.get_submodule(name)
            alike[type(module), tuple(p.shape for p in module.parameters())].append(name)
        return {
            name: round(self.micros * statistics.fmean(shares[each] for each in same))
            for same in alike.values()
            for name in same
        }


def _runs(seconds: float, networks: int) -> int:
    """How often to time so many networks, each of which takes about as many seconds."""
    return min(max(int(_SECONDS / (2 * networks * max(seconds, 1e-9))), _RUNS[0]), _RUNS[1])


def told_latency(bench: Bench, share: float) -> str:
    """A measured latency in words, with the share that was asked for."""
    return f"latency: {bench.latency()}, on {bench.place()}; asked for {share:.2f}"


def timed(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    curves: Sequence[Curve],
    budget: Budget,
    cut: Callable[[Mapping[int, int]], nn.Module],
) -> LatencyCost:
    """The cost that a latency budget limits.

    Args:
        model: the unpruned network in evaluation mode, on the device where it will run.
        inputs: its inputs.
        graph: its channel graph.
        curves: the error curves of the groups that may lose channels.
        budget: the budget.
        cut: cuts the network to kept channels, given by group index.
    """
    assert budget.latency is not None
    whole = {index: group.width for index, group in enumerate(graph.groups)}
    offered = {curve.group: widths_of(graph.groups[curve.group], budget) for curve in curves}
    samples = [whole]
    for share in _KEPT:
        kept = {g: min(widths, key=lambda k: abs(k - share * widths[0])) for g, widths in offered.items()}
        if whole | kept not in samples:
            samples.append(whole | kept)
    networks = [model, *(cut({g: kept[g] for g in offered}) for kept in samples[1:])]
    once = measure_whole((model,), inputs, runs=3, warm_up=1)[0].median
    runs = _runs(once, len(networks))
    latencies = measure_latencies(networks, inputs, runs=runs)
    terms = (
        *_layers(model, graph, samples, latencies),
        *_rest(model, inputs, graph, samples, [found.rest.median for found in latencies]),
    )
    total = sum(term.at(whole) for term in terms)
    return LatencyCost(terms, budget.latency * total, budget.latency, model, inputs, runs, budget.runtime)


def _layers(
    model: nn.Module, graph: Graph, samples: Sequence[Mapping[int, int]], latencies: Sequence[Latency]
) -> list[Term]:
    """A term for every layer, under the largest of its parameters that loses channels."""
    names = {id(parameter): name for name, parameter in named_once(model).items()}
    cut = {slot.parameter for group in graph.groups for slot in (*group.carriers, *group.consumers)}
    taken: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(latencies))
    for place, latency in enumerate(latencies):
        for layer in latency.layers:
            own = model.get_submodule(layer.name).parameters(recurse=False)
            main = max(own, key=lambda p: (names[id(p)] in cut, p.numel()))
            taken[names[id(main)]][place] += layer.seconds.median * _MICRO
    terms = cost_terms(graph, {name: micros[0] for name, micros in taken.items()})
    return [shaped(term, samples, micros) for term, micros in zip(terms, taken.values(), strict=True)]


def shaped(term: Term, samples: Sequence[Mapping[int, int]], costs: Sequence[float]) -> Term:
    """The term with a curve through its costs at some widths, of which the first are the full ones.

    If noise makes a smaller width slower than a larger one, both get the same cost. Below the smallest sample, the
    curve continues with its last slope.
    """
    points: dict[float, float] = {}
    for kept, cost in zip(samples, costs, strict=True):
        points.setdefault(round(term.share(kept), 9), cost / term.cost if term.cost else 0.0)
    if len(points) < 2 or not term.cost:
        return term
    curve: list[tuple[float, float]] = []
    for share, cost in sorted(points.items(), reverse=True):
        curve.append((share, min(cost, curve[-1][1]) if curve else cost))
    (x1, y1), (x0, y0) = curve[-2:]
    if x0 > 0:
        curve.append((0.0, max(0.0, y0 - x0 * (y1 - y0) / (x1 - x0))))
    return replace(term, curve=tuple(reversed(curve)))


def _rest(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    samples: Sequence[Mapping[int, int]],
    seconds: Sequence[float],
) -> list[Term]:
    """The time between the layers, as terms that are linear in the size of the activations.

    Activation functions, sums and pooling operate on the outputs of layers, so their time depends on the size of these.
    """
    sizes: dict[str, int] = defaultdict(int)

    def on_consumer(call: ConsumerCall) -> None:
        sizes[call.weight] += call.out.numel()

    with undisturbed(model), torch.no_grad():
        run_intercepted(model, inputs, on_consumer=on_consumer, everywhere=True)
    parts: dict[int, float] = defaultdict(float)
    for index, group in enumerate(graph.groups):
        for slot in group.carriers:
            if slot.dim == 0 and slot.parameter in sizes:
                ours = sum(channel != NOT_OURS for channel in slot.channels) / len(slot.channels)
                parts[index] += ours * sizes[slot.parameter] / max(1, sum(sizes.values()))

    def left(kept: Mapping[int, int]) -> float:
        return 1 - sum(part * (1 - kept[g] / graph.groups[g].width) for g, part in parts.items())

    shares, full = [left(kept) for kept in samples], seconds[0]
    slope = 0.0
    if max(shares) > min(shares):
        slope = min(max(0.0, statistics.linear_regression(shares, seconds).slope), full)
    falling = [
        Term(slope * part * _MICRO, ((0, {index: 1}),), (graph.groups[index].width,)) for index, part in parts.items()
    ]
    return [*falling, Term((full - slope * sum(parts.values())) * _MICRO, (), ())]
