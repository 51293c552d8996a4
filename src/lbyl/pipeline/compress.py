"""`compress`: from a model to a smaller one."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace

from torch import nn

from lbyl.budget.budget import Budget
from lbyl.errors import InputError
from lbyl.pipeline.evaluate import Evaluate, Judge
from lbyl.pipeline.experts import compress_with_experts
from lbyl.pipeline.heads import compress_heads
from lbyl.pipeline.kept import kept_analysis
from lbyl.pipeline.prepare import plain_module, prepare
from lbyl.pipeline.quality import DEFAULT, evaluated, meet
from lbyl.pipeline.request import CompressionRequest, Restore, named_criterion, named_restorer
from lbyl.pipeline.result import Inputs, Result
from lbyl.pipeline.together import compress_together
from lbyl.runtime.contexts import alone, own_settings, uncollected
from lbyl.runtime.progress import Clock, Progress, cancelable
from lbyl.runtime.recursion import deep_calls
from lbyl.selection.criteria.base import Criterion, SeeingCriterion
from lbyl.selection.select import Ratio, checked_ratio
from lbyl.surgery.plan import remember


@cancelable
@own_settings()
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
    effort: str = "default",
    analysis: str | os.PathLike[str] | None = None,
) -> Result:
    """Remove channels from a network, and restore it by the kept ones.

    Args:
        model: a trained network; it is not changed.
        example_inputs: the model's inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        ratio: share of the channels that each prunable group loses; or ``{glob: share}`` over group and layer
            names, where the last match counts and unmatched groups are not pruned. For the same cost, a budget gives a
            smaller error.
        budget: in place of a ratio, a cost that the smaller network may have, or a quality that it must keep
            (``Budget(agreement=0.98)``). The groups' widths are then chosen such that the predicted error is least. If
            neither is given: ``Budget(agreement=0.95, best_effort=True)``.
        scope: "inner" prunes groups outside of residual connections and layer norms, and "all" prunes every prunable
            group. A layer norm over pruned channels then takes its statistics over the kept ones.
        criterion: how channels are scored: "l1", "l2", "gm" (by filters), "energy", "obs" (by activations on probes),
            "random", or an object with a ``score`` method. "auto" chooses OBS where the network sees inputs like real
            ones or has layer, group or instance norms, energy for texts, and L2 elsewhere; the report says which.
        restore: a restorer or its short name ("lbyl", "prune", "merge", "coreset"); "auto" chooses the best one that
            needs no data, and the report says which and why.
        seed: seed of all random numbers; equal seeds give equal results.
        verify: whether to compare the cut network with the masked one, in float64 if the network runs in it. It can be
            switched off for huge models.
        strict: whether to raise an error if the model can't be traced as a whole, branches on values that it computes,
            or has a group that turns out not to be cuttable. Otherwise only traceable parts are compressed, only the
            branches that the example inputs take are traced, or the group is not pruned, and the report says so.
        submodule: compress only the submodule of this name ("backbone"), with the inputs that the model gives it.
        source: the source of the model, stored in the plan so that ``lbyl.load`` can rebuild it.
        progress: called as ``progress(stage, done, total)``.
        evaluate: called with a copy of the network and with each smaller network, all in evaluation mode; returns a
            number that is larger for better networks. The report shows it before and after.
        forecast: whether to forecast the agreement on real inputs (``report.forecast``), which takes time.
        effort: how much time ``restore="auto"`` may take: "low" takes few probes, dreams nothing, and solves all
            consumers at once; "high" makes more probes and steps of dreaming than "default".
        analysis: a folder that keeps what does not depend on the size: probes, error curves and moments. If it holds
            those of this network and these settings, they are used, and the network is cut to another size in a part
            of the time.

    Raises:
        InputError: a setting or an input can't be used, or weights are not finite.
        ArtifactError: a file of the analysis is damaged.
        TraceError: ``torch.export`` can't trace the model.
        BudgetError: no widths come near enough to the budget.
        RestorationError: the restorer fails on this network.
        SurgeryError: a cut does not fit the network, as after a rule that names another parameter.
        VerificationError: the cut network does not compute what the masked one computes.

    Examples:
        >>> import torch, lbyl
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> result = lbyl.compress(net, torch.randn(1, 8), ratio=0.25)
        >>> result.model[0].weight.shape, net[0].weight.shape
        (torch.Size([12, 8]), torch.Size([16, 8]))
    """
    if budget is not None and ratio is not None:
        raise InputError("give a ratio or a budget, but not both: a budget chooses each group's ratio")
    if budget is None and ratio is None:
        budget = DEFAULT
    ratio = 0.5 if ratio is None else ratio
    ratio = checked_ratio(ratio)
    judge = Judge(evaluate)
    scoring, restorer = named_criterion(criterion), named_restorer(restore)
    request = CompressionRequest(
        ratio, budget, scope, scoring, restorer, seed, verify, strict, source, progress, forecast, effort
    )
    _check_whole(budget, submodule, analysis)
    clock = Clock()
    # Garbage collection is only needed while probes run.
    probing = restorer is None or restorer.runs_network
    inner = plain_module(model)
    with deep_calls(inner), alone(inner), nullcontext() if probing else uncollected():
        before = judge(inner, "the unpruned network")
        if analysis is not None:
            with kept_analysis(inner, example_inputs, request, submodule, analysis, clock) as (prepared, ground):
                result = meet(prepared, request, clock, ground, judge=judge, before=before)
        else:
            prepared = prepare(inner, example_inputs, request, submodule, clock)
            if budget is not None and budget.beyond_width:
                result = _BEYOND_WIDTH[budget.beyond_width](prepared, request, clock)
            else:
                result = meet(prepared, request, clock, judge=judge, before=before)
        result = evaluated(result, judge, before)
    if inner is not model:
        note = f"the network was taken out of its {type(model).__name__}"
        result = replace(result, report=replace(result.report, notes=(note, *result.report.notes)))
    remember(result.model, result.plan, result.report)
    return result


def _check_whole(budget: Budget | None, submodule: str | None, analysis: str | os.PathLike[str] | None) -> None:
    """Raise InputError for arguments that do not go with dropping whole blocks or experts."""
    if budget is None or not (name := budget.beyond_width):
        return
    what = {"depth": "blocks", "experts": "experts", "head_dim": "the inside of heads"}[name]
    if submodule is not None:
        raise InputError(f"submodule and {name}: {what} can be cut in whole networks; give only one of them")
    if analysis is not None:
        raise InputError(f"analysis and {name}: what is known about {what} is not kept; leave out analysis")


_BEYOND_WIDTH = {"depth": compress_together, "experts": compress_with_experts, "head_dim": compress_heads}
