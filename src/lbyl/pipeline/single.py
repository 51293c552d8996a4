"""Compress a model that was traced whole: select, restore, cut, verify."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lbyl.budget.allocate import Widths, choose_widths
from lbyl.budget.budget import Budget
from lbyl.errors import InputError, SurgeryError, VerificationError
from lbyl.graph import Graph
from lbyl.io.report.report import Report
from lbyl.io.report.rows import Row
from lbyl.pipeline.analysis import Analysis, analyze, that_can_be_cut
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.restore.base import Restored
from lbyl.restore.closed_form import restore as solve
from lbyl.restore.least_squares.fit import fit
from lbyl.restore.least_squares.settings import LeastSquares
from lbyl.restore.prune import Prune
from lbyl.runtime.contexts import set_modes, undisturbed
from lbyl.runtime.copying import apply_changes, copy_model, sharing_copy, tensors_of
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.macs import count_parameters, macs_by_shapes
from lbyl.runtime.progress import Clock
from lbyl.selection.select import Choose, Selection, check_selection, select
from lbyl.surgery.attributes import plan_attributes
from lbyl.surgery.cuts import cut_copy, plan_cuts
from lbyl.surgery.masking import masks_of, norm_masks
from lbyl.surgery.plan import GroupPlan, Plan, architecture_of, described, library_version
from lbyl.surgery.verification import NOTHING, follower, said, without_trouble
from lbyl.surgery.verification import verify as check


def compress_whole(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    request: CompressionRequest,
    clock: Clock,
    ground: Analysis | None,
) -> Result:
    """Select, restore, cut and verify a model whose graph is known."""
    restorer, why = request.restorer(model)
    choosing = request.choose(restorer)
    fitted, ratio, planned = restorer, request.ratio, ()
    if request.budget is not None:
        ground = ground or analyze(model, inputs, graph, request, request.budget, clock)
        with clock("widths"):
            widths = _within(model, inputs, graph, ground, choosing, request, request.budget)
        fitted, ratio = ground.with_probes(restorer), widths.ratios(graph)
        planned = (*ground.cuttable.notes, *widths.notes)
    with clock("select"):
        selection = select(graph, tensors_of(model), ratio, request.scope, choosing, request.seed)
    check_selection(selection)
    if isinstance(restorer, LeastSquares) and request.verify and not request.strict and request.budget is None:
        # Restoration is dear here, so what can't be cut is found out before it.
        with clock("verify"):
            selection = that_can_be_cut(model, inputs, graph, selection, request.seed)
    for _ in range(3):
        with clock("restore"):
            if isinstance(fitted, LeastSquares):
                known = ground.consumer_moments if ground else None
                work = sharing_copy(model)
                restoration = fit(work, inputs, graph, selection, fitted, request.seed, request.progress, known)
            else:
                restoration = solve(selection, tensors_of(model), fitted, request.seed, request.progress, masked=False)
            work = sharing_copy(model, restoration.values)
        with clock("cut"):
            restored, assessment = restoration.groups, restoration.assessment
            norms = len(norm_masks(selection))
            statistics = f"{norms} layer norms take their statistics over the channels that stay" if norms else ""
            notes = tuple(note for note in (why, *planned, *restoration.notes, statistics) if note)
            seconds = dict(restoration.seconds)
            del restoration
            attributes = plan_attributes(work, graph, selection)
        try:
            with clock("cut"):
                cuts = plan_cuts(selection)
                smaller = cut_copy(work, cuts, attributes)
            with clock("verify"):
                if request.verify:
                    silent = masks_of(selection) if isinstance(restorer, Prune) else NOTHING
                    attribute = follower(work, graph)
                    found = check(work, smaller, inputs, selection, attribute, graph.macs, silent, request.strict)
                    verified, macs = found.difference, found.macs
                else:
                    verified, macs = None, _unverified_macs(work, smaller, inputs, graph.macs)
        except (VerificationError, SurgeryError):
            if request.strict or not request.verify:
                raise
            with clock("verify"):
                if isinstance(restorer, Prune):
                    work = apply_changes(copy_model(work).eval(), masks_of(selection))
                selection = without_trouble(work, inputs, graph, selection)
            continue
        break
    else:
        raise VerificationError("no part of the groups could be found that can be cut; inspect lists them")

    parts = dict(smaller.named_modules())
    set_modes({parts[name]: module.training for name, module in model.named_modules()})
    report = Report(
        rows=tuple(_row(choice.group.width, len(choice.keep), r) for choice, r in _pairs(selection, restored)),
        left=selection.left,
        barriers=graph.barriers,
        parameters=(count_parameters(work), count_parameters(smaller)),
        macs=macs,
        verified=verified,
        seconds={**{k: v for k, v in clock.seconds.items() if k != "restore" or not seconds}, **seconds},
        notes=notes,
        assessment=assessment,
    )
    settings = {
        "ratio": dict(ratio) if isinstance(ratio, Mapping) else ratio,
        **({"budget": described(request.budget)} if request.budget else {}),
        "scope": request.scope,
        "criterion": described(restorer if getattr(restorer, "chooses", False) else request.criterion),
        "restore": described(restorer),
        "seed": request.seed,
    }
    plan = Plan(
        groups=tuple(GroupPlan(c.group.name, c.group.width, c.keep) for c in selection.choices),
        cuts=cuts,
        settings=settings,
        architecture=architecture_of(model),
        source=request.source,
        inputs=inputs.describe(),
        library=library_version(),
        attributes=attributes,
    )
    return Result(smaller, plan, report)


def _within(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    ground: Analysis,
    choose: Choose,
    request: CompressionRequest,
    budget: Budget,
) -> Widths:
    """The widths that a budget comes to."""
    state, work = tensors_of(model), sharing_copy(model)

    def cut(ratios: Mapping[str, float]) -> nn.Module:
        part = select(graph, state, ratios, request.scope, choose, request.seed)
        return cut_copy(work, plan_cuts(part), plan_attributes(work, graph, part))

    return choose_widths(work, inputs, graph, ground.curves, budget, cut)


def _unverified_macs(before: nn.Module, after: nn.Module, inputs: ExampleInputs, known: int | None) -> tuple[int, int]:
    try:
        with undisturbed(before), undisturbed(after):
            whole = macs_by_shapes(before, inputs) if known is None else known
            return whole, macs_by_shapes(after, inputs)
    except InputError as error:
        raise VerificationError(
            f"the cut network does not run: {said(error)}. Leave verification on (verify=True): it "
            "finds the groups that can't be cut, and leaves them whole."
        ) from error


def _pairs(selection: Selection, restored: tuple[Restored, ...]) -> Iterator[tuple[Any, Restored]]:
    return zip(selection.choices, restored, strict=True)


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
