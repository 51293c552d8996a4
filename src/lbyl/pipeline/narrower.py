"""Cuts channels for what is left of a budget, after blocks or experts were dropped from a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from lbyl.budget.budget import Budget
from lbyl.errors import BudgetError
from lbyl.io.report.report import Report
from lbyl.moments import Probes
from lbyl.moments.attached_norms import measure_statistics
from lbyl.pipeline.analysis import Analysis, NoCache, analyze
from lbyl.pipeline.ground import Ground
from lbyl.pipeline.prepare import Prepared, first_that_restores, prepare
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.pipeline.walk import walk
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.macs import count_macs, count_parameters
from lbyl.runtime.progress import Clock
from lbyl.runtime.settings import described
from lbyl.surgery.plan import remembered


@dataclass(frozen=True)
class GivenProbes(NoCache):
    """A cache that only holds probes, which were made on the whole network."""

    given: Probes

    def probes(self, make: Callable[[], Probes]) -> Probes:
        """The probes."""
        return self.given


def rest_of(ground: Ground, model: nn.Module) -> Budget:
    """The budget for the channels of a network that has lost blocks or experts already."""
    name, amount = ground.budget.limited
    rest = replace(ground.budget, depth=False, experts=False)
    if name == "size_mb":
        return rest
    share = min(1.0, amount * ground.whole / ground.count(model))
    return replace(rest, **{name: share})  # pyright: ignore[reportArgumentType]


def narrower(ground: Ground, first: Result | None, clock: Clock) -> Result:
    """A result with fewer channels, for what is left of the budget.

    Args:
        ground: what is known of the whole network.
        first: the network that has lost blocks or experts, and remembers it; None if nothing was lost.
        clock: measures the time.

    Raises:
        BudgetError: the budget can't be met.
    """
    model = first.model if first else ground.model
    request = replace(ground.request, budget=rest_of(ground, model), forecast=False)
    if first is None:
        prepared = replace(ground.prepared, forecaster=None)
    else:
        prepared = prepare(model, ground.prepared.inputs, request, None, clock)
    try:
        result = walk(prepared, request, clock, _analyses(ground, prepared, request, clock))
    except BudgetError as error:
        if first is None:
            raise
        reached = None if error.reached is None else error.reached * ground.count(model) / ground.whole
        raise BudgetError(f"{error} (shares are of the network that has lost blocks or experts)", reached) from None
    report = joined(ground, first.report, result) if first else result.report
    settings = {name: value for name, value in result.plan.settings.items() if name != "after"}
    before = remembered(ground.model)
    earlier = {"after": dict(before.settings)} if before else {}
    plan = replace(result.plan, settings={**settings, "budget": described(ground.budget), **earlier})
    return Result(result.model, plan, report)


def _analyses(ground: Ground, prepared: Prepared, request: CompressionRequest, clock: Clock) -> dict[str, Analysis]:
    """The analysis of the network with the probes of the whole one; {} if only its parts could be traced."""
    if prepared.traced.graph is None or not prepared.subjects[0].restorer.takes_probes:
        return {}
    (subject,) = prepared.subjects
    probes = ground.probes
    if probes.statistics and subject.model is not ground.prepared.subjects[0].model:
        with undisturbed(subject.model):
            statistics = measure_statistics(subject.model, probes.batches, probes.batch_statistics)
            probes = replace(probes, statistics=statistics)
    given = GivenProbes(probes)

    def make(attempt: object) -> Analysis:
        return analyze(attempt, request, request.budget, clock, given)  # pyright: ignore[reportArgumentType]

    return {"": first_that_restores(subject, request, make)[1]}


def joined(ground: Ground, first: Report, then: Result) -> Report:
    """The report of two steps together, from the whole network on."""
    second, again = then.report, "the network was compressed before"
    with undisturbed(then.model):
        macs = count_macs(then.model, ground.prepared.inputs)
    worst = [each for each in (first.verified, second.verified) if each is not None]
    other = (again, "latency:")  # of the network that the second step began with
    notes = (note for note in second.notes if not note.startswith(other) and note not in first.notes)
    return replace(
        second,
        rows=(*first.rows, *second.rows),
        left=tuple(dict((*first.left, *second.left)).items()),
        parameters=(first.parameters[0], count_parameters(then.model)),
        macs=None if first.macs is None else (first.macs[0], macs),
        verified=max(worst) if worst else None,
        notes=(*first.notes, *notes),
        assessment=None,
        held_out_errors={},
        blocks=(*first.blocks, *second.blocks),
    )
