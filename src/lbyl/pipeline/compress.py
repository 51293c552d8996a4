"""`compress`: from a model to a smaller one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

from torch import nn

from lbyl.budget.budget import Budget
from lbyl.errors import InputError
from lbyl.pipeline.analysis import Analysis
from lbyl.pipeline.prepare import Prepared, plain_module, prepare
from lbyl.pipeline.request import CompressionRequest, Restore, named_criterion, named_restorer
from lbyl.pipeline.result import Inputs, Result
from lbyl.pipeline.single import compress_whole
from lbyl.pipeline.submodules import compress_submodules
from lbyl.runtime.contexts import alone, uncollected
from lbyl.runtime.macs import count_parameters
from lbyl.runtime.progress import Clock, Progress
from lbyl.runtime.recursion import deep_calls
from lbyl.selection.criteria.base import Criterion, SeeingCriterion
from lbyl.selection.select import Ratio, check_ratio
from lbyl.surgery.plan import architecture_of, remember, remembered


def compress(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    ratio: Ratio | None = None,
    budget: Budget | None = None,
    scope: str = "inner",
    criterion: str | Criterion | SeeingCriterion = "auto",
    restore: Restore = "auto",
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
        criterion: how channels are scored: "l1", "l2", "gm" (of filters), "energy", "obs" (of what passes through them
            on probes), "random", or an object with a ``score``. "auto" takes "l2" where there are batch norms or the
            network is not run on probes, else "energy".
        restore: a restorer or its lower-case name ("lbyl", "prune", "merge", "coreset"); "auto" takes the best
            that needs no data, and the report says which and why.
        seed: for whatever is drawn at random; equal seeds give equal results.
        verify: compare the cut network with the masked one, in float64 where it runs in that (switch it off for huge
            models).
        strict: raise where the model can't be traced whole, branches on what it computes, or has a group that turns
            out not to be cuttable. Without it such a model is compressed in the parts that can be traced, or along the
            way that it takes on the example inputs, such a group stays whole, and the report says so.
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
    scoring, restorer = named_criterion(criterion), named_restorer(restore)
    request = CompressionRequest(ratio, budget, scope, scoring, restorer, seed, verify, strict, source, progress)
    clock = Clock()
    # Probing makes garbage that has to go; without it, all that is made is kept or freed at once.
    probing = restorer is None or restorer.runs_network
    inner = plain_module(model)
    with deep_calls(inner), alone(inner), nullcontext() if probing else uncollected():
        result = walk(prepare(inner, example_inputs, request, submodule, clock), request, clock)
    if inner is model:
        return result
    note = f"the network was taken out of its {type(model).__name__}"
    return replace(result, report=replace(result.report, notes=(note, *result.report.notes)))


def walk(
    prepared: Prepared, request: CompressionRequest, clock: Clock, ground: Mapping[str, Analysis] | None = None
) -> Result:
    """The rest of the street: select, restore, cut and verify.

    ``ground`` holds what was found out before, by the path of the part ("" for a model that was traced whole);
    what is missing is found out here.
    """
    result, first = _walked(prepared, request, clock, ground or {}), remembered(prepared.model)
    if first is not None:
        both = result.plan.after(first)
        told = "the network was compressed before; the plan leads from its unpruned instance to this one"
        if both is None:
            told = "the network was compressed before, and this plan starts from what came of that: load it into that"
        result = replace(
            result, plan=both or result.plan, report=replace(result.report, notes=(*result.report.notes, told))
        )
    remember(result.model, result.plan)
    return result


def _walked(prepared: Prepared, request: CompressionRequest, clock: Clock, ground: Mapping[str, Analysis]) -> Result:
    model, folds = prepared.model, prepared.traced.folds
    if prepared.traced.graph is None:
        return compress_submodules(prepared, request, clock, ground)
    result = compress_whole(prepared.subjects[0], request, clock, ground.get(""), prepared.forecaster)
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
