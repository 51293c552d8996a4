"""Compresses a model that was traced as a whole: select, restore, cut, verify."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from lbyl.budget.allocate import Widths, choose_widths
from lbyl.budget.budget import Budget
from lbyl.errors import InputError, RestorationError, SurgeryError, VerificationError, first_line
from lbyl.io.report.report import Report
from lbyl.io.report.rows import Row
from lbyl.moments import Probes
from lbyl.pipeline.analysis import Analysis, analyze, look, that_can_be_cut
from lbyl.pipeline.forecast import Forecaster
from lbyl.pipeline.prepare import Subject, first_that_restores, restoring
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.restore.base import Restoration, RestorationProblem, Restored
from lbyl.runtime.contexts import set_modes, undisturbed
from lbyl.runtime.copying import apply_changes, copy_model, sharing_copy, tensors_of
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.macs import count_parameters, macs_and_shapes
from lbyl.runtime.progress import Clock
from lbyl.runtime.settings import described
from lbyl.runtime.version import library_version
from lbyl.selection.select import (
    ByCriterion,
    KeptCounts,
    Ratio,
    Selection,
    check_patterns,
    check_selection,
    kept_by_ratio,
    select,
)
from lbyl.selection.whole import left_whole
from lbyl.surgery.attributes import Attribute, plan_attributes
from lbyl.surgery.cuts import Cut, cut_copy, plan_cuts
from lbyl.surgery.masking import Masks, norm_masks
from lbyl.surgery.plan import GroupPlan, Plan, architecture_of
from lbyl.surgery.verification import follower, said, without_trouble
from lbyl.surgery.verification import verify as check


@dataclass(frozen=True)
class _Planned:
    """The selected channels, and notes for the report."""

    selection: Selection
    ratio: Ratio
    probes: Probes | None
    notes: tuple[str, ...] = ()
    analysis: Analysis | None = None


@dataclass(frozen=True)
class _Cut:
    """A smaller network that computes what the masked one computes."""

    model: nn.Module
    cuts: tuple[Cut, ...]
    attributes: tuple[Attribute, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    verified: float | None
    note: str = ""


def compress_whole(
    subject: Subject,
    request: CompressionRequest,
    clock: Clock,
    ground: Analysis | None,
    forecaster: Forecaster | None = None,
) -> Result:
    """Select, restore, cut and verify a model whose graph is known.

    If no restorer was requested and the default one fails, another one is used, and a note says so.
    """
    if ground is not None:
        subject = replace(subject, restorer=ground.restorer)
    return first_that_restores(
        subject, request, lambda attempt: _compressed(attempt, request, clock, ground, forecaster)
    )[1]


def _compressed(
    subject: Subject,
    request: CompressionRequest,
    clock: Clock,
    ground: Analysis | None,
    forecaster: Forecaster | None,
) -> Result:
    """Select, restore, cut and verify with one restorer."""
    if ground is not None and ground.restorer != subject.restorer:
        ground = None
    planned = _plan(subject, request, clock, ground)
    if forecaster and planned.probes is None and forecaster.asks_for_probes(subject.restorer):
        with clock("probe"), undisturbed(subject.model), restoring(subject.restorer, subject.model):
            made = subject.restorer.make_probes(subject.model, subject.inputs, request.seed, request.progress)
            planned = replace(planned, probes=made)
    selection, why = planned.selection, ""
    for _ in range(_ATTEMPTS):
        with clock("restore"):
            restoration = _restore(subject, request, replace(planned, selection=selection))
            work = sharing_copy(subject.model, restoration.values)
            # Removed, because the values are large and the work copy holds them from here on.
            restoration = replace(restoration, values={})
        try:
            done = _cut(subject, request, clock, selection, work, restoration.masks)
        except (VerificationError, SurgeryError) as error:
            if request.strict or not request.verify:
                raise
            why = first_line(error)
            with clock("verify"):
                if restoration.masks:
                    work = apply_changes(copy_model(work).eval(), restoration.masks)
                selection = without_trouble(work, subject.inputs, subject.graph, selection)
            continue
        break
    else:
        raise VerificationError(
            f"no groups were found that can be cut together: {why}. Leave groups out, with a ratio by group names that "
            "is 0 for them or with Budget(exclude=...); lbyl.inspect lists all groups"
        )
    parts = dict(done.model.named_modules())
    set_modes({parts[name]: module.training for name, module in subject.model.named_modules()})
    planned = replace(planned, selection=selection)
    forecast = None
    if forecaster:
        lifelike = planned.probes if forecaster.asks_for_probes(subject.restorer) else None
        with clock("forecast"):
            forecast = forecaster(done.model, lifelike)
    report = replace(_report(subject, planned, restoration, done, clock), forecast=forecast)
    return Result(done.model, _written_plan(subject, request, planned, done), report)


_ATTEMPTS = 3
"""How often a selection is tried; after each failure, groups that can't be cut are left out."""


