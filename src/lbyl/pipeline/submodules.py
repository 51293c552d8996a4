"""Compress the parts of a model that could not be traced whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

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
from lbyl.selection.select import check_patterns
from lbyl.surgery.plan import Plan, architecture_of, library_version


def compress_submodules(
    prepared: Prepared, request: CompressionRequest, clock: Clock, ground: Mapping[str, Analysis]
) -> Result:
    """Compress submodules each by itself and put them into a copy of the model."""
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
        held_out_errors=results[0][1].report.held_out_errors if len(results) == 1 else {},
        forecast=forecast,
    )
    plans = [(path, result.plan) for path, result in results]
    plan = Plan(
        groups=tuple(replace(g, name=f"{path}.{g.name}") for path, plan in plans for g in plan.groups),
        cuts=tuple(replace(c, parameter=f"{path}.{c.parameter}") for path, plan in plans for c in plan.cuts),
        settings={
            **plans[0][1].settings,
            "ratio": dict(request.ratio) if isinstance(request.ratio, Mapping) else request.ratio,
            "parts": [path for path, _ in plans],
        },
        architecture=architecture_of(model),
        source=request.source,
        inputs=inputs.describe(),
        library=library_version(),
        attributes=tuple(
            replace(a, module=f"{path}.{a.module}".rstrip(".")) for path, plan in plans for a in plan.attributes
        ),
    )
    return Result(smaller, plan, report)


def _one_by_one(
    prepared: Prepared, request: CompressionRequest, ground: Mapping[str, Analysis]
) -> tuple[list[tuple[str, Result]], list[tuple[str, str]]]:
    """What came of each submodule, by its path, and why others were left.

    Raises:
        InputError: nothing can be pruned in any of them, or a pattern matches no group of any.
    """
    subjects = prepared.subjects
    if request.budget is None:
        groups = [(f"{subject.path}.", group) for subject in subjects for group in subject.graph.groups]
        check_patterns(request.ratio, (path + name for path, group in groups for name in (group.name, *group.layers)))
    results: list[tuple[str, Result]] = []
    left = [(path, f"not traced: {why}") for path, why in prepared.traced.untraced]
    for subject in subjects:
        known = ground.get(subject.path)
        try:
            results.append((subject.path, compress_whole(subject, request, Clock(), known)))
        except (InputError, VerificationError) as error:
            if request.strict or len(subjects) == 1:
                raise
            left.append((subject.path, str(error)))
    if not results:
        raise InputError("no group of any traceable submodule can be pruned: " + "; ".join(why for _, why in left[:3]))
    return results, left
