"""`compress`: from a model to a smaller one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

from torch import nn

from lbyl.budget.budget import Budget
from lbyl.errors import InputError
from lbyl.pipeline.evaluate import Evaluate, Judge
from lbyl.pipeline.prepare import plain_module, prepare
from lbyl.pipeline.quality import DEFAULT, evaluated, meet
from lbyl.pipeline.request import CompressionRequest, Restore, named_criterion, named_restorer
from lbyl.pipeline.result import Inputs, Result
from lbyl.runtime.contexts import alone, own_device, uncollected
from lbyl.runtime.copying import copy_model
from lbyl.runtime.progress import Clock, Progress
from lbyl.runtime.recursion import deep_calls
from lbyl.selection.criteria.base import Criterion, SeeingCriterion
from lbyl.selection.select import Ratio, check_ratio
from lbyl.surgery.plan import remember


@own_device()
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
    evaluate: Evaluate | None = None,
    forecast: bool = True,
) -> Result:
    """Drop channels physically and let the kept ones make up for them.

    Args:
        model: a trained network; it is not changed.
        example_inputs: what the model is called with: a tensor, a tuple, or a dict of keyword inputs.
        ratio: share of the channels that each prunable group loses; or ``{glob: share}`` over group and layer
            names, of which the last match counts and unmatched groups stay whole. A budget spends the same cut better.
        budget: what the smaller network may cost, or what it has to keep (``Budget(agreement=0.98)``), in place of a
            ratio; the groups' widths are then chosen such that the predicted error is least. Where neither is given:
            ``Budget(agreement=0.95)``.
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
        evaluate: called with a copy of the network and with each smaller one that is made, all in evaluation mode;
            returns a number, the larger the better. The report shows what it said before and after.
        forecast: foretell what is kept at real inputs (``report.forecast``); False saves the time.

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
    if budget is None and ratio is None:
        budget = DEFAULT
    ratio = 0.5 if ratio is None else ratio
    check_ratio(ratio)
    judge = Judge(evaluate)
    scoring, restorer = named_criterion(criterion), named_restorer(restore)
    request = CompressionRequest(
        ratio, budget, scope, scoring, restorer, seed, verify, strict, source, progress, forecast
    )
    clock = Clock()
    # Probing makes garbage that has to go; without it, all that is made is kept or freed at once.
    probing = restorer is None or restorer.runs_network
    inner = plain_module(model)
    with deep_calls(inner), alone(inner), nullcontext() if probing else uncollected():
        before = judge(copy_model(inner), "the unpruned network")
        prepared = prepare(inner, example_inputs, request, submodule, clock)
        result = meet(prepared, request, clock, judge=judge, before=before)
        result = evaluated(result, judge, before)
    if inner is not model:
        note = f"the network was taken out of its {type(model).__name__}"
        result = replace(result, report=replace(result.report, notes=(note, *result.report.notes)))
    remember(result.model, result.plan, result.report)
    return result
