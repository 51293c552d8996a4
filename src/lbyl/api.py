"""The verbs: `compress` walks the street from graph to result, `inspect` stops after the first house."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lbyl import artifact
from lbyl.budget import Budget
from lbyl.clock import Clock
from lbyl.criteria import Criterion, resolve_criterion
from lbyl.errors import InputError, SurgeryError, TraceError, VerificationError
from lbyl.fitting import fit
from lbyl.folding import Fold, fold_computed
from lbyl.graph import Graph, trace
from lbyl.groundwork import Groundwork, lay_groundwork, that_can_be_cut
from lbyl.inputs import ExampleInputs
from lbyl.kept import kept_channels
from lbyl.measure import count_macs, count_parameters, macs_by_shapes
from lbyl.modes import duplicate, set_modes, uncollected, undisturbed
from lbyl.moments import Progress
from lbyl.order import Order
from lbyl.parts import Part, joined, part_of, traceable_parts
from lbyl.plan import GroupPlan, Plan, architecture_of
from lbyl.report import Report, Row
from lbyl.restoration import Restored, silences
from lbyl.restoration import restore as solve
from lbyl.restorers import LeastSquares, Prune, Restorer, resolve_restorer
from lbyl.selection import (
    Choose,
    Ratio,
    Selection,
    check_ratio,
    check_selection,
    ratio_for,
    select,
)
from lbyl.surgery import borrowing, cut_copy, lay_on, plan_attributes, plan_cuts, tensors_of
from lbyl.verification import NOTHING, follower, said, without_trouble
from lbyl.verification import verify as check
from lbyl.widths import Widths, choose_widths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lbyl.comparison import Bench

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | ExampleInputs


@dataclass(frozen=True)
class Result:
    """A compressed network, what was cut, and what it cost.

    Attributes:
        model: the new, physically smaller network; the one that was passed in is untouched.
        plan: what was cut and with which settings.
        report: one row a group, totals, what was left alone and why.
    """

    model: nn.Module
    plan: Plan
    report: Report

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the weights, ``lbyl.json``, a model card and a report into a new folder, whole or not at all.

        ``report.html`` is the report for people, ``report.json`` the one for machines.

        Raises:
            InputError: the path exists or can't be written.
        """
        return artifact.save(path, self.model, self.plan, self.report)

    def timed(self, bench: Bench) -> Result:
        """The same result, with what :func:`lbyl.bench` found in its report."""
        return replace(self, report=replace(self.report, latency=bench.timing()))

    def plot(self) -> Figure:
        """Widths and errors of the groups as a Matplotlib figure; see :func:`lbyl.page.plot`."""
        from lbyl.page import plot

        return plot(self.report)

    def _repr_html_(self) -> str:
        from lbyl.page import result_html

        return result_html(self.plan, self.report)


