"""Depth and width together: drops blocks, cuts channels for the rest of a budget, and keeps what is best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from lbyl.budget.budget import Budget
from lbyl.errors import LbylError
from lbyl.io.report.report import Report
from lbyl.moments import Probes
from lbyl.moments.attached_norms import measure_statistics
from lbyl.pipeline.analysis import Analysis, NoCache, analyze
from lbyl.pipeline.depth.drop import Shallower, depth_plan, depth_report, dropped_rows, shallower
from lbyl.pipeline.depth.ground import DepthGround, ground_for_depth
from lbyl.pipeline.ground import after_earlier
from lbyl.pipeline.prepare import Prepared, first_that_restores, prepare
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.pipeline.walk import walk
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.macs import count_macs, count_parameters
from lbyl.runtime.progress import Clock
from lbyl.runtime.settings import described
from lbyl.selection.blocks import Chosen
from lbyl.surgery.plan import remember, remembered


@dataclass(frozen=True)
class GivenProbes(NoCache):
    """A cache that only holds probes, which were made on the whole network."""

    given: Probes

    def probes(self, make: Callable[[], Probes]) -> Probes:
        """The probes."""
        return self.given


@dataclass(frozen=True)
class Attempt:
    """A network that meets the budget.

    Attributes:
        blocks: the number of dropped blocks.
        cut: whether channels were cut as well.
        result: the network, with plan and report.
        effect: the effect on held-out probes.
        run: whether the blocks were chosen as one run.
    """

    blocks: int
    cut: bool
    result: Result
    effect: float
    run: bool = False

    @property
    def told(self) -> str:
        """The attempt and its effect in words."""
        blocks = f"{'a run of ' * self.run}{self.blocks} block" + "s" * (self.blocks != 1)
        return f"{self.effect:.3g} without {blocks}" + " and with narrower layers" * self.cut


def compress_with_depth(prepared: Prepared, request: CompressionRequest, clock: Clock) -> Result:
    """Meet a budget by dropping blocks, by cutting channels, or by both, whichever changes the outputs least.

    Blocks are chosen until they meet the budget alone, one by one and as one run. Then the run is dropped, all of the
    single ones, half of them, and none; channels are cut for what is left of the budget.

    Raises:
        InputError: there is no block that can be dropped.
        LbylError: no attempt succeeds; the error of the first one.
    """
    ground = ground_for_depth(prepared, request, clock)
    with clock("choose blocks"):
        chosen, run = ground.choose()
    attempts: list[Attempt] = []
    refused: list[tuple[int, LbylError]] = []
    counts = sorted({0, len(chosen.blocks) // 2, len(chosen.blocks)}, reverse=True)
    ways = [chosen.first(count) for count in counts]
    if run.blocks and {*run.blocks} != {*chosen.blocks}:
        ways.append(run)
    for way in ways:
        count, made = len(way.blocks), _tried(ground, way, clock)
        if isinstance(made, Attempt):
            attempts.append(replace(made, run=way is run))
        else:
            refused.append((count, made))
    if not attempts:
        raise refused[0][1]
    best = min(attempts, key=lambda attempt: attempt.effect)
    return ground.finished(best.result, _told(ground, attempts, refused))


def _told(ground: DepthGround, attempts: list[Attempt], refused: list[tuple[int, LbylError]]) -> list[str]:
    if len(attempts) + len(refused) < 2:
        return []
    effect = ground.effect
    ways = ", ".join(each.told for each in sorted(attempts, key=lambda each: each.effect))
    notes = [f"depth against width: {effect.told} on held-out probes {ways}"]
    return notes + [f"without {count} blocks the budget can't be met: {error}" for count, error in refused]


def _tried(ground: DepthGround, chosen: Chosen, clock: Clock) -> Attempt | LbylError:
    """The attempt, or the error if it fails."""
    try:
        return attempt(ground, chosen, Clock(dict(clock.seconds)))
    except LbylError as error:
        return error


def attempt(ground: DepthGround, chosen: Chosen, clock: Clock) -> Attempt:
    """The network without these blocks, and narrower as far as the budget asks for it."""
    done = shallower(ground, chosen, clock) if chosen.blocks else None
    model = done.model if done else ground.model
    if done and ground.count(model) <= ground.limit * (1 + 1e-9):
        plan, report = depth_plan(ground, done), depth_report(ground, done, clock)
        return Attempt(len(chosen.blocks), False, Result(model, after_earlier(ground.model, plan), report), done.effect)
    result = _narrower(ground, model, done, clock)
    effect = ground.effect(ground.judged_as(result.model))
    return Attempt(len(chosen.blocks), True, result, effect)


def _narrower(ground: DepthGround, model: nn.Module, done: Shallower | None, clock: Clock) -> Result:
    """A result with fewer channels, for what is left of the budget."""
    request = replace(ground.request, budget=_rest(ground, model), forecast=False)
    if done is None:
        prepared = replace(ground.prepared, forecaster=None)
    else:
        plan = after_earlier(ground.model, depth_plan(ground, done))
        remember(model, plan, depth_report(ground, done, clock))
        prepared = prepare(model, ground.prepared.inputs, request, None, clock)
    result = walk(prepared, request, clock, _analyses(ground, prepared, request, clock))
    report = result.report
    if done is not None:
        report = _joined(ground, done, result, clock)
    settings = {name: value for name, value in result.plan.settings.items() if name != "after"}
    first = remembered(ground.model)
    earlier = {"after": dict(first.settings)} if first else {}
    plan = replace(result.plan, settings={**settings, "budget": described(ground.budget), **earlier})
    return Result(result.model, plan, report)


def _rest(ground: DepthGround, model: nn.Module) -> Budget:
    """The budget for a network that has lost blocks already."""
    name, amount = ground.budget.limited
    if name == "size_mb":
        return replace(ground.budget, depth=False)
    share = min(1.0, amount * ground.whole / ground.count(model))
    return replace(ground.budget, depth=False, **{name: share})  # pyright: ignore[reportArgumentType]


def _analyses(
    ground: DepthGround, prepared: Prepared, request: CompressionRequest, clock: Clock
) -> dict[str, Analysis]:
    """The analysis of the network with the probes of the whole one; {} if only its parts could be traced."""
    if prepared.traced.graph is None or not prepared.subjects[0].restorer.takes_probes:
        return {}
    (subject,) = prepared.subjects
    probes = ground.probes
    if probes.statistics and subject.model is not ground.prepared.subjects[0].model:
        with undisturbed(subject.model):
            probes = replace(probes, statistics=measure_statistics(subject.model, probes.batches))
    given = GivenProbes(probes)

    def make(attempt: object) -> Analysis:
        return analyze(attempt, request, request.budget, clock, given)  # pyright: ignore[reportArgumentType]

    return {"": first_that_restores(subject, request, make)[1]}


def _joined(ground: DepthGround, done: Shallower, result: Result, clock: Clock) -> Report:
    """The report of blocks and channels together, from the whole network on."""
    first, then = depth_report(ground, done, clock), result.report
    again = "the network was compressed before"
    with undisturbed(result.model):
        macs = count_macs(result.model, ground.prepared.inputs)
    worst = [each for each in (first.verified, then.verified) if each is not None]
    return replace(
        then,
        left=(*first.left, *then.left),
        parameters=(first.parameters[0], count_parameters(result.model)),
        macs=None if first.macs is None else (first.macs[0], macs),
        verified=max(worst) if worst else None,
        notes=(*first.notes, *(note for note in then.notes if not note.startswith(again) and note not in first.notes)),
        assessment=None,
        held_out_errors={},
        blocks=dropped_rows(done),
    )