def _plan(subject: Subject, request: CompressionRequest, clock: Clock, ground: Analysis | None) -> _Planned:
    """Choose widths and channels, and leave out groups that can't be cut."""
    model, graph, restorer = subject.model, subject.graph, subject.restorer
    ratio, notes = request.ratio, ()
    if request.budget is not None:
        ground = ground or analyze(subject, request, request.budget, clock)
        seen = ground.seen
        with clock("widths"):
            widths = _within(subject, ground, request, request.budget)
        kept, ratio, notes = widths.counts(graph), widths.ratios(graph), (*ground.cuttable.notes, *widths.notes)
    else:
        if not subject.path:
            check_patterns(ratio, (name for group in graph.groups for name in (group.name, *group.layers)))
        kept = kept_by_ratio(graph, ratio, subject.path)
        seen = ground.seen if ground else look(subject, request, list(kept.counts), clock)
    with clock("select"):
        choose = restorer.choose(ByCriterion(subject.criterion, seen.moments))
        selection = select(graph, tensors_of(model), kept, request.scope, choose, request.seed)
    if request.budget is not None:
        excluded = {each.name for each in graph.groups if each.reason is None and request.budget.excludes(each)}
        left = tuple((name, "excluded" if name in excluded else why) for name, why in selection.left)
        selection = replace(selection, left=left)
    check_selection(selection)
    if restorer.runs_network and request.verify and not request.strict and request.budget is None:
        # Restoration is expensive here, so groups that can't be cut are found before it.
        with clock("verify"):
            selection = that_can_be_cut(subject, selection)
    return _Planned(selection, ratio, seen.probes, notes, ground)


def _within(subject: Subject, ground: Analysis, request: CompressionRequest, budget: Budget) -> Widths:
    """Choose the widths for a budget."""
    graph, state, work = subject.graph, tensors_of(subject.model), sharing_copy(subject.model)
    choose = subject.restorer.choose(ByCriterion(subject.criterion, ground.seen.moments))

    def cut(kept: KeptCounts) -> nn.Module:
        part = select(graph, state, kept, request.scope, choose, request.seed)
        return cut_copy(work, plan_cuts(part), plan_attributes(work, graph, part))

    return choose_widths(work, subject.inputs, graph, ground.curves, budget, cut)


def _restore(subject: Subject, request: CompressionRequest, planned: _Planned) -> Restoration:
    """New weights for the consumers."""
    problem = RestorationProblem(
        subject.model,
        subject.inputs,
        subject.graph,
        planned.selection,
        request.seed,
        request.progress,
        probes=planned.probes if subject.restorer.takes_probes else None,
    )
    if planned.analysis is not None:
        shared = planned.analysis
        problem = replace(problem, consumer_moments=shared.consumer_moments, reference=shared.reference)
    with undisturbed(subject.model), restoring(subject.restorer, subject.model):
        restoration = subject.restorer.restore(problem)
        if not isinstance(restoration, Restoration):
            kind = type(restoration).__name__
            raise RestorationError(
                f"{type(subject.restorer).__name__}.restore returned {kind}, not an lbyl.Restoration"
            )
        return restoration


def _cut(
    subject: Subject, request: CompressionRequest, clock: Clock, selection: Selection, work: nn.Module, masks: Masks
) -> _Cut:
    """Cut the restored network, and verify that it computes what the masked network computes.

    Raises:
        SurgeryError: a cut does not fit the network.
        VerificationError: the cut network computes something else.
    """
    inputs, graph = subject.inputs, subject.graph
    with clock("cut"):
        attributes = plan_attributes(work, graph, selection)
        cuts = plan_cuts(selection)
        smaller = cut_copy(work, cuts, attributes)
    with clock("verify"):
        if request.verify:
            attribute = follower(work, graph)
            found = check(work, smaller, inputs, selection, attribute, graph.macs, masks, request.strict)
            verified, macs, note = found.difference, found.macs, found.note
        else:
            verified, note, macs = None, "", _unverified_macs(work, smaller, inputs)
    parameters = count_parameters(work), count_parameters(smaller)
    return _Cut(smaller, cuts, attributes, parameters, macs, verified, note)


