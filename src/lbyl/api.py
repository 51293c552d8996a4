"""The verbs: `compress` walks the street from graph to result, `inspect` stops after the first house."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lbyl import artifact
from lbyl.criteria import Criterion, resolve_criterion
from lbyl.errors import InputError
from lbyl.fitting import fit
from lbyl.graph import Graph, trace
from lbyl.inputs import ExampleInputs
from lbyl.measure import count_macs, count_parameters
from lbyl.moments import Progress
from lbyl.plan import GroupPlan, Plan, architecture_of
from lbyl.report import Report, Row
from lbyl.restoration import Restored
from lbyl.restoration import restore as solve
from lbyl.restorers import LeastSquares, Restorer, choose_restorer, resolve_restorer
from lbyl.selection import Choose, Ratio, Selection, by_criterion, check_ratio, select
from lbyl.surgery import cut_copy, plan_cuts, tensors_of, write
from lbyl.verification import verify as check

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
        """Write ``model.safetensors`` and ``lbyl.json`` into a new folder, whole or not at all.

        Raises:
            InputError: the path exists or can't be written.
        """
        return artifact.save(path, self.model, self.plan, self.report)


@dataclass(frozen=True)
class Inspection:
    """The channel groups of a model; print it with Rich, or read ``graph``."""

    graph: Graph

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
                    "prunable": group.prunable,
                    "reason": group.reason,
                }
                for group in self.graph.groups
            ],
            "barriers": list(self.graph.barriers),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=box.SIMPLE_HEAD, title="Channel groups", title_justify="left")
        for name in ("group", "width", "also made by", "read by", "prunable"):
            table.add_column(name, justify="right" if name == "width" else "left")
        for row in self.to_dict()["groups"]:
            if row["reason"]:
                verdict = f"no: {row['reason']}"
            else:
                verdict = "scope=all (a residual sum couples it)" if row["coupled"] else "yes"
            others, readers = row["producers"][1:], row["consumers"]
            table.add_row(*map(Text, (row["name"], str(row["width"]), _few(others), _few(readers), verdict)))
        yield table
        for barrier in self.graph.barriers:
            yield Text(f"barrier: {barrier}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def inspect(model: nn.Module, example_inputs: Inputs) -> Inspection:
    """Find the channel groups of a model: names, widths, producers, consumers, prunable or why not.

    Args:
        model: the network; it is not changed.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Raises:
        InputError: inputs that are none of these.
        TraceError: ``torch.export`` can't trace the model on them.
    """
    with _evaluating(model):
        return Inspection(trace(model, ExampleInputs.of(example_inputs)))


def compress(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    ratio: Ratio = 0.5,
    scope: str = "inner",
    criterion: str | Criterion = "l2",
    restore: str | Restorer | LeastSquares = "auto",
    seed: int = 0,
    verify: bool = True,
    source: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Drop channels physically and let the kept ones make up for them.

    Args:
        model: a trained network; it is not changed.
        example_inputs: what the model is called with: a tensor, a tuple, or a dict of keyword inputs.
        ratio: share of the channels that each prunable group loses; or ``{glob: share}`` over group and layer
            names, of which the last match counts and unmatched groups stay whole.
        scope: "inner" prunes groups that no residual sum couples, "all" every prunable one.
        criterion: "l1", "l2", "gm", "random", or an object with ``score(filters, generator)``.
        restore: a restorer or its lower-case name ("lbyl", "prune", "merge", "coreset"); "auto" takes the best
            that needs no data, and the report says which and why.
        seed: for whatever is drawn at random; equal seeds give equal results.
        verify: compare the cut network with the masked one in float64 (switch it off for huge models).
        source: where the model comes from, kept in the plan so that ``lbyl.load`` can rebuild it.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        InputError: a setting or input that can't be used, or weights that are not finite.
        TraceError: ``torch.export`` can't trace the model.
        VerificationError: the cut network does not compute what the masked one computes.

    Example:
        >>> import torch, lbyl
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> result = lbyl.compress(net, torch.randn(1, 8), ratio=0.25)
        >>> result.model[0].weight.shape, net[0].weight.shape
        (torch.Size([12, 8]), torch.Size([16, 8]))
    """
    inputs = ExampleInputs.of(example_inputs)
    check_ratio(ratio)
    scoring = resolve_criterion(criterion)
    restorer, why = choose_restorer(model) if restore == "auto" else (resolve_restorer(restore), "")
    _check_weights(model)
    clock = _Clock()

    with clock("trace"), _evaluating(model):
        graph = trace(model, inputs)
    with clock("select"):
        choose = getattr(restorer, "choose", None) if getattr(restorer, "chooses", False) else None
        selection = select(graph, tensors_of(model), ratio, scope, cast(Choose, choose) or by_criterion(scoring), seed)
    if not selection.choices:
        reasons = "; ".join(f"{name}: {why}" for name, why in selection.left[:3])
        raise InputError(f"no group can be pruned with these settings ({reasons or 'the model has no layer to cut'})")
    with clock("restore"):
        if isinstance(restorer, LeastSquares):
            work = _copy(model).eval()
            restoration = fit(work, inputs, graph, selection, restorer, seed, progress)
        else:
            # The user's own weights are only read, so that no copy of them is held meanwhile.
            restoration = solve(selection, tensors_of(model), restorer, seed, progress)
            work = _copy(model).eval()
    with clock("cut"):
        before = count_parameters(work), count_macs(work, inputs)
        write(work, restoration.values)
        restored, assessment = restoration.groups, restoration.assessment
        notes = tuple(note for note in (why, *restoration.notes) if note)
        seconds = dict(restoration.seconds)
        del restoration
        smaller = cut_copy(work, plan_cuts(selection))
    with clock("verify"):
        verified = check(work, smaller, inputs, selection).difference if verify else None
        after = count_parameters(smaller), count_macs(smaller, inputs)

    for name, module in model.named_modules():
        smaller.get_submodule(name).training = module.training
    report = Report(
        rows=tuple(_row(choice.group.width, len(choice.keep), r) for choice, r in _pairs(selection, restored)),
        left=selection.left,
        barriers=graph.barriers,
        parameters=(before[0], after[0]),
        macs=(before[1], after[1]),
        verified=verified,
        seconds={**{k: v for k, v in clock.seconds.items() if k != "restore" or not seconds}, **seconds},
        notes=notes,
        assessment=assessment,
    )
    settings = {
        "ratio": dict(ratio) if isinstance(ratio, Mapping) else ratio,
        "scope": scope,
        "criterion": _describe(restorer if choose else scoring),
        "restore": _describe(restorer),
        "seed": seed,
    }
    plan = Plan(
        groups=tuple(GroupPlan(c.group.name, c.group.width, c.keep) for c in selection.choices),
        cuts=plan_cuts(selection),
        settings=settings,
        architecture=architecture_of(model),
        source=source,
        inputs=inputs.describe(),
        library=_version(),
    )
    return Result(smaller, plan, report)


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


def _describe(setting: Any) -> dict[str, Any]:
    """A settings object as plain data that travels into the plan."""
    fields = dataclasses.fields(setting) if dataclasses.is_dataclass(setting) else ()
    # What is not shown, such as the user's data, does not travel.
    values = {field.name: getattr(setting, field.name) for field in fields if field.repr}
    plain = {key: _describe(v) if dataclasses.is_dataclass(v) else v for key, v in values.items()}
    return {"name": type(setting).__name__, **plain}


def _version() -> str:
    try:
        return version("lbyl")
    except PackageNotFoundError:
        return "unknown"


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise InputError(f"{type(model).__name__} can't be copied ({error}); lbyl only works on a copy") from error


def _check_weights(model: nn.Module) -> None:
    for name, tensor in tensors_of(model).items():
        if (
            tensor.is_floating_point()
            and not math.isfinite(float(tensor.detach().sum()))
            and not bool(torch.isfinite(tensor.detach()).all())
        ):
            if name in dict(model.named_buffers()):
                continue  # attention masks hold -inf on purpose
            raise InputError(f"{name} holds NaN or infinity; lbyl can't restore from such weights")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, module by module as it was before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@dataclass
class _Clock:
    """Wall-clock seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
