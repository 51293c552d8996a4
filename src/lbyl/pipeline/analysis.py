"""What all budgets of a network can share: which groups can be cut, the probes, and what the channels are worth.

This is where the time goes. One compression makes it and uses it once; a sweep keeps it on a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn

from lbyl.budget.budget import Budget
from lbyl.budget.curves import Curves, measure_curves
from lbyl.errors import InputError
from lbyl.graph import Graph
from lbyl.moments import Probes, ProbeSource
from lbyl.moments.accumulate import ConsumerMoments
from lbyl.moments.given import Given
from lbyl.pipeline.request import CompressionRequest
from lbyl.restore.base import Restorer
from lbyl.restore.closed_form import restore as solve
from lbyl.restore.least_squares.fit import make_probes, read
from lbyl.restore.least_squares.settings import LeastSquares
from lbyl.restore.prune import Prune
from lbyl.runtime.copying import sharing_copy, tensors_of
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Clock
from lbyl.selection.select import Selection, check_selection, select
from lbyl.surgery.verification import without_trouble


@dataclass(frozen=True)
class Cuttable:
    """Indices of the groups that can be cut, and what the user should know of the others."""

    groups: tuple[int, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """What was found out about a network before any budget is met.

    Attributes:
        cuttable: the groups that may lose channels.
        probes: what moments are measured on; None where the restorer asks for none.
        curves: the predicted error of each of these groups at each of its widths.
        consumer_moments: moments of what their consumers read, by the consumers' weights, as far as there is
            room for them.
    """

    cuttable: Cuttable
    probes: Probes | None
    curves: Curves
    consumer_moments: Mapping[str, ConsumerMoments]

    def with_probes(self, restorer: Restorer | LeastSquares) -> Restorer | LeastSquares:
        """The restorer with its probes made."""
        if self.probes is None or not isinstance(restorer, LeastSquares):
            return restorer
        return replace(restorer, moments=Given(self.probes))


_ROOM = 256 * 2**20
"""Bytes that all consumer_moments together may take."""


class Cache(Protocol):
    """Where analysis is kept: each method returns what is there, or what ``make`` makes, once it is kept."""

    def cuttable(self, make: Callable[[], Cuttable]) -> Cuttable:
        """Which groups can be cut."""
        ...

    def probes(self, make: Callable[[], Probes]) -> Probes:
        """The probes."""
        ...

    def curves(self, make: Callable[[], Curves]) -> Curves:
        """The error curves."""
        ...

    def consumer_moments(self, make: Callable[[], dict[str, ConsumerMoments]]) -> Mapping[str, ConsumerMoments]:
        """The consumers' moments."""
        ...


@dataclass(frozen=True)
class NoCache:
    """Nothing is kept: everything is made."""

    def cuttable(self, make: Callable[[], Cuttable]) -> Cuttable:
        """Made."""
        return make()

    def probes(self, make: Callable[[], Probes]) -> Probes:
        """Made."""
        return make()

    def curves(self, make: Callable[[], Curves]) -> Curves:
        """Made."""
        return make()

    def consumer_moments(self, make: Callable[[], dict[str, ConsumerMoments]]) -> Mapping[str, ConsumerMoments]:
        """Made."""
        return make()


def analyze(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    request: CompressionRequest,
    budget: Budget | None,
    clock: Clock,
    cache: Cache | None = None,
) -> Analysis:
    """Find out what the widths for any budget are chosen by.

    Args:
        model: the unpruned network; it is not changed.
        inputs: what it is called with.
        graph: its channel graph.
        request: scope, criterion, restorer, seed.
        budget: groups that it excludes are not looked at; None for all groups.
        clock: takes the seconds.
        cache: where it is kept from one run to the next.

    Raises:
        InputError: no group is in scope, or the restorer chooses channels by itself.
        VerificationError: no group can be cut.
    """
    restorer, _ = request.restorer(model)
    choose, cache, work = request.choose(restorer), cache or NoCache(), sharing_copy(model)

    with clock("verify"):
        cuttable = cache.cuttable(lambda: find_cuttable(model, inputs, graph, request))
    wanted = [index for index in cuttable.groups if not (budget and budget.excludes(graph.groups[index]))]
    if not wanted:
        raise InputError("no group is left that may lose channels: exclude less, or take another scope")
    probes = None
    if isinstance(restorer, LeastSquares) and isinstance(restorer.moments, ProbeSource):
        asked = restorer
        with clock("probe"):
            probes = cache.probes(lambda: make_probes(work, inputs, asked, request.seed, request.progress))
    with clock("widths"):
        curves = cache.curves(
            lambda: measure_curves(
                work, inputs, graph, wanted, tensors_of(work), choose, probes, request.seed, request.progress
            )
        )
    consumer_moments: Mapping[str, ConsumerMoments] = {}
    if isinstance(restorer, LeastSquares) and probes is not None:
        settings, shown = restorer, probes
        with clock("solve"):
            consumer_moments = cache.consumer_moments(
                lambda: read(work, graph, wanted, shown, settings, request.seed, _ROOM)
            )
    return Analysis(cuttable, probes, curves, consumer_moments)


def find_cuttable(model: nn.Module, inputs: ExampleInputs, graph: Graph, request: CompressionRequest) -> Cuttable:
    """The groups that can be cut at all, which must be known before widths are dealt out.

    Raises:
        InputError: no group is in scope, or the restorer chooses channels by itself.
        VerificationError: none can be cut.
    """
    restorer, _ = request.restorer(model)
    if getattr(restorer, "chooses", False):
        raise InputError(f"{type(restorer).__name__} chooses channels by itself, so no budget can; give a ratio")
    state = tensors_of(model)
    trial = select(graph, state, 0.5, request.scope, request.choose(restorer), request.seed)
    check_selection(trial)
    notes: tuple[str, ...] = ()
    if request.verify:
        good = trial if request.strict else that_can_be_cut(model, inputs, graph, trial, request.seed)
        notes = tuple(f"{name} stays whole: {why}" for name, why in good.left[len(trial.left) :])
        trial = good
    # Widths are dealt out group by group, and these go two at a time.
    bound = {name for group in graph.groups if group.coupled_with for name in (group.name, group.coupled_with)}
    names = {choice.group.name for choice in trial.choices} - bound
    held = sorted(bound & {choice.group.name for choice in trial.choices})
    notes += tuple(f"{name} stays whole: heads and stream have to lose the same share" for name in held)
    found = (index for index, group in enumerate(graph.groups) if group.name in names and group.prunable)
    return Cuttable(tuple(found), notes)


def that_can_be_cut(
    model: nn.Module, inputs: ExampleInputs, graph: Graph, selection: Selection, seed: int
) -> Selection:
    """The selection without the groups that can't be cut, as plain pruning shows before anything is restored.

    Raises:
        VerificationError: none of them can be cut.
    """
    masked = solve(selection, tensors_of(model), Prune(), seed).values
    return without_trouble(sharing_copy(model, masked), inputs, graph, selection)
