"""Drops the chosen blocks, restores by the layers before them, and verifies; with plan and report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lbyl.graph.blocks import child_path
from lbyl.io.report.report import Report
from lbyl.io.report.rows import Dropped
from lbyl.pipeline.depth.ground import DepthGround, probe_statistics
from lbyl.pipeline.ground import after_earlier
from lbyl.pipeline.result import Result
from lbyl.restore.depth.fit import RIDGES, RestoredRun, RestoredRuns, RunProblem, restore_runs
from lbyl.restore.least_squares.recalibrate import renormalize, transplant
from lbyl.restore.least_squares.restorer import LeastSquares
from lbyl.runtime.copying import copy_model, sharing_copy, tensors_of
from lbyl.runtime.output_error import Assessment
from lbyl.runtime.progress import Clock
from lbyl.selection.blocks import Chosen
from lbyl.surgery.blocks import BlockCut, renamed, verify_blocks, without_blocks
from lbyl.surgery.plan import remember


@dataclass(frozen=True)
class Shallower:
    """The network without some blocks, restored.

    Attributes:
        chosen: the dropped blocks.
        cuts: the cuts that drop them.
        runs: how they were restored.
        model: the network, with tensors of its own.
        verified: the relative difference from the whole network with these blocks skipped.
        effect: the effect on held-out probes.
    """

    chosen: Chosen
    cuts: tuple[BlockCut, ...]
    runs: RestoredRuns
    model: nn.Module
    verified: float | None
    effect: float


def shallower(ground: DepthGround, chosen: Chosen, clock: Clock) -> Shallower:
    """Drop blocks, restore by the layers before them, and verify.

    Raises:
        VerificationError: the smaller network computes something else than the whole one with the blocks skipped.
    """
    cuts, model = ground.cuts(chosen.blocks), ground.model
    with clock("restore blocks"):
        runs = restore_runs(_problem(ground, cuts))
        values: dict[str, Tensor] = {}
        for run in runs.runs:
            values |= run.values(model)
        work = sharing_copy(model, values)
    with clock("cut"):
        smaller = copy_model(without_blocks(work, cuts))
    verified = None
    if ground.request.verify:
        with clock("verify"):
            verified = verify_blocks(work, smaller, ground.prepared.inputs, [n for cut in cuts for n in cut.dropped])
    with clock("renorm"):
        smaller, effect = _recalibrated(ground, cuts, runs, smaller)
    return Shallower(chosen, cuts, runs, smaller, verified, effect)


def _problem(ground: DepthGround, cuts: tuple[BlockCut, ...]) -> RunProblem:
    request, (ridges, positions) = ground.request, ground.solving(RIDGES)
    return RunProblem(
        ground.judged,
        cuts,
        ground.blocks,
        ground.probes.batches,
        ground.effect,
        ridges,
        positions,
        request.seed,
        request.progress,
    )


def _recalibrated(
    ground: DepthGround, cuts: tuple[BlockCut, ...], runs: RestoredRuns, smaller: nn.Module
) -> tuple[nn.Module, float]:
    """The network with recalibrated batch norms, if this lowers the effect on held-out probes; and that effect.

    Batch norms behind a restored layer have their statistics already.
    """
    judged = without_blocks(sharing_copy(ground.judged, runs.values), cuts)
    found = probe_statistics(judged, ground.probes)
    settled = {renamed(name, cuts) for name in runs.values}
    names = {
        (renamed(mean, cuts), renamed(var, cuts)): stats
        for (mean, var), stats in probe_statistics(ground.model, ground.probes).items()
    }
    before = {
        (mean, var): stats
        for (mean, var), stats in names.items()
        if mean is not None and var is not None and mean not in settled and (mean, var) in found
    }
    own = ground.restorer
    if not before or not ground.solves or (isinstance(own, LeastSquares) and not own.renorm):
        return smaller, runs.restored
    after = {key: found[key] for key in before}
    effect = ground.effect(sharing_copy(judged, transplant({}, tensors_of(judged), after)))
    if effect >= runs.restored:
        return smaller, runs.restored
    return copy_model(sharing_copy(smaller, renormalize(tensors_of(smaller), {}, before, after))), effect


def depth_result(ground: DepthGround, done: Shallower, clock: Clock) -> Result:
    """The network that has lost the blocks and nothing else, with plan and report."""
    plan, report = ground.plan(blocks=done.cuts), _report(ground, done, clock)
    result = Result(done.model, after_earlier(ground.model, plan), report)
    remember(result.model, result.plan, result.report)
    return result


def _report(ground: DepthGround, done: Shallower, clock: Clock) -> Report:
    """The report of a network from which blocks were dropped, and nothing else."""
    return ground.report(
        done.model,
        clock,
        _notes(ground, done),
        left=ground.bad,
        verified=done.verified,
        assessment=_assessment(ground, done),
        blocks=_rows(done),
    )


def _rows(done: Shallower) -> tuple[Dropped, ...]:
    """A row for each dropped block, in the order of choice."""
    notes = {name: _made_up(run) for run in done.runs.runs for name in run.dropped}
    return tuple(
        Dropped(name, done.chosen.alone[name], together, notes[name])
        for name, together in zip(done.chosen.blocks, done.chosen.together, strict=True)
    )


def _made_up(run: RestoredRun) -> str:
    if run.run is None or run.solution is None:
        return f"dropped plainly: {run.why}"
    return f"made up for by {child_path(run.run.host, run.run.writer.layer)} (ridge {run.ridge:g})"


def _notes(ground: DepthGround, done: Shallower) -> Iterator[str]:
    if not done.cuts:
        return
    names = [name for cut in done.cuts for name in cut.dropped]
    effect, runs = ground.effect, done.runs
    yield (
        f"dropped blocks: {', '.join(names)}. They change the outputs on held-out probes least; {effect.told} "
        f"there: {runs.plain:.3g} when they are dropped plainly, {runs.restored:.3g} with what they did left to "
        "the layers before them" + f", {done.effect:.3g} with recalibrated batch norms" * (done.effect < runs.restored)
    )
    if ground.probes.note:
        yield ground.probes.note


def _assessment(ground: DepthGround, done: Shallower) -> Assessment | None:
    """The relative error of the outputs, without and with restoration."""
    no_values: Mapping[str, Tensor] = {}
    if not done.cuts:
        return None
    judged = ground.judged
    pruned, restored = (
        ground.effect.error(without_blocks(sharing_copy(judged, values), done.cuts))
        for values in (no_values, done.runs.values)
    )
    return ground.assessed((pruned, restored))
