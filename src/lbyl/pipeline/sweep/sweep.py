"""`sweep`: compresses a network to several budgets, with shared probes and moments; it can be continued later."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from torch import nn

from lbyl.budget.budget import Budget
from lbyl.errors import ArtifactError, InputError, LbylError
from lbyl.io import artifact
from lbyl.io.files import write_folder, write_whole
from lbyl.io.report.format import shown
from lbyl.pipeline.evaluate import Evaluate, Judge
from lbyl.pipeline.prepare import check_weights, plain_module
from lbyl.pipeline.request import CompressionRequest, Restore, named_criterion, named_restorer
from lbyl.pipeline.result import Inputs
from lbyl.pipeline.sweep import pareto
from lbyl.pipeline.sweep.fingerprint import check_same, fingerprint
from lbyl.pipeline.sweep.ground import Network
from lbyl.pipeline.sweep.pareto import Point
from lbyl.pipeline.sweep.points import Made, Work, check_cluster, filled, made_in
from lbyl.pipeline.sweep.state import ANALYSIS, SweepState, clear, exists, occupied
from lbyl.runtime.checks import as_path, named_kind
from lbyl.runtime.cluster import OWN_FILES, connected
from lbyl.runtime.contexts import own_settings
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.latency import check_runtime
from lbyl.runtime.progress import Progress, cancelable
from lbyl.runtime.recursion import deep_calls
from lbyl.runtime.settings import described
from lbyl.selection.criteria.base import Criterion, SeeingCriterion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "README.md"


@dataclass(frozen=True)
class Sweep:
    """A network at several budgets.

    Attributes:
        path: the folder, which has a folder for ``lbyl.load`` for each point that was made.
        points: one point for each budget, in the order in which they were requested.
        source: the source of the network.
        unpruned: the value of ``evaluate`` for the unpruned network.
        seconds: the time of the work that all points share, by stage.
    """

    path: Path
    points: tuple[Point, ...]
    source: str | None
    unpruned: float | None
    seconds: dict[str, float]

    @property
    def made(self) -> tuple[Point, ...]:
        """The points that were made."""
        return tuple(point for point in self.points if point.made)

    @property
    def front(self) -> tuple[str, ...]:
        """Names of the points on the Pareto front of size and damage."""
        return pareto.front(self.points)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "path": str(self.path),
            "source": self.source,
            "unpruned": self.unpruned,
            "points": [asdict(point) for point in self.points],
            "front": list(self.front),
            "seconds": self.seconds,
        }

    def plot(self) -> Figure:
        """Plot the expected agreement, or else the error, and the accuracy if known, against cost with Matplotlib."""
        return pareto.plot(self.points, self.unpruned)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield pareto.table(self.points)
        for text in (*pareto.told(self.points, self.unpruned), *pareto.failures(self.points)):
            yield shown(text)


@cancelable
@own_settings()
def sweep(
    model: nn.Module,
    example_inputs: Inputs,
    budgets: Sequence[Budget],
    path: str | os.PathLike[str],
    *,
    evaluate: Evaluate | None = None,
    scope: str = "inner",
    criterion: str | Criterion | SeeingCriterion = "auto",
    restore: Restore = "auto",
    seed: int = 0,
    verify: bool = True,
    strict: bool = False,
    submodule: str | None = None,
    source: str | None = None,
    progress: Progress | None = None,
    forecast: bool = True,
    effort: str = "default",
    ray: str | None = None,
) -> Sweep:
    """Compress a network to several budgets; probes, error curves and moments are made once for all of them.

    Every point is the result of `compress` for its budget, in its own folder within ``path``. That folder also gets
    ``sweep.json``, a table (``README.md``) and a picture (``pareto.svg``). If a sweep is stopped, the same call
    continues it: points that exist are not made again, and points that could not be made are not tried again. A call
    with other budgets adds points. Only one process at a time can work in a folder.

    Args:
        model: a trained network; it is not changed.
        example_inputs: the model's inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        budgets: the budgets, which may be of different kinds.
        path: a new folder, or that of a sweep of the same network with the same settings.
        evaluate: called with each smaller network and once with a copy of the unpruned one, all in evaluation mode;
            returns a number that is larger for better networks.
        scope: as for `compress`, like all arguments that follow.
        criterion: how channels are scored.
        restore: the restorer.
        seed: seed of all random numbers.
        verify: whether to compare each cut network with the masked one.
        strict: whether to raise an error if a part of the model can't be traced or cut.
        submodule: compress only the submodule of this name.
        source: the source of the model.
        progress: called as ``progress(stage, done, total)``.
        forecast: whether to forecast the agreement of each smaller network on real inputs, also of those that an
            earlier call made without.
        effort: how much time ``restore="auto"`` may take: "low" takes few probes, dreams nothing, and solves all
            consumers at once; "high" makes more probes and steps of dreaming than "default".
        ray: the address of a Ray cluster whose machines make and evaluate the points, or "auto" for the cluster that
            runs here, or else for the cores of this machine. The analysis is made here and sent to them; files are
            written here alone. Budgets of latency are met here, after the others.

    Returns:
        All points, including those that could not be made, with the reasons.

    Raises:
        InputError: there is no budget or one is given twice, a setting can't be used, the folder holds something else
            or another sweep, or ``evaluate`` failed.
        TraceError: ``torch.export`` can't trace the model.
        ArtifactError: a file of the sweep is damaged.
        ClusterError: Ray is not installed or not reached, or its machines can't do the work.
    """
    request = CompressionRequest(
        0.5,
        None,
        scope,
        named_criterion(criterion),
        named_restorer(restore),
        seed,
        verify,
        strict,
        source,
        progress,
        forecast,
        effort,
    )
    _check(budgets)
    judge = Judge(evaluate)
    model = plain_module(model)
    check_weights(model)
    folder, inputs = as_path(path), ExampleInputs.of(example_inputs)
    if ray is not None:
        check_cluster(ray, model, inputs, request, evaluate)
    now = fingerprint(model, inputs, request, submodule)
    network = Network(model, inputs, request, submodule)
    # Errors of the network or of the user's function are raised before the folder is made.
    with deep_calls(model):
        first = None if exists(folder) else _first(network, now, judge)
    with deep_calls(model), occupied(folder):
        before = first.write(folder) if first and not exists(folder) else SweepState.read(folder)
        check_same(before.fingerprint, now, str(folder))
        clear(folder, [point.name for point in before.points])
        state = _admitted(judge, _listed(before, budgets, folder))
        if judge.evaluate and state.unpruned is None:
            state = replace(state, unpruned=judge(model, "the unpruned network"))
        if state != before:
            state.write(folder)
        state = _foretold(network, _judged(state, folder, judge, model), folder)
        state = _compressed(network, state, folder, judge, ray)
        _show(state, folder, anew=state != before)
    return Sweep(folder, state.points, state.source, state.unpruned, dict(state.seconds))


def _first(network: Network, now: Mapping[str, Any], judge: Judge) -> SweepState:
    """The state of a new sweep."""
    if not network.cuttable:
        raise InputError("the model has no part with groups that can be cut; lbyl.inspect lists them")
    unpruned = judge(network.model, "the unpruned network")
    return SweepState(now, (), network.request.source, judge.name, unpruned)


def _compressed(network: Network, state: SweepState, folder: Path, judge: Judge, ray: str | None) -> SweepState:
    """Make the missing points. If one can't be made, the reason is stored, and the next one is made."""
    waiting = [point for point in state.points if not point.made and not point.reason]
    if not waiting:
        return state
    ground = network.ground(folder / ANALYSIS, state.fingerprint, several=len(waiting) > 1)
    spent = {stage: state.seconds.get(stage, 0.0) + value for stage, value in network.clock.seconds.items()}
    state = replace(state, seconds={**state.seconds, **spent})
    work = Work(network.prepared, ground, network.request, judge.evaluate, state.unpruned)
    if ray is not None:
        elsewhere = [point for point in waiting if not point.limit.is_timed]
        waiting = [point for point in waiting if point.limit.is_timed]
        with connected(ray) as cluster:
            state = _collected(made_in(cluster, work, elsewhere), state, folder, len(elsewhere), work.request.progress)
    return _made_here(work, waiting, state, folder, judge)


