"""Restoration by least squares: probe the network, solve each consumer, recalibrate batch norms, measure."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain

import torch
from torch import Tensor, nn

from lbyl.graph import Graph
from lbyl.graph.types import last_to_run
from lbyl.moments import ClosedFormSource, Probes, ProbeSource
from lbyl.moments.accumulate import ConsumerMoments, PatchSums
from lbyl.moments.attached_norms import folded, measure_statistics, normed_graph, with_norms
from lbyl.moments.base import is_lifelike
from lbyl.moments.data import Data
from lbyl.moments.token_inputs import token_ids
from lbyl.restore.base import Restoration, RestorationProblem
from lbyl.restore.closed_form import with_ties
from lbyl.restore.least_squares.judge import Judge, Reference
from lbyl.restore.least_squares.recalibrate import (
    POSITIONS,
    Look,
    Observer,
    averaged,
    look,
    recenter,
    renormalize,
)
from lbyl.restore.least_squares.recall import Recall
from lbyl.restore.least_squares.sequential import NotApplicable, SequentialResult, all_in_turn, solve_sequentially
from lbyl.restore.least_squares.settings import Settings
from lbyl.restore.least_squares.solve import (
    Findings,
    LeastSquaresProblem,
    Sums,
    empty_sums,
    merged,
    solve_channels,
    solve_closed_form,
    solve_patches,
)
from lbyl.restore.least_squares.whole_sums import planned_sums, with_cluster
from lbyl.restore.targets import Target, find_targets, knowing_taps, masked
from lbyl.runtime.batch_norms import batch_norms
from lbyl.runtime.batches import FEWEST, batch_size, in_parts
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.forward import ConsumerCall, OnConsumer, run_intercepted
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.memory import give_back, held_at_once, held_by_each
from lbyl.runtime.output_error import Assessment
from lbyl.runtime.progress import Progress, counted
from lbyl.runtime.seeding import generator_for
from lbyl.selection.filters import State
from lbyl.surgery.masking import norm_masks, with_masks


def fit(task: RestorationProblem, settings: Settings) -> Restoration:
    """Restore every consumer of dropped channels by least squares on moments."""
    started, selection, seconds = time.perf_counter(), task.selection, {}
    closed = isinstance(settings.moments, ClosedFormSource)
    probes = None if closed else task.probes or make_probes(task.model, task.inputs, settings, task.seed, task.progress)
    seconds["probe"] = time.perf_counter() - started
    attached = probes.statistics if probes else {}
    if not closed and is_lifelike(settings.moments, task.inputs):
        settings = settings.for_lifelike_probes(texts=token_ids(task.inputs) is not None)
    reference = task.reference if isinstance(task.reference, Reference) else None
    if reference is None and probes is not None:
        reference = Reference.of(task.model, probes, settings.memory)
    model = with_norms(task.model, attached) if reference is None else reference.model
    graph = normed_graph(task.graph, attached)
    targets = _targets(model, graph, task, settings)
    recall = Recall() if reference is None else reference.recall
    problem = LeastSquaresProblem(model, graph, selection, targets, settings, task.seed, task.progress, recall)
    state = tensors_of(model)
    findings = Findings(state)

    def restoration(found: _Found, assessment: Assessment | None) -> Restoration:
        rows = [found.findings.row(number, choice) for number, choice in enumerate(selection.choices)]
        return Restoration(
            with_masks(folded(model, attached, found.values), selection, tensors_of(task.model)),
            with_ties(selection, rows),
            assessment,
            found.notes,
            seconds,
            held_out_errors={"pruned": assessment.pruned, **found.errors} if assessment and assessment.held_out else {},
        )

    started = time.perf_counter()
    if probes is None or reference is None:
        assert isinstance(settings.moments, ClosedFormSource)
        with torch.no_grad():
            solve_closed_form(selection, settings.moments, problem.found, settings.strength(False), findings)
            seconds["solve"] = time.perf_counter() - started
            return restoration(_Found(problem.stored(findings.values, state), findings), None)
    with torch.no_grad():
        first = _solved_in_turn(problem, reference)
        seconds["solve"] = time.perf_counter() - started
        if first is None or not first.suffices:
            found, judge, before = _compared(problem, probes, _known(task, probes, settings), findings, first, seconds)
        else:
            found, judge, before = first.found(problem, probes), first.judge, first.before
        judges = judge.by_kind(probes.kinds)
        if judges or found.error > before:
            found = _trusted(found, _pruned(problem, state), state, before, judge, judges)
    real = isinstance(settings.moments, Data)
    return restoration(found, Assessment(before, found.error, probes.holds_out, real))


_CLEARLY, _MANY = 0.75, 256
"""Consumers solved in turn are not compared with other solutions if this share of plain pruning's error is left or
less, on so many probes or more. On fewer, each turn fits them a little too closely, and this adds up."""
_ROUNDING = 1e-6
"""Where plain pruning has no larger error than this, which is that of float32, there is nothing to restore: the dropped
channels were never active. Solutions would be no better, and `_trusted` would leave them out in the end."""


@dataclass(frozen=True)
class _First:
    """What was tried first: consumers solved in turn.

    Attributes:
        judge: measures errors on held-out probes.
        before: the error of plain pruning.
        turned: the solution, or why there is none; None if there is nothing to restore.
        error: its error.
        asked: whether the user asked for it.
    """

    judge: Judge
    before: float
    turned: SequentialResult | NotApplicable | None
    error: float = float("inf")
    asked: bool = False

    @property
    def suffices(self) -> bool:
        """Whether there is a solution that is asked for, or so good that others need not be measured."""
        if self.turned is None:
            return True
        return isinstance(self.turned, SequentialResult) and (self.asked or self.error <= _CLEARLY * self.before)

    def found(self, problem: LeastSquaresProblem, probes: Probes) -> _Found:
        """The solution, which must exist, or plain pruning."""
        if self.turned is None:
            state = tensors_of(problem.model)
            note = f"nothing to restore: error of plain pruning on {self.judge.where} {self.before:.3g}"
            notes = (*_told(problem, probes, {}), note)
            return _Found(_pruned(problem, state), Findings(state), notes, self.before)
        assert isinstance(self.turned, SequentialResult)
        note = f"consumers solved in turn: error on {self.judge.where} {self.error:.3g}"
        return _Found(
            self.turned.values,
            self.turned.findings,
            (*_told(problem, probes, {}), note),
            self.error,
            renorm=problem.settings.renorm,
            errors={"in turn": self.error},
        )


def _solved_in_turn(problem: LeastSquaresProblem, reference: Reference) -> _First | None:
    """Consumers solved in turn before anything else is measured, which takes about as long again.

    Only on many synthesized probes of networks with batch norms, if all consumers can be solved in this way: there it
    was the best solution on all networks on which it was compared (docs/research.md).
    """
    asked, state, probes = problem.settings.sequential, tensors_of(problem.model), reference.probes
    many = sum(map(batch_size, probes.batches)) >= _MANY
    able = asked or (asked is None and probes.matches_training_statistics and many)
    if not (able and probes.batch_statistics and probes.beyond is None and all_in_turn(problem, state)):
        return None
    judge = replace(reference.judge, kept=norm_masks(problem.selection))
    before = judge(_pruned(problem, state))
    if before <= _ROUNDING and not asked:
        return _First(judge, before, None)
    turned = solve_sequentially(problem, probes, Findings(state), problem.settings.renorm)
    give_back()
    if isinstance(turned, NotApplicable):
        return _First(judge, before, turned)
    return _First(judge, before, turned, judge(turned.on_probes), bool(asked))


def _compared(
    problem: LeastSquaresProblem,
    probes: Probes,
    known: Mapping[str, ConsumerMoments],
    findings: Findings,
    first: _First | None,
    seconds: dict[str, float],
) -> tuple[_Found, Judge, float]:
    """The best of consumers solved all at once, in turn and halfway between; its judge; and plain pruning's error.

    ``first`` is what was tried before, if anything. ``seconds`` gets the time that each step took.
    """
    started, state, model = time.perf_counter(), findings.state, problem.model
    looks = _measured(problem, probes, findings, known)
    found = _Found(problem.stored(findings.values, state), findings, _told(problem, probes, known))
    seconds["solve"] += time.perf_counter() - started
    started = time.perf_counter()
    norms = {target.consumer.weight: target.norm for target in problem.found if target.norm}
    give_back()
    positions = _positions(problem, probes)
    if not looks and (probes.statistics or batch_norms(model)):
        looks = [look(model, {}, batch, norms, positions) for batch in probes.batches]
    judge = first.judge if first else _judge(problem, probes, looks)
    before = first.before if first else judge(_pruned(problem, state))
    found = _with_renorm(problem, probes, replace(found, error=judge(found.values)), looks, norms, judge)
    found = replace(found, errors={"all at once": found.error})
    # Free memory.
    del looks
    give_back()
    seconds["renorm"] = time.perf_counter() - started
    started = time.perf_counter()
    # What was tried first had its batch norms recalibrated if that was asked for.
    turned = first.turned if first and found.renorm == problem.settings.renorm else None
    found = _with_turns(problem, probes, found, judge, turned)
    seconds["solve"] += time.perf_counter() - started
    return found, judge, before


def _judge(problem: LeastSquaresProblem, probes: Probes, looks: Sequence[Look]) -> Judge:
    """The judge of a problem, where all batches of probes were measured already, or none has batch norms to measure."""
    kept = norm_masks(problem.selection)
    return Judge.over(problem.model, probes, problem.settings.memory, dict(enumerate(looks)), kept)


def _known(task: RestorationProblem, probes: Probes, settings: Settings) -> Mapping[str, ConsumerMoments]:
    """The moments that are known, which are measured now if a cluster has to take some of the sums."""
    if probes.beyond is None or task.consumer_moments:
        return task.consumer_moments
    dropped = {choice.group.name for choice in task.selection.choices}
    groups = [number for number, group in enumerate(task.graph.groups) if group.name in dropped]
    return measure(task.model, task.graph, groups, probes, settings, task.seed, settings.budget, task.progress)


def _told(problem: LeastSquaresProblem, probes: Probes, known: Mapping[str, ConsumerMoments]) -> tuple[str, ...]:
    """The probes' note, and how many layers are solved with sums over all batches if a cluster took some."""
    notes = (probes.note,) if probes.note else ()
    if probes.beyond is None:
        return notes
    summed = sum(target.consumer.weight in known for target in problem.found)
    told = f"{summed} of {len(problem.found)} layers are solved with sums over all batches"
    others = "" if summed == len(problem.found) else ", and the others with those in memory"
    return (*notes, told + others)