def _report(subject: Subject, planned: _Planned, restoration: Restoration, done: _Cut, clock: Clock) -> Report:
    """The report of the compression."""
    selection, own = planned.selection, restoration.seconds
    kept = norm_masks(selection)
    norms = sum(isinstance(key, str) for key in kept)
    which = "a layer norm takes its" if norms == 1 else f"{norms} layer norms take their"
    statistics = f"{which} statistics over the kept channels" if norms else ""
    others = len(kept) - norms
    which = (
        "a statistic in the model's own code is" if others == 1 else f"{others} statistics in the model's own code are"
    )
    taken = f"{which} taken over the kept channels" if others else ""
    pairs = zip(selection.choices, restoration.groups, strict=True)
    return Report(
        rows=tuple(_row(choice.group.width, len(choice.keep), restored) for choice, restored in pairs),
        left=selection.left,
        barriers=subject.graph.barriers,
        parameters=done.parameters,
        macs=done.macs,
        verified=done.verified,
        seconds=_summed({k: v for k, v in clock.seconds.items() if k != "restore" or not own}, own),
        notes=tuple(
            note
            for note in (
                *subject.why,
                subject.scored,
                *subject.graph.notes,
                *planned.notes,
                *restoration.notes,
                left_whole(subject.graph, subject.model.named_parameters(remove_duplicate=False)),
                statistics,
                taken,
                done.note,
            )
            if note
        ),
        assessment=restoration.assessment,
        held_out_errors=restoration.held_out_errors,
    )


def _summed(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """The sum of two sets of seconds by stage."""
    return {stage: first.get(stage, 0.0) + second.get(stage, 0.0) for stage in (*first, *second)}


def _written_plan(subject: Subject, request: CompressionRequest, planned: _Planned, done: _Cut) -> Plan:
    """The plan for the saved folder."""
    ratio, restorer = planned.ratio, subject.restorer
    settings = {
        "ratio": dict(ratio) if isinstance(ratio, Mapping) else ratio,
        **({"budget": described(request.budget)} if request.budget else {}),
        "scope": request.scope,
        "criterion": described(restorer.settings if restorer.chooses else subject.criterion),
        "restore": described(restorer.settings),
        "seed": request.seed,
    }
    return Plan(
        groups=tuple(GroupPlan(c.group.name, c.group.width, c.keep) for c in planned.selection.choices),
        cuts=done.cuts,
        settings=settings,
        architecture=architecture_of(subject.model),
        source=request.source,
        inputs=subject.inputs.describe(),
        library=library_version(),
        attributes=done.attributes,
        network=type(subject.model).__name__,
    )


def _unverified_macs(before: nn.Module, after: nn.Module, inputs: ExampleInputs) -> tuple[int, int]:
    """The multiply-accumulates of both networks, which one run of each without its layers gives.

    Raises:
        VerificationError: the cut network does not run, or has outputs of other shapes.
    """
    advice = "Leave verification on (verify=True): it finds the groups that can't be cut and does not prune them."
    try:
        with undisturbed(before), undisturbed(after):
            (whole, wanted), (left, found) = (macs_and_shapes(model, inputs) for model in (before, after))
    except InputError as error:
        raise VerificationError(f"the cut network does not run: {said(error)}. {advice}") from error
    for a, b in zip(wanted, found, strict=False):
        if a != b:
            raise VerificationError(f"an output of the cut network has the shape {[*b]} in place of {[*a]}. {advice}")
    if len(wanted) != len(found):
        raise VerificationError(f"the cut network has {len(found)} outputs in place of {len(wanted)}. {advice}")
    return whole, left


def _row(before: int, after: int, restored: Restored) -> Row:
    terms = restored.terms
    errors = (terms.residual, terms.batch_norm, terms.activation) if terms else (None, None, None)
    return Row(
        restored.group,
        before,
        after,
        *errors,
        seconds=restored.seconds,
        note=restored.note,
        errors=restored.errors,
    )
