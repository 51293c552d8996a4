"""What all budgets of a network share: which groups can be cut, the probes, error curves, and moments.

This is where the time goes. One compression makes it and uses it once; a sweep keeps it on a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lbyl.budget.budget import Budget
from lbyl.budget.curves import Curves, measure_curves
from lbyl.errors import InputError
from lbyl.moments import Probes
from lbyl.moments.accumulate import ConsumerMoments
from lbyl.moments.columns import column_moments
from lbyl.pipeline.prepare import Subject, restoring
from lbyl.pipeline.request import CompressionRequest
from lbyl.restore.base import Restorer
from lbyl.restore.registry import choose_restorer
from lbyl.runtime.copying import sharing_copy, tensors_of
from lbyl.runtime.progress import Clock
from lbyl.selection.criteria.base import needs_probes
from lbyl.selection.select import ByCriterion, Selection, check_selection, kept_by_ratio, select
from lbyl.selection.view import ColumnMoments
from lbyl.surgery.masking import pruned_values
from lbyl.surgery.verification import without_trouble


@dataclass(frozen=True)
class Cuttable:
    """Indices of the groups that can be cut, and notes about the others."""

    groups: tuple[int, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What was measured on a network before its channels are chosen.

    Attributes:
        probes: what it was run on; None where neither criterion nor restorer ask for any.
        moments: what consumers are fed, by the names of their weights, for a criterion that looks at it.
    """

    probes: Probes | None = None
    moments: Mapping[str, ColumnMoments] = field(default_factory=dict)


@dataclass(frozen=True)
class Analysis:
    """What is known about a network and does not depend on any budget.

    Attributes:
        restorer: the one that could do its work.
        cuttable: the groups that may lose channels.
        seen: what the network was run on, and what passed through these groups.
        curves: the predicted error of each of these groups at each of its widths.
        consumer_moments: moments of what their consumers read, by the consumers' weights, as far as there is
            room for them.
    """

    restorer: Restorer
    cuttable: Cuttable
    seen: Seen
    curves: Curves
    consumer_moments: Mapping[str, ConsumerMoments]


_ROOM = 256 * 2**20
"""The most bytes that the moments of all consumers may take together."""


class Cache(Protocol):
    """Where an analysis is stored. Each method returns what is stored, or calls ``make`` and stores the result."""

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
    """Stores nothing: every method calls ``make``."""

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
    subject: Subject,
    request: CompressionRequest,
    budget: Budget | None,
    clock: Clock,
    cache: Cache | None = None,
) -> Analysis:
    """Measure what the widths for a budget are chosen by.

    Args:
        subject: the unpruned network; it is not changed.
        request: scope, criterion, seed.
        budget: groups that it excludes are not looked at; None for all groups.
        clock: takes the seconds.
        cache: where it is kept from one run to the next.

    Raises:
        InputError: no group is in scope, or the restorer chooses channels by itself.
        VerificationError: no group can be cut.
    """
    graph, inputs, restorer, seed = subject.graph, subject.inputs, subject.restorer, request.seed
    cache, work = cache or NoCache(), sharing_copy(subject.model)

    with clock("verify"):
        cuttable = cache.cuttable(lambda: find_cuttable(subject, request))
    wanted = [index for index in cuttable.groups if not (budget and budget.excludes(graph.groups[index]))]
    if not wanted:
        raise InputError("no group is left that may lose channels: exclude less, or take another scope")
    seen = look(subject, request, wanted, clock, cache, always=restorer.takes_probes)
    probes = seen.probes if restorer.takes_probes else None
    by = ByCriterion(subject.criterion, seen.moments)
    with clock("widths"), restoring(restorer):
        curves = cache.curves(
            lambda: measure_curves(work, inputs, graph, wanted, tensors_of(work), by, probes, seed, request.progress)
        )
    moments: Mapping[str, ConsumerMoments] = {}
    if probes is not None:
        shown = probes
        with clock("solve"), restoring(restorer):
            moments = cache.consumer_moments(
                lambda: restorer.measure(work, graph, wanted, shown, seed, _ROOM, request.progress)
            )
    return Analysis(restorer, cuttable, seen, curves, moments)


def look(
    subject: Subject,
    request: CompressionRequest,
    groups: Collection[int],
    clock: Clock,
    cache: Cache | None = None,
    always: bool = False,
) -> Seen:
    """Make probes and look at what passes through some groups, as far as the criterion asks for it.

    Probes are the restorer's, or where it takes none, those that the best restorer would take. ``always`` makes them
    even where the criterion does not ask for any.

    Raises:
        RestorationError: the network does not run on probes.
    """
    needed = needs_probes(subject.criterion) and not subject.restorer.chooses
    if not needed and not always:
        return Seen()
    restorer, cache = subject.restorer, cache or NoCache()
    restorer = restorer if restorer.takes_probes else choose_restorer(subject.model, subject.inputs)[0]
    work = sharing_copy(subject.model)
    with clock("probe"), restoring(restorer):
        probes = cache.probes(lambda: restorer.make_probes(work, subject.inputs, request.seed, request.progress))
        if not needed:
            return Seen(probes)
        products = getattr(subject.criterion, "sees", "") == "products"
        more = {"products": products, "seed": request.seed, "progress": request.progress}
        return Seen(probes, column_moments(work, subject.graph, groups, probes, **more))


def find_cuttable(subject: Subject, request: CompressionRequest) -> Cuttable:
    """The groups that can be cut at all. This must be known before a budget is divided among them.

    Raises:
        InputError: no group is in scope, or the restorer chooses channels by itself.
        VerificationError: none can be cut.
    """
    if subject.restorer.chooses:
        name = type(subject.restorer).__name__
        raise InputError(f"{name} chooses channels by itself, so no budget can; give a ratio")
    graph, state = subject.graph, tensors_of(subject.model)
    # What can be cut does not depend on which channels are tried: nothing is measured for it.
    choose = subject.restorer.choose(ByCriterion(subject.criterion))
    trial = select(graph, state, kept_by_ratio(graph, 0.5), request.scope, choose, request.seed)
    check_selection(trial)
    notes: tuple[str, ...] = ()
    if request.verify:
        good = trial if request.strict else that_can_be_cut(subject, trial)
        notes = tuple(f"{name} stays whole: {why}" for name, why in good.left[len(trial.left) :])
        trial = good
    # Widths are dealt out group by group, and these go two at a time.
    bound = {name for group in graph.groups if group.coupled_with for name in (group.name, group.coupled_with)}
    names = {choice.group.name for choice in trial.choices} - bound
    held = sorted(bound & {choice.group.name for choice in trial.choices})
    notes += tuple(f"{name} stays whole: heads and stream have to lose the same share" for name in held)
    found = (index for index, group in enumerate(graph.groups) if group.name in names and group.prunable)
    return Cuttable(tuple(found), notes)


def that_can_be_cut(subject: Subject, selection: Selection) -> Selection:
    """The selection without the groups that can't be cut, as plain pruning shows before anything is restored.

    Raises:
        VerificationError: none of them can be cut.
    """
    model = subject.model
    masked = sharing_copy(model, pruned_values(selection, tensors_of(model)))
    return without_trouble(masked, subject.inputs, subject.graph, selection)
