"""Restores dropped blocks, one run after the other: each is left to the layer before it, if that helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lbyl.graph.blocks import Blocks, child_path
from lbyl.graph.writers import find_writer
from lbyl.moments.accumulate import Moments
from lbyl.moments.stream import Run, stream_moments
from lbyl.restore.depth.effect import Effect
from lbyl.restore.depth.solve import folded, has_bias, solve_stream
from lbyl.restore.ridge import Solution
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress, counted
from lbyl.runtime.seeding import generator_for
from lbyl.surgery.blocks import BlockCut, renamed, without_blocks

RIDGES = (0.01, 0.1, 1.0)
"""Relative ridges to try where the user names none; held-out probes choose."""


@dataclass(frozen=True)
class RunProblem:
    """What is needed to restore dropped blocks.

    Attributes:
        model: the network with all blocks, in evaluation mode; it is not changed.
        cuts: the cuts that drop the blocks.
        blocks: the residual blocks, with their calls on the example inputs.
        batches: the probes for solving.
        effect: the effect on held-out probes.
        ridges: the relative ridges to try.
        positions: largest number of positions of each batch.
        seed: seed of the positions.
        progress: called as ``progress(stage, done, total)``.
    """

    model: nn.Module
    cuts: tuple[BlockCut, ...]
    blocks: Blocks
    batches: Sequence[ExampleInputs]
    effect: Effect
    ridges: tuple[float, ...] = RIDGES
    positions: int = 20_000
    seed: int = 0
    progress: Progress | None = None


@dataclass(frozen=True)
class RestoredRun:
    """How one run of dropped blocks was restored.

    Attributes:
        dropped: the paths of the blocks.
        run: the run with its host; None if no layer before it can make up for it.
        solution: the regression; None if the run is dropped plainly.
        moments: the moments it was solved with.
        ridge: the relative ridge.
        effects: the effect on held-out probes of all dropped blocks, before and after this run was restored.
        why: why it was not restored.
    """

    dropped: tuple[str, ...]
    run: Run | None = None
    solution: Solution | None = None
    moments: Moments | None = None
    ridge: float = 0.0
    effects: tuple[float, float] | None = None
    why: str = ""

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """New values for a network in which the run's host has its original weights; {} without a restoration."""
        if self.run is None or self.solution is None or self.moments is None:
            return {}
        host = model.get_submodule(self.run.host)
        return folded(host, self.run.host, self.run.writer, self.solution, self.moments)


@dataclass(frozen=True)
class RestoredRuns:
    """The outcome for all runs.

    Attributes:
        runs: one entry for each run, from input to output.
        values: new values of parameters and buffers of the network with all blocks, by name.
        plain: the effect on held-out probes without restoration.
        restored: the effect with it.
    """

    runs: tuple[RestoredRun, ...]
    values: Mapping[str, Tensor] = field(repr=False)
    plain: float = float("nan")
    restored: float = float("nan")


def runs_of(cut: BlockCut) -> list[tuple[int, int]]:
    """The runs of consecutive dropped positions in a list, as pairs of the first and the last one.

    >>> runs_of(BlockCut("layers", ("0", "1", "2", "3", "4"), (0, 3)))
    [(1, 2), (4, 4)]
    """
    gone = [index for index in range(len(cut.children)) if index not in cut.keep]
    firsts = [index for index in gone if index - 1 not in gone]
    return [(first, next(last for last in range(first, len(cut.children)) if last + 1 not in gone)) for first in firsts]


def restore_runs(problem: RunProblem) -> RestoredRuns:
    """Restore every run in turn, from input to output, each in the network in which earlier runs are dropped already.

    A run is restored with the ridge that has the least effect on held-out probes, and dropped plainly if that is less
    still. So the effect never gets larger than that of plain dropping.
    """
    values: dict[str, Tensor] = {}
    plain = now = problem.effect(_smaller(problem.model, values, problem.cuts))
    found: list[RestoredRun] = []
    named = [(cut, pair) for cut in problem.cuts for pair in runs_of(cut)]
    order = list(problem.blocks.calls)
    named.sort(key=lambda item: order.index(child_path(item[0].stack, item[0].children[item[1][0]])))
    for cut, (first, last) in counted(named, problem.progress, "restoring blocks"):
        dropped = tuple(child_path(cut.stack, cut.children[index]) for index in range(first, last + 1))
        restored = _restored(problem, cut, first, dropped, values, now)
        values |= restored.values(problem.model)
        now = restored.effects[1] if restored.effects else now
        found.append(restored)
    return RestoredRuns(tuple(found), values, plain, now)


def _smaller(model: nn.Module, values: Mapping[str, Tensor], cuts: Sequence[BlockCut]) -> nn.Module:
    return without_blocks(sharing_copy(model, values), cuts)


def _restored(
    problem: RunProblem,
    cut: BlockCut,
    first: int,
    dropped: tuple[str, ...],
    values: Mapping[str, Tensor],
    now: float,
) -> RestoredRun:
    """One run, restored if this lowers the effect."""
    model = problem.model
    host = child_path(cut.stack, cut.children[first - 1]) if first else ""
    call = problem.blocks.calls.get(host)
    if call is None:
        return RestoredRun(dropped, why="no block precedes it in its list")
    with undisturbed(model), torch.no_grad():
        writer = find_writer(model.get_submodule(host), call)
    if writer is None:
        return RestoredRun(dropped, why=f"no layer of {host} adds its output to the stream as it is")
    run = Run(host, writer, dropped[0], dropped[-1])
    current = _smaller(model, values, problem.cuts)
    inner = renamed(host, problem.cuts)
    assert inner is not None
    generator = generator_for(problem.seed, f"{host}#stream")
    with undisturbed(model), undisturbed(current):
        moments = stream_moments(model, current, run, inner, problem.batches, problem.positions, generator)
    biased = has_bias(model.get_submodule(host), writer)
    best = RestoredRun(dropped, run, effects=(now, now), why="restoration did not lower the error on held-out probes")
    for ridge in problem.ridges:
        solution = solve_stream(moments, ridge, biased)
        tried = RestoredRun(dropped, run, solution, moments, ridge, (now, now))
        error = problem.effect(_smaller(model, {**values, **tried.values(model)}, problem.cuts))
        assert best.effects is not None
        if error < best.effects[1]:
            best = replace(tried, effects=(now, error))
    return best