def _collected(
    tasks: Iterator[Made], state: SweepState, folder: Path, total: int, progress: Progress | None
) -> SweepState:
    """Write the folders of points that were made elsewhere, as they come in.

    Raises:
        LbylError: the first error of the user's function, after the point that it failed on was written.
    """
    for done, made in enumerate(tasks, 1):
        if made.files:
            write_folder(folder / made.point.name, made.files)
        state = state.having(made.point).write(folder)
        if made.fault is not None:
            raise made.fault
        if progress is not None:
            progress("points", done, total)
    return state


def _made_here(work: Work, waiting: Sequence[Point], state: SweepState, folder: Path, judge: Judge) -> SweepState:
    """Make points in this process, one after the other."""
    for number, point in enumerate(waiting):
        progress = _labelled(work.request.progress, f"{point.asked} ({number + 1} of {len(waiting)})")
        started = perf_counter()
        result = work(point, judge, replace(work.request, progress=progress))
        if isinstance(result, LbylError):
            state = state.having(replace(point, reason=str(result))).write(folder)
            continue
        result.save(folder / point.name)
        point = filled(point, result.report, perf_counter() - started)
        state = state.having(point).write(folder)
        if judge.evaluate:
            state = state.having(replace(point, accuracy=judge(result.model, point.asked))).write(folder)
    return state


