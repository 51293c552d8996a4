"""The steps after preparation: select, restore, cut and verify, for a whole model or its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lbyl.io.huggingface import follow_widths
from lbyl.pipeline.analysis import Analysis
from lbyl.pipeline.prepare import Prepared
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.pipeline.single import compress_whole
from lbyl.pipeline.submodules import compress_submodules
from lbyl.runtime.macs import count_parameters
from lbyl.runtime.progress import Clock
from lbyl.surgery.attributes import changed_groups
from lbyl.surgery.plan import Plan, architecture_of, remember, remembered


def walk(
    prepared: Prepared, request: CompressionRequest, clock: Clock, ground: Mapping[str, Analysis] | None = None
) -> Result:
    """Select, restore, cut and verify.

    ``ground`` holds analyses that were made before, by the path of the part ("" for a model that was traced as a
    whole). Missing ones are made here.
    """
    result, first = _walked(prepared, request, clock, ground or {}), remembered(prepared.model)
    if told := follow_widths(result.model, architecture_of(prepared.model)):
        result = replace(result, report=replace(result.report, notes=(*result.report.notes, told)))
    result = from_the_start(result, prepared.model, first)
    remember(result.model, result.plan, result.report)
    return result


def from_the_start(result: Result, before: nn.Module, first: Plan | None) -> Result:
    """The result with a plan that starts from the unpruned network, where that of an earlier compression is known.

    Args:
        result: the outcome of a compression.
        before: the network that was compressed.
        first: the plan that it was cut by.
    """
    if first is None:
        return result
    both = result.plan.after(first, changed_groups(before, result.model))
    told = "the network was compressed before; the plan starts from its unpruned architecture"
    told += "; the weights contain the training in between" * first.trained
    if both is None:
        told = "the network was compressed before, and this plan starts from that result: load it into that network"
    report = replace(result.report, notes=(*result.report.notes, told))
    return replace(result, plan=both or result.plan, report=report)


def _walked(prepared: Prepared, request: CompressionRequest, clock: Clock, ground: Mapping[str, Analysis]) -> Result:
    model, folds = prepared.model, prepared.traced.folds
    if prepared.traced.graph is None:
        return compress_submodules(prepared, request, clock, ground)
    result = compress_whole(prepared.subjects[0], request, clock, ground.get(""), prepared.forecaster)
    if not folds:
        return result
    note = f"{folds[0].module!r}, which computed its weight on the fly, is a plain layer now"
    if len(folds) > 1:
        note = (
            f"{len(folds)} layers that computed their weight on the fly ({folds[0].module}, ...) are plain layers now"
        )
    return Result(
        result.model,
        replace(result.plan, folds=folds, architecture=architecture_of(model)),
        replace(
            result.report,
            notes=(note, *result.report.notes),
            parameters=(count_parameters(model), result.report.parameters[1]),
        ),
    )
