"""The analysis that all budgets of a network share: cuttable groups, probes, error curves, and moments.

It takes most of the time. A compression makes and uses it once, and a sweep stores it in a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
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
from lbyl.restore.registry import LOW, choose_restorer
from lbyl.runtime.batches import batch_size, thinned
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
    """Measurements on a network before its channels are chosen.

    Attributes:
        probes: the probes; None if neither criterion nor restorer need any.
        moments: moments of consumers' inputs, by the names of their weights, for a criterion that needs them.
    """

    probes: Probes | None = None
    moments: Mapping[str, ColumnMoments] = field(default_factory=dict)


@dataclass(frozen=True)
class Analysis:
    """The results about a network that do not depend on a budget.

    Attributes:
        restorer: the first restorer that works for the network.
        cuttable: the groups that may lose channels.
        seen: the probes, and moments for the criterion.
        curves: the predicted error of each of these groups at each of its widths.
        consumer_moments: moments of their consumers' inputs, by the names of the consumers' weights, up to a limit of
            memory.
        reference: what the restorer holds all restorations against, made from the probes.
    """

    restorer: Restorer
    cuttable: Cuttable
    seen: Seen
    curves: Curves
    consumer_moments: Mapping[str, ConsumerMoments]
    reference: object = None


_ROOM = 256 * 2**20
"""Largest number of bytes for the moments of all consumers together."""


class Cache(Protocol):
    """A store for an analysis. Each method returns the stored value, or calls ``make`` and stores its result."""

    def cuttable(self, make: Callable[[], Cuttable]) -> Cuttable:
        """The groups that can be cut."""
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
        """The result of ``make``."""
        return make()

    def probes(self, make: Callable[[], Probes]) -> Probes:
        """The result of ``make``."""
        return make()

    def curves(self, make: Callable[[], Curves]) -> Curves:
        """The result of ``make``."""
        return make()

    def consumer_moments(self, make: Callable[[], dict[str, ConsumerMoments]]) -> Mapping[str, ConsumerMoments]:
        """The result of ``make``."""
        return make()


def analyze(
    subject: Subject,
    request: CompressionRequest,
    budget: Budget | None,
    clock: Clock,
    cache: Cache | None = None,
    several: bool = False,
) -> Analysis:
    """Make the analysis from which the widths for a budget are chosen.

    Args:
        subject: the unpruned network; it is not changed.
        request: scope, criterion, seed.
        budget: groups that it excludes are left out; None for all groups.
        clock: measures the time.
        cache: stores the analysis for later runs.
        several: whether the network will be restored for more than one budget.

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
        raise InputError("no group is left that may lose channels: exclude less, or use another scope")
    seen = look(subject, request, wanted, clock, cache, always=restorer.takes_probes)
    probes = seen.probes if restorer.takes_probes else None
    by = ByCriterion(subject.criterion, seen.moments)
    with clock("widths"), restoring(restorer, work):
        curves = cache.curves(
            lambda: measure_curves(work, inputs, graph, wanted, tensors_of(work), by, probes, seed, request.progress)
        )
    moments: Mapping[str, ConsumerMoments] = {}
    reference: object = None
    if probes is not None:
        shown = probes
        with clock("solve"), restoring(restorer, work):
            moments = cache.consumer_moments(
                lambda: restorer.measure(work, graph, wanted, shown, seed, _ROOM, request.progress)
            )
            reference = restorer.reference(work, shown, several)
    return Analysis(restorer, cuttable, seen, curves, moments, reference)


def look(
    subject: Subject,
    request: CompressionRequest,
    groups: Collection[int],
    clock: Clock,
    cache: Cache | None = None,
    always: bool = False,
) -> Seen:
    """Make probes and measure the moments that the criterion needs.

    The probes are those of the restorer, or of the default restorer if the given one uses none. With ``always``, they
    are made even if the criterion needs none.

    Raises:
        RestorationError: the network does not run on probes.
    """
    needed = needs_probes(subject.criterion) and not subject.restorer.chooses
    if not needed and not always:
        return Seen()
    restorer, cache = subject.restorer, cache or NoCache()
    restorer = restorer if restorer.takes_probes else choose_restorer(subject.model, subject.inputs, request.effort)[0]
    work = sharing_copy(subject.model)
    with clock("probe"), restoring(restorer, work):
        probes = cache.probes(lambda: restorer.make_probes(work, subject.inputs, request.seed, request.progress))
        if not needed:
            return Seen(probes)
        products = getattr(subject.criterion, "sees", "") == "products"
        more = {"products": products, "seed": request.seed, "progress": request.progress}
        shown = _fewer(probes) if request.effort == LOW else probes
        return Seen(probes, column_moments(work, subject.graph, groups, shown, **more))


def _fewer(probes: Probes) -> Probes:
    """A third of the probes, but at least 16: ranking channels takes fewer of them than solving for their weights."""
    most = max(16, sum(map(batch_size, probes.batches)) // 3)
    return replace(probes, batches=tuple(thinned(probes.batches, most)) or probes.batches)


def find_cuttable(subject: Subject, request: CompressionRequest) -> Cuttable:
    """Find the groups that can be cut at all, which must be known before a budget is divided among them.

    Raises:
        InputError: no group is in scope, or the restorer chooses channels by itself.
        VerificationError: none can be cut.
    """
    if subject.restorer.chooses:
        name = type(subject.restorer).__name__
        raise InputError(f"{name} chooses channels by itself, which does not work with a budget; give a ratio")
    graph, state = subject.graph, tensors_of(subject.model)
    # Whether groups can be cut does not depend on the chosen channels, so nothing is measured.
    choose = subject.restorer.choose(ByCriterion(subject.criterion))
    trial = select(graph, state, kept_by_ratio(graph, 0.5), request.scope, choose, request.seed)
    check_selection(trial)
    notes: tuple[str, ...] = ()
    if request.verify:
        good = trial if request.strict else that_can_be_cut(subject, trial)
        notes = tuple(f"{name} is not pruned: {why}" for name, why in good.left[len(trial.left) :])
        trial = good
    # Widths are chosen for single groups, but these must be cut in pairs.
    bound = {name for group in graph.groups if group.coupled_with for name in (group.name, group.coupled_with)}
    names = {choice.group.name for choice in trial.choices} - bound
    held = sorted(bound & {choice.group.name for choice in trial.choices})
    notes += tuple(
        f"{name} is not pruned: its heads and its residual connection must lose the same share" for name in held
    )
    found = (index for index, group in enumerate(graph.groups) if group.name in names and group.prunable)
    return Cuttable(tuple(found), notes)


def that_can_be_cut(subject: Subject, selection: Selection) -> Selection:
    """The selection without the groups that can't be cut, which plain pruning finds out before any restoration.

    Raises:
        VerificationError: no group can be cut.
    """
    model = subject.model
    masked = sharing_copy(model, pruned_values(selection, tensors_of(model)))
    return without_trouble(masked, subject.inputs, subject.graph, selection)