def _judged(state: SweepState, folder: Path, judge: Judge, model: nn.Module) -> SweepState:
    """Evaluate the points that are not evaluated yet."""
    for point in state.points:
        if judge.evaluate and point.made and point.accuracy is None:
            smaller = artifact.load(folder / point.name, model)
            state = state.having(replace(point, accuracy=judge(smaller, point.asked))).write(folder)
    return state


def _foretold(network: Network, state: SweepState, folder: Path) -> SweepState:
    """Forecast the points that were made by a call that asked for no forecasts."""
    if not network.request.forecast:
        return state
    open_points = [point for point in state.points if point.made and point.agreement is None]
    found = [(point, artifact.read_manifest(folder / point.name)) for point in open_points]
    unknown = [(point, saved) for point, saved in found if saved.report.forecast is None]
    if not unknown:
        return state
    foretell = network.forecasts(folder / ANALYSIS, state.fingerprint)
    for point, saved in unknown:
        place = folder / point.name
        report = replace(saved.report, forecast=foretell(artifact.load(place, network.model)))
        artifact.rewrite_documents(place, saved.plan, report)
        state = state.having(filled(point, report, point.seconds)).write(folder)
    return state


def _admitted(judge: Judge, state: SweepState) -> SweepState:
    """The state with the function's name; values of two functions must not be mixed in one table."""
    if judge.name is None or (state.evaluate or "").removeprefix(OWN_FILES) == judge.name:
        return state
    if state.evaluate is not None:
        raise InputError(
            f"this sweep was evaluated by {state.evaluate}, but now {judge.name} is given: "
            "give the same one, or write to another folder"
        )
    return replace(state, evaluate=judge.name)


def _check(budgets: Sequence[Budget]) -> None:
    if isinstance(budgets, (Budget, str)) or not isinstance(budgets, Sequence):
        raise InputError(f"budgets is {named_kind(budgets)}; pass a list, such as [lbyl.Budget(macs=0.5)]")
    if not budgets:
        raise InputError("a sweep needs at least one budget, such as lbyl.Budget(macs=0.5)")
    for number, budget in enumerate(budgets):
        if not isinstance(budget, Budget):
            raise InputError(f"budgets[{number}] is {named_kind(budget)}; write lbyl.Budget(macs=0.5)")
        if budget in budgets[:number]:
            raise InputError(f"{budget} is given twice")
        if name := budget.beyond_width:
            what = {"depth": "blocks", "head_dim": "heads"}.get(name, name)
            raise InputError(f"budgets[{number}]: a sweep cuts no {what}; call lbyl.compress for {name}=True")
        check_runtime(budget.runtime)


def _listed(state: SweepState, budgets: Sequence[Budget], folder: Path) -> SweepState:
    """The state with a point for every budget, and with results that the folder already holds."""
    for budget in budgets:
        asked = _jsonable(described(budget))
        if any(point.limit == budget for point in state.points):
            continue
        taken = {point.name for point in state.points}
        name = base = Point("", asked).asked.replace("=", "-")
        count = 1
        while name in taken or (folder / name).exists():
            count += 1
            name = f"{base}-{count}"
        state = state.having(Point(name, asked))
    for point in state.points:
        there = (folder / point.name).is_dir()
        if there and not point.made:
            # The process was killed after the folder was written, and before the state was.
            manifest = artifact.read_manifest(folder / point.name)
            told = manifest.plan.settings.get("budget")
            if told is None or replace(point, budget=told).limit != point.limit:
                raise ArtifactError(f"{folder / point.name} has another budget; remove it, and it will be made again")
            state = state.having(filled(point, manifest.report, None))
        elif point.made and not there:
            state = state.having(Point(point.name, point.budget))
    return state


def _show(state: SweepState, folder: Path, anew: bool) -> None:
    """Write table and picture if they are missing or outdated."""
    if anew or not (folder / PAGE).is_file():
        if pareto.figure_wanted(state.points):
            write_whole(folder / pareto.PICTURE, pareto.picture(state.points, state.unpruned))
        write_whole(folder / PAGE, pareto.markdown(state.points, state.source, state.unpruned))


def _labelled(progress: Progress | None, label: str) -> Progress | None:
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{label}: {stage}", done, total)


def _jsonable(value: Any) -> Any:
    """Plain data as JSON would return it."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, (list, tuple)) else value