def _targets(model: nn.Module, graph: Graph, task: RestorationProblem, settings: Settings) -> tuple[Target, ...]:
    """The consumers to solve for. For "mix" and closed forms, they know how often each kernel position lies inside."""
    targets, state = find_targets(graph, task.selection), tensors_of(model)
    sums = (empty_sums(target, task.selection, state, settings, task.seed)[0] for target in targets)
    if isinstance(settings.moments, ClosedFormSource) or not all(isinstance(each, PatchSums) for each in sums):
        return knowing_taps(targets, model, task.inputs)
    return targets


_ENOUGH = 32
"""So many inputs at a time suffice for statistics of a batch, where a network takes a fixed number of them."""


def make_probes(
    model: nn.Module, inputs: ExampleInputs, settings: Settings, seed: int, progress: Progress | None = None
) -> Probes:
    """Probes of a moment source, in batches that fit into the memory that is allowed.

    Larger batches are split, but not to fewer than 4 rows. Each part then has its own batch-norm statistics.
    """
    assert isinstance(settings.moments, ProbeSource)
    probes = settings.moments.probes(model, inputs, generator_for(seed, "probes"), progress)
    # Measured on the probes, because a user's own inputs may be larger than the example.
    most = max(FEWEST, held_at_once(settings.memory, held_by_each(model, probes.batches[0])))
    parts = [in_parts(batch, most, FEWEST) for batch in probes.batches]
    # Of a few inputs at a time, batches say too little of each layer's mean and variance.
    few = probes.batches[0].rows is not None and probes.batches[0].rows < _ENOUGH
    if settings.attach_norms and not probes.statistics and not few:
        pieces = [each for part in parts for each in part]
        statistics = measure_statistics(model, pieces, probes.batch_statistics)
        matching = probes.matches_training_statistics or bool(statistics)
        probes = replace(probes, statistics=statistics, matches_training_statistics=matching)
    if all(len(part) == 1 for part in parts):
        return probes
    firsts = list(accumulate((len(part) for part in parts), initial=0))

    def now(indices: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(number for index in indices for number in range(firsts[index], firsts[index + 1]))

    batches = tuple(chain.from_iterable(parts))
    return replace(
        probes,
        batches=batches,
        recalibration_batches=now(probes.recalibration_batches),
        evaluation_batches=now(probes.evaluation_batches),
    )


@dataclass(frozen=True)
class _Found:
    """A restoration in progress.

    Attributes:
        values: new parameters and buffers, as the layers store them.
        findings: the results of the solves.
        notes: what the user should know.
        error: error on held-out probes; NaN until it is known.
        on_probes: the values without corrections for differences between probes and real inputs; None if equal.
        renorm: whether batch norms were recalibrated.
        errors: errors on held-out probes, by the way the consumers were solved.
    """

    values: dict[str, Tensor]
    findings: Findings
    notes: tuple[str, ...] = ()
    error: float = float("nan")
    on_probes: dict[str, Tensor] | None = None
    renorm: bool = False
    errors: Mapping[str, float] = field(default_factory=dict)

    def plus(self, note: str) -> tuple[str, ...]:
        """The notes followed by another one."""
        return (*self.notes, note)


def _pruned(problem: LeastSquaresProblem, state: State) -> dict[str, Tensor]:
    """The values of plain pruning, which are made only when needed because they are as large as the weights."""
    return problem.stored({target.consumer.weight: masked(target, state) for target in problem.found}, state)


def _with_renorm(
    problem: LeastSquaresProblem,
    probes: Probes,
    found: _Found,
    looks: Sequence[Look],
    norms: Mapping[str, str],
    judge: Judge,
) -> _Found:
    """The restoration with recalibrated batch norms, unless this raises the error on held-out probes."""
    if not problem.settings.renorm or not any(each.statistics for each in looks):
        return found
    state, kept = found.findings.state, norm_masks(problem.selection)
    shown = _recalibration_batches(probes)
    theirs, positions = [looks[index] for index in shown], _positions(problem, probes)
    ours = [look(problem.model, found.values, probes.batches[index], norms, positions, kept) for index in shown]
    moved = renormalize(state, found.values, averaged(theirs), averaged(ours))
    error = judge(moved)
    if error >= found.error:
        note = f"recalibration left out: error on {judge.where} {found.error:.3g} without, {error:.3g} with it"
        return replace(found, notes=found.plus(note))
    values = recenter(moved, state, theirs, ours, norms)
    return replace(found, values=values, error=error, on_probes=moved, renorm=True)


def _recalibration_batches(probes: Probes) -> Sequence[int]:
    """The indices of the batches on which batch norms are recalibrated."""
    return probes.recalibration_batches or range(len(probes.batches))


def _positions(problem: LeastSquaresProblem, probes: Probes) -> int:
    """How many outputs of each consumer are stored for each batch, so that all take at most 1/8 of the memory."""
    settings, state = problem.settings, tensors_of(problem.model)
    channels = sum(len(target.weight(state)) for target in problem.found if target.norm)
    wanted = min(POSITIONS, max(_FEWEST_POSITIONS, settings.positions))
    fitting = held_at_once(settings.memory, 32 * max(1, channels))
    return min(wanted, fitting) // len(_recalibration_batches(probes))


_FEWEST_POSITIONS = 4096
"""So many outputs are stored for recalibration where fewer positions enter the moments."""


def _with_turns(
    problem: LeastSquaresProblem,
    probes: Probes,
    found: _Found,
    judge: Judge,
    turned: SequentialResult | NotApplicable | None,
) -> _Found:
    """The restoration with consumers solved in turn, or the average of both, if its held-out error is lower.

    ``turned`` is the solution in turn if it is known.
    """
    asked = problem.settings.sequential
    if not (asked or (asked is None and probes.matches_training_statistics)):
        return found
    if turned is None:
        turned = solve_sequentially(problem, probes, found.findings, found.renorm)
        give_back()
    if isinstance(turned, NotApplicable):
        told = asked or turned.possible
        return replace(found, notes=found.plus(f"consumers not solved in turn: {turned.why}")) if told else found
    state = found.findings.state
    halfway = _between(state, found.on_probes or found.values, turned.on_probes, 0.5)
    errors = {"all at once": found.error, "halfway between": judge(halfway), "in turn": judge(turned.on_probes)}
    if asked:
        errors = {"in turn": errors["in turn"]}
    found = replace(found, errors=errors)
    way = min(errors, key=lambda each: errors[each])
    figures = ", ".join(f"{error:.3g} {each}" for each, error in errors.items())
    notes = found.plus(f"consumers solved {way}: error on {judge.where} {figures}")
    if way == "all at once":
        return replace(found, notes=notes)
    values = turned.values if way == "in turn" else _between(state, found.values, turned.values, 0.5)
    return replace(
        found, values=values, error=errors[way], findings=merged(found.findings, turned.findings), notes=notes
    )


def _between(
    state: State, first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """The interpolation ``(1 - share) first + share second``; tensors missing in a set are the network's own."""

    def of(values: Mapping[str, Tensor], name: str) -> Tensor:
        return values.get(name, state[name].detach())

    return {name: torch.lerp(of(first, name), of(second, name), share) for name in {**first, **second}}


def _trusted(
    found: _Found,
    pruned: Mapping[str, Tensor],
    state: State,
    before: float,
    judge: Judge,
    judges: Sequence[Judge],
) -> _Found:
    """A restoration that raises the held-out error of no kind of probes: all of it, a part of it, or plain pruning.

    With too few probes for large layers, solutions do not generalize. ``before`` is the error of plain pruning on all
    held-out probes, which ``judge`` measures; ``judges`` has one for each kind, if there are several.
    """
    least = [each(pruned) for each in judges] or [before]
    after = [each(found.values) for each in judges] or [found.error]
    worse = max(range(len(after)), key=lambda number: after[number] - least[number])
    if after[worse] <= least[worse]:
        return found
    where = judges[worse].where if judges else judge.where
    for share in (0.5, 0.25):
        part = _between(state, pruned, found.values, share)
        error = judge(part)
        errors = [each(part) for each in judges] or [error]
        if all(each <= most for each, most in zip(errors, least, strict=True)):
            note = f"only {share:.0%} of the restoration kept, because all of it raised the error on {where}"
            return replace(found, values=part, error=error, notes=found.plus(note))
    note = f"restoration left out: error on {where} {least[worse]:.3g} without, {after[worse]:.3g} with it"
    return replace(found, values=dict(pruned), error=before, notes=found.plus(f"{note}; use more probes"))


def _measured(
    problem: LeastSquaresProblem, probes: Probes, findings: Findings, consumer_moments: Mapping[str, ConsumerMoments]
) -> list[Look]:
    """Collect moments and solve, as many consumers at a time as the budget allows, in execution order.

    Consumers whose moments are known are solved with these. If the unpruned network was run with batch statistics, the
    result holds what recalibration needs from it, batch by batch; otherwise it is empty.
    """
    waiting = _unknown(problem, findings, consumer_moments)
    looks: list[Look] = []
    while waiting:
        taken = _next_consumers(problem, findings, waiting)
        # The first pass runs to its end. Later passes stop after the last consumer.
        looks += _collect(problem, probes, findings, taken, watch=probes.batch_statistics and not looks)
        for name in list(taken):
            # Removed, because it is large and not needed after the consumer is solved.
            target, sums = taken.pop(name)
            if isinstance(sums, PatchSums):
                solve_patches(target, sums, problem.selection, problem.settings, findings)
            else:
                solve_channels(target, sums, problem.selection, problem.settings, findings)
        problem.report("solving", len(problem.found) - len(waiting), len(problem.found))
    return looks


def _unknown(
    problem: LeastSquaresProblem, findings: Findings, consumer_moments: Mapping[str, ConsumerMoments]
) -> list[Target]:
    """Solve the consumers whose moments are known; the others are returned."""
    waiting: list[Target] = []
    for target in problem.found:
        known = consumer_moments.get(target.consumer.weight)
        sums = None
        if known:
            sums = empty_sums(target, problem.selection, findings.state, problem.settings, problem.seed)[0]
        if known is None or not isinstance(sums, PatchSums):
            waiting.append(target)
            continue
        kernels = target.weight(findings.state).chunk(target.consumer.blocks)
        sums.output = list(known.output)
        pairs = zip(kernels, sums.columns.keep, sums.columns.drop, strict=True)
        sums.blocks = [known.part(number, kernel, k, d) for number, (kernel, k, d) in enumerate(pairs)]
        solve_patches(target, sums, problem.selection, problem.settings, findings)
    return waiting


def _next_consumers(
    problem: LeastSquaresProblem, findings: Findings, waiting: list[Target]
) -> dict[str, tuple[Target, Sums]]:
    """Remove consumers from the list, as many as the budget for moments allows, and make empty sums for each."""
    taken: dict[str, tuple[Target, Sums]] = {}
    cost = 0
    while waiting:
        target = waiting[0]
        sums, size, note = empty_sums(target, problem.selection, findings.state, problem.settings, problem.seed)
        if taken and cost + size > problem.settings.budget:
            break
        cost += size
        taken[target.consumer.weight] = (target, sums)
        waiting.pop(0)
        if note:
            findings.note(target.choices, note)
    return taken


def _collect(
    problem: LeastSquaresProblem,
    probes: Probes,
    findings: Findings,
    taken: Mapping[str, tuple[Target, Sums]],
    watch: bool,
) -> list[Look]:
    """Run the unpruned network on all probes, add to the sums, and if ``watch`` observe its batch norms."""
    norms = {target.consumer.weight for target in problem.found if target.norm}
    shown, positions = _recalibration_batches(probes), _positions(problem, probes)
    # A cut changes the inputs of consumers after a layer norm.
    kept = norm_masks(problem.selection)
    last = None if watch else last_to_run([target.consumer for target, _ in taken.values()])
    consumers = frozenset(consumer.weight for consumer in problem.graph.consumers)
    looks: list[Look] = []
    for number, batch in enumerate(counted(probes.batches, problem.progress, "measuring")):
        # For the other batches, only statistics are needed.
        observer = Observer(norms if number in shown else (), positions) if watch else None
        run_intercepted(
            problem.model,
            batch,
            on_consumer=_collecting(taken, findings.state, observer),
            on_norm=observer.on_norm if observer else None,
            batch_statistics=probes.batch_statistics,
            stop_after=last,
            kept=kept,
            foresee=consumers,
        )
        if observer:
            looks.append(observer.look())
        give_back()
    return looks


def _collecting(taken: Mapping[str, tuple[Target, Sums]], state: State, observer: Observer | None) -> OnConsumer:
    """The function that adds the inputs of consumers to their sums."""

    def on_consumer(call: ConsumerCall) -> None:
        if observer:
            observer.on_consumer(call)
        if call.weight in taken:
            target, sums = taken[call.weight]
            for item in [sums] if isinstance(sums, PatchSums) else [entry[2] for entry in sums]:
                item.add(call, target.weight(state))

    return on_consumer


def measure(
    model: nn.Module,
    graph: Graph,
    groups: Collection[int],
    probes: Probes,
    settings: Settings,
    seed: int,
    limit: int,
    progress: Progress | None = None,
) -> dict[str, ConsumerMoments]:
    """Measure moments of all input channels of some groups' consumers, from which `fit` uses parts.

    Args:
        model: the unpruned network in evaluation mode; nothing in it is changed.
        graph: its channel graph.
        groups: indices of the groups that may lose channels.
        probes: the probes on which it is run.
        settings: the restorer; consumers that it solves by "mix" are left out.
        seed: seed for sampling positions.
        limit: bytes that all moments may take. Later consumers that exceed it are left to `fit`, and so are consumers
            of channels that a layer norm is taken over.
        progress: called as ``progress(stage, done, total)``.
    """
    plan = planned_sums(model, graph, groups, settings, seed, limit)
    found = plan.over(model, counted(probes.batches, progress, "measuring") if plan.consumers else (), probes)
    if probes.beyond is not None and plan.consumers:
        return with_cluster(found, plan, model, probes, probes.beyond, progress)
    return found
