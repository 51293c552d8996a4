"""Compresses the traceable parts of a model that can't be traced as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from lbyl.errors import InputError, VerificationError
from lbyl.io.report.report import Report
from lbyl.pipeline.analysis import Analysis
from lbyl.pipeline.prepare import Prepared
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.pipeline.single import compress_whole
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import copy_model
from lbyl.runtime.macs import count_macs, count_parameters
from lbyl.runtime.progress import Clock
from lbyl.runtime.version import library_version
from lbyl.selection.select import check_patterns
from lbyl.surgery.plan import Plan, architecture_of

_Item = TypeVar("_Item")


def compress_submodules(
    prepared: Prepared, request: CompressionRequest, clock: Clock, ground: Mapping[str, Analysis]
) -> Result:
    """Compress submodules separately and put them into a copy of the model."""
    model, inputs, traced = prepared.model, prepared.inputs, prepared.traced
    results, left = _one_by_one(prepared, replace(request, source=None), ground)
    with clock("cut"):
        smaller = copy_model(model, {id(model.get_submodule(path)): result.model for path, result in results})
    with clock("verify"), undisturbed(model), undisturbed(smaller):
        macs = count_macs(model, inputs), count_macs(smaller, inputs)
    forecast = None
    if prepared.forecaster:
        with clock("forecast"):
            forecast = prepared.forecaster(smaller)
    reports = [result.report.prefixed(path) for path, result in results]
    plans = [result.plan.prefixed(path) for path, result in results]
    seconds = Counter(clock.seconds)
    for each in reports:
        seconds.update(each.seconds)
    report = Report(
        rows=_all(report.rows for report in reports),
        left=(*_all(report.left for report in reports), *left),
        barriers=_all(report.barriers for report in reports),
        parameters=(count_parameters(model), count_parameters(smaller)),
        macs=macs,
        verified=max((report.verified for report in reports if report.verified is not None), default=None),
        seconds=dict(seconds),
        notes=(*([traced.why] if traced.why else []), *_all(report.notes for report in reports)),
        assessment=reports[0].assessment if len(reports) == 1 else None,
        held_out_errors=reports[0].held_out_errors if len(reports) == 1 else {},
        forecast=forecast,
    )
    plan = Plan(
        groups=_all(plan.groups for plan in plans),
        cuts=_all(plan.cuts for plan in plans),
        settings={
            **plans[0].settings,
            "ratio": dict(request.ratio) if isinstance(request.ratio, Mapping) else request.ratio,
            "parts": [path for path, _ in results],
        },
        architecture=architecture_of(model),
        source=request.source,
        inputs=inputs.describe(),
        library=library_version(),
        attributes=_all(plan.attributes for plan in plans),
        folds=_all(plan.folds for plan in plans),
        network=type(model).__name__,
    )
    return Result(smaller, plan, report)


def _all(items: Iterable[Sequence[_Item]]) -> tuple[_Item, ...]:
    return tuple(chain.from_iterable(items))


def _one_by_one(
    prepared: Prepared, request: CompressionRequest, ground: Mapping[str, Analysis]
) -> tuple[list[tuple[str, Result]], list[tuple[str, str]]]:
    """The results of submodules by path, and for the other submodules the reasons why they are not pruned.

    Raises:
        InputError: no submodule can be pruned, or a pattern matches no group of any submodule.
    """
    subjects = prepared.subjects
    if request.budget is None:
        groups = [(f"{subject.path}.", group) for subject in subjects for group in subject.graph.groups]
        check_patterns(request.ratio, (path + name for path, group in groups for name in (group.name, *group.layers)))
    results: list[tuple[str, Result]] = []
    left = [(path, f"not traced: {why}") for path, why in prepared.traced.untraced]
    failed: list[str] = []
    for subject in subjects:
        known = ground.get(subject.path)
        try:
            results.append((subject.path, compress_whole(subject, request, Clock(), known)))
        except (InputError, VerificationError) as error:
            if request.strict or len(subjects) == 1:
                raise
            left.append((subject.path, str(error)))
            failed.append(f"{subject.path}: {error}")
    if not results:
        whys = dict.fromkeys([*failed, *(f"{path}: {why}" for path, why in left)])
        raise InputError("no group of any traceable submodule can be pruned: " + "; ".join([*whys][:3]))
    return results, left