@dataclass(frozen=True)
class Inspection:
    """The channel groups of a model; print it with Rich, or read ``graph``.

    Where the model could not be traced whole, ``graph`` holds the groups of the parts that could be, ``untraced``
    names the others, and ``note`` says why.
    """

    graph: Graph
    untraced: tuple[tuple[str, str], ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Names, widths, producers, consumers, and why a group can't be pruned, as plain data."""
        return {
            "groups": [
                {
                    "name": group.name,
                    "width": group.width,
                    "producers": list(group.layers),
                    "consumers": [slot.parameter.rpartition(".")[0] for slot in group.readers],
                    "coupled": group.coupled,
                    "outside": group.outside,
                    "prunable": group.prunable,
                    "reason": group.reason,
                }
                for group in self.graph.groups
            ],
            "barriers": list(self.graph.barriers),
            "untraced": dict(self.untraced),
            "note": self.note,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=box.SIMPLE_HEAD, title="Channel groups", title_justify="left")
        for name in ("group", "width", "also made by", "read by", "prunable"):
            table.add_column(name, justify="right" if name == "width" else "left")
        for row in self.to_dict()["groups"]:
            if row["reason"]:
                verdict = f"no: {row['reason']}"
            else:
                verdict = f"scope=all ({row['outside']})" if row["outside"] else "yes"
            others, readers = row["producers"][1:], row["consumers"]
            table.add_row(*map(Text, (row["name"], str(row["width"]), _few(others), _few(readers), verdict)))
        yield table
        for barrier in self.graph.barriers:
            yield Text(f"barrier: {barrier}")
        for name, why in self.untraced:
            yield Text(f"not traced: {name} ({why})")
        if self.note:
            yield Text(f"note: {self.note}")

    def _repr_html_(self) -> str:
        from lbyl.page import inspection_html

        return inspection_html(self)


def _few(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def inspect(
    model: nn.Module, example_inputs: Inputs, *, strict: bool = False, submodule: str | None = None
) -> Inspection:
    """Find the channel groups of a model: names, widths, producers, consumers, prunable or why not.

    Args:
        model: the network; it is not changed.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        strict: raise where the model can't be traced whole, instead of looking at the parts that can.
        submodule: look only at the submodule of this name.

    Raises:
        InputError: inputs that are none of these, or no such submodule.
        TraceError: ``torch.export`` can't trace the model on them.
    """
    check_module(model)
    found = _trace(model, ExampleInputs.of(example_inputs), strict, submodule)
    if found.graph is not None:
        return Inspection(found.graph)
    return Inspection(joined(found.parts), found.untraced, found.why)


@dataclass(frozen=True)
class Traced:
    """A model with its graph; or the parts of it that could be traced, and why the rest could not."""

    model: nn.Module
    graph: Graph | None
    folds: tuple[Fold, ...] = ()
    parts: tuple[Part, ...] = ()
    untraced: tuple[tuple[str, str], ...] = ()
    why: str = ""


def _trace(model: nn.Module, inputs: ExampleInputs, strict: bool, submodule: str | None) -> Traced:
    if submodule is not None:
        return Traced(model, None, parts=(part_of(model, inputs, submodule),))
    try:
        with undisturbed(model):
            graph = trace(model, inputs)
    except TraceError as error:
        if strict:
            raise
        try:
            parts, untraced = traceable_parts(model, inputs)
        except InputError:  # it does not even run, which the trace's error tells better
            raise error from None
        if not parts:
            raise
        return Traced(model, None, (), tuple(parts), tuple(untraced.items()), f"{error} It is done in parts instead.")
    if not graph.computed:
        return Traced(model, graph)
    plain, folds = fold_computed(model, inputs, graph.computed)
    if folds:
        with undisturbed(plain):
            graph = trace(plain, inputs)
    return Traced(plain, graph, folds)


@dataclass(frozen=True)
class Prepared:
    """A model that was checked and traced, and what it is called with."""

    model: nn.Module
    inputs: ExampleInputs
    traced: Traced

    @property
    def parts(self) -> tuple[tuple[str, nn.Module, ExampleInputs, Graph], ...]:
        """What is cut by itself: path, module, inputs, graph; the path of a model that was traced whole is ""."""
        traced = self.traced
        if traced.graph is not None:
            return (("", traced.model, self.inputs, traced.graph),)
        return tuple((p.path, self.model.get_submodule(p.path), p.inputs, p.graph) for p in traced.parts)


def compress(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    ratio: Ratio | None = None,
    budget: Budget | None = None,
    scope: str = "inner",
    criterion: str | Criterion = "l2",
    restore: str | Restorer | LeastSquares = "auto",
    seed: int = 0,
    verify: bool = True,
    strict: bool = False,
    submodule: str | None = None,
    source: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Drop channels physically and let the kept ones make up for them.

    Args:
        model: a trained network; it is not changed.
        example_inputs: what the model is called with: a tensor, a tuple, or a dict of keyword inputs.
        ratio: share of the channels that each prunable group loses; or ``{glob: share}`` over group and layer
            names, of which the last match counts and unmatched groups stay whole. 0.5 where no budget is given.
        budget: what the smaller network may cost, in place of a ratio; the groups' widths are then chosen such that
            the predicted error is least.
        scope: "inner" prunes groups that no residual sum couples and no layer norm is taken over, "all" every
            prunable one; a layer norm over pruned channels then takes its statistics over those that stay.
        criterion: "l1", "l2", "gm", "random", or an object with ``score(filters, generator)``.
        restore: a restorer or its lower-case name ("lbyl", "prune", "merge", "coreset"); "auto" takes the best
            that needs no data, and the report says which and why.
        seed: for whatever is drawn at random; equal seeds give equal results.
        verify: compare the cut network with the masked one in float64 (switch it off for huge models).
        strict: raise where the model can't be traced whole or a group turns out not to be cuttable. Without it such
            a model is compressed in the parts that can be traced, such a group stays whole, and the report says so.
        submodule: compress only the submodule of this name ("backbone"), on what the model calls it with.
        source: where the model comes from, kept in the plan so that ``lbyl.load`` can rebuild it.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        InputError: a setting or input that can't be used, or weights that are not finite.
        TraceError: ``torch.export`` can't trace the model.
        VerificationError: the cut network does not compute what the masked one computes.

    Examples:
        >>> import torch, lbyl
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> result = lbyl.compress(net, torch.randn(1, 8), ratio=0.25)
        >>> result.model[0].weight.shape, net[0].weight.shape
        (torch.Size([12, 8]), torch.Size([16, 8]))
    """
    if budget is not None and ratio is not None:
        raise InputError("give a ratio or a budget, not both: a budget chooses each group's ratio")
    ratio = 0.5 if ratio is None else ratio
    check_ratio(ratio)
    scoring = resolve_criterion(criterion)
    order = Order(ratio, budget, scope, scoring, restore, seed, verify, strict, source, progress)
    clock = Clock()
    # Probing makes garbage that has to go; without it, all that is made is kept or freed at once.
    probing = restore == "auto" or isinstance(restore, LeastSquares)
    with nullcontext() if probing else uncollected():
        return walk(prepare(model, example_inputs, order, submodule, clock), order, clock)


def prepare(model: nn.Module, example_inputs: Inputs, order: Order, submodule: str | None, clock: Clock) -> Prepared:
    """Check and trace a model: the first step of `compress`, which explains arguments and errors."""
    check_module(model)
    inputs = ExampleInputs.of(example_inputs)
    if order.restore != "auto":
        resolve_restorer(order.restore)
    check_weights(model)
    with clock("trace"):
        return Prepared(model, inputs, _trace(model, inputs, order.strict, submodule))


def walk(prepared: Prepared, order: Order, clock: Clock, ground: Mapping[str, Groundwork] | None = None) -> Result:
    """The rest of the street: select, restore, cut and verify.

    ``ground`` holds what was found out before, by the path of the part ("" for a model that was traced whole);
    what is missing is found out here.
    """
    model, inputs, traced = prepared.model, prepared.inputs, prepared.traced
    ground = ground or {}
    if traced.graph is None:
        return _in_parts(model, inputs, order, traced, clock, ground)
    result, folds = _whole(traced.model, inputs, traced.graph, order, clock, ground.get("")), traced.folds
    if not folds:
        return result
    note = f"{len(folds)} layers that computed their weight on the fly ({folds[0].module}, ...) are plain layers now"
    return Result(
        result.model,
        replace(result.plan, folds=folds, architecture=architecture_of(model)),
        replace(
            result.report,
            notes=(note, *result.report.notes),
            parameters=(count_parameters(model), result.report.parameters[1]),
        ),
    )


def _whole(
    model: nn.Module, inputs: ExampleInputs, graph: Graph, order: Order, clock: Clock, ground: Groundwork | None
) -> Result:
    """Select, restore, cut and verify a model whose graph is known."""
    restorer, why = order.restorer(model)
    choosing = order.choose(restorer)
    fitted, ratio, planned = restorer, order.ratio, ()
    if order.budget is not None:
        ground = ground or lay_groundwork(model, inputs, graph, order, order.budget, clock)
        with clock("widths"):
            widths = _within(model, inputs, graph, ground, choosing, order, order.budget)
        fitted, ratio = ground.settle(restorer), widths.ratios(graph)
        planned = (*ground.cuttable.notes, *widths.notes)
    with clock("select"):
        selection = select(graph, tensors_of(model), ratio, order.scope, choosing, order.seed)
    check_selection(selection)
    if isinstance(restorer, LeastSquares) and order.verify and not order.strict and order.budget is None:
        # Restoration is dear here, so what can't be cut is found out before it.
        with clock("verify"):
            selection = that_can_be_cut(model, inputs, graph, selection, order.seed)
    for _ in range(3):
        with clock("restore"):
            if isinstance(fitted, LeastSquares):
                known = ground.readings if ground else None
                work = borrowing(model)
                restoration = fit(work, inputs, graph, selection, fitted, order.seed, order.progress, known)
            else:
                restoration = solve(selection, tensors_of(model), fitted, order.seed, order.progress, masked=False)
            work = borrowing(model, restoration.values)
        with clock("cut"):
            restored, assessment = restoration.groups, restoration.assessment
            norms = len(kept_channels(selection))
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
                if order.verify:
                    silent = silences(selection) if isinstance(restorer, Prune) else NOTHING
                    attribute = follower(work, graph)
                    found = check(work, smaller, inputs, selection, attribute, graph.macs, silent, order.strict)
                    verified, macs = found.difference, found.macs
                else:
                    verified, macs = None, _unverified_macs(work, smaller, inputs, graph.macs)
        except (VerificationError, SurgeryError):
            if order.strict or not order.verify:
                raise
            with clock("verify"):
                if isinstance(restorer, Prune):
                    work = lay_on(duplicate(work).eval(), silences(selection))
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
        **({"budget": described(order.budget)} if order.budget else {}),
        "scope": order.scope,
        "criterion": described(restorer if getattr(restorer, "chooses", False) else order.criterion),
        "restore": described(restorer),
        "seed": order.seed,
    }
    plan = Plan(
        groups=tuple(GroupPlan(c.group.name, c.group.width, c.keep) for c in selection.choices),
        cuts=cuts,
        settings=settings,
        architecture=architecture_of(model),
        source=order.source,
        inputs=inputs.describe(),
        library=library_version(),
        attributes=attributes,
    )
    return Result(smaller, plan, report)


def _within(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    ground: Groundwork,
    choose: Choose,
    order: Order,
    budget: Budget,
) -> Widths:
    """The widths that a budget comes to."""
    state, work = tensors_of(model), borrowing(model)

    def cut(ratios: Mapping[str, float]) -> nn.Module:
        part = select(graph, state, ratios, order.scope, choose, order.seed)
        return cut_copy(work, plan_cuts(part), plan_attributes(work, graph, part))

    return choose_widths(work, inputs, graph, ground.curves, budget, cut)


def _in_parts(
    model: nn.Module,
    inputs: ExampleInputs,
    order: Order,
    traced: Traced,
    clock: Clock,
    ground: Mapping[str, Groundwork],
) -> Result:
    """Compress submodules each by itself and put them into a copy of the model."""
    results: list[tuple[str, Result]] = []
    left = [(path, f"not traced: {why}") for path, why in traced.untraced]
    for part in traced.parts:
        own = replace(order, ratio=_ratio_within(order.ratio, part), source=None)
        try:
            module = model.get_submodule(part.path)
            done = _whole(module, part.inputs, part.graph, own, Clock(), ground.get(part.path))
            results.append((part.path, done))
        except (InputError, VerificationError) as error:
            if order.strict or len(traced.parts) == 1:
                raise
            left.append((part.path, str(error)))
    if not results:
        raise InputError("no group of any traceable submodule can be pruned: " + "; ".join(why for _, why in left[:3]))
    with clock("cut"):
        smaller = duplicate(model, {id(model.get_submodule(path)): result.model for path, result in results})
    with clock("verify"), undisturbed(model), undisturbed(smaller):
        macs = count_macs(model, inputs), count_macs(smaller, inputs)
    reports = [(path, result.report) for path, result in results]
    differences = [report.verified for _, report in reports if report.verified is not None]
    seconds = dict(clock.seconds)
    for _, report in reports:
        for stage, value in report.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + value
    report = Report(
        rows=tuple(replace(row, group=f"{path}.{row.group}") for path, report in reports for row in report.rows),
        left=(*((f"{path}.{name}", why) for path, report in reports for name, why in report.left), *left),
        barriers=tuple(f"{path}: {barrier}" for path, report in reports for barrier in report.barriers),
        parameters=(count_parameters(model), count_parameters(smaller)),
        macs=macs,
        verified=max(differences) if differences else None,
        seconds=seconds,
        notes=(
            *([traced.why] if traced.why else []),
            *(f"{path}: {note}" for path, report in reports for note in report.notes),
        ),
        assessment=results[0][1].report.assessment if len(results) == 1 else None,
    )
    plans = [(path, result.plan) for path, result in results]
    plan = Plan(
        groups=tuple(replace(g, name=f"{path}.{g.name}") for path, plan in plans for g in plan.groups),
        cuts=tuple(replace(c, parameter=f"{path}.{c.parameter}") for path, plan in plans for c in plan.cuts),
        settings={
            **plans[0][1].settings,
            "ratio": dict(order.ratio) if isinstance(order.ratio, Mapping) else order.ratio,
            "parts": [path for path, _ in plans],
        },
        architecture=architecture_of(model),
        source=order.source,
        inputs=inputs.describe(),
        library=library_version(),
        attributes=tuple(
            replace(a, module=f"{path}.{a.module}".rstrip(".")) for path, plan in plans for a in plan.attributes
        ),
    )
    return Result(smaller, plan, report)


def _ratio_within(ratio: Ratio, part: Part) -> Ratio:
    """The ratios of a part's groups, which patterns name by their full names."""
    if not isinstance(ratio, Mapping):
        return ratio
    full = {group.name: replace(group, name=f"{part.path}.{group.name}") for group in part.graph.groups}
    named = {
        name: replace(group, producers=tuple(replace(p, layer=f"{part.path}.{p.layer}") for p in group.producers))
        for name, group in full.items()
    }
    return {name: ratio_for(group, ratio) for name, group in named.items()}


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


def described(setting: Any) -> dict[str, Any]:
    """A settings object as plain data that travels into the plan."""
    fields = dataclasses.fields(setting) if dataclasses.is_dataclass(setting) else ()
    # What is not shown, such as the user's data, does not travel.
    values = {field.name: getattr(setting, field.name) for field in fields if field.repr}
    plain = {key: described(v) if dataclasses.is_dataclass(v) else v for key, v in values.items()}
    return {"name": type(setting).__name__, **plain}


def library_version() -> str:
    """The version of this library."""
    try:
        return version("lbyl")
    except PackageNotFoundError:
        return "unknown"


def check_module(model: object) -> None:
    """Raise InputError for what is no module."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InputError(f"model is {kind}; pass a torch.nn.Module with its weights loaded")


def check_weights(model: nn.Module) -> None:
    """Raise InputError for weights that nothing can be restored from."""
    for name, tensor in tensors_of(model).items():
        if tensor.is_meta:
            raise InputError(f"{name} is on the meta device, where it has no values; load the weights first")
        if (
            tensor.is_floating_point()
            and not math.isfinite(float(tensor.detach().sum()))
            and not bool(torch.isfinite(tensor.detach()).all())
        ):
            if name in dict(model.named_buffers()):
                continue  # attention masks hold -inf on purpose
            raise InputError(f"{name} holds NaN or infinity; lbyl can't restore from such weights")
