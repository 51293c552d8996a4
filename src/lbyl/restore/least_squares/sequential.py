"""Solves consumers one after the other, each with the inputs that it has after all earlier layers are cut."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass

import torch
from torch import Tensor

from lbyl.errors import first_line
from lbyl.graph import Norm
from lbyl.moments import Probes
from lbyl.moments.accumulate import PatchSums
from lbyl.restore.least_squares.paired_forward import ConsumerDue, NotPairable, run_paired
from lbyl.restore.least_squares.recalibrate import renormalize, shifted
from lbyl.restore.least_squares.solve import Findings, LeastSquaresProblem, empty_sums, solve_patches
from lbyl.restore.targets import Target, as_stored, following_norms, target_of
from lbyl.runtime.attended import attended_positions
from lbyl.runtime.batches import join, thinned
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.memory import give_back, held_at_once, held_by_each
from lbyl.selection.filters import State
from lbyl.surgery.masking import norm_masks


@dataclass(frozen=True)
class SequentialResult:
    """The sequential solution: as solved on the probes, and with means corrected for real inputs."""

    on_probes: dict[str, Tensor]
    values: dict[str, Tensor]
    findings: Findings


@dataclass(frozen=True)
class NotApplicable:
    """Why consumers are not solved in turn; ``possible`` says whether the network itself allows it."""

    why: str
    possible: bool = True


def _takers(problem: LeastSquaresProblem, state: State) -> tuple[dict[str, Target], str]:
    """The consumers that can be solved in turn, by the names of their weights; or the reason why not to try it."""
    graph, selection, settings = problem.graph, problem.selection, problem.settings
    coupled = {p.weight.parameter for group in graph.groups if group.coupled for p in group.producers}
    if not any(isinstance(stage, Norm) for g in graph.groups for p in g.producers for stage in p.stages):
        return {}, "there is no batch norm"
    if any(consumer.experts for consumer in graph.consumers):
        return {}, "each expert of a mixture reads the tokens that its router gives it"
    if not any(target.consumer.weight in coupled for target in problem.found):
        return {}, "no consumer of a pruned group is in a residual connection"

    def solvable(target: Target) -> bool:
        once = target.consumer.calls == 1 and target.consumer.dim == 1
        return once and isinstance(empty_sums(target, selection, state, settings, 0)[0], PatchSums)

    takers = {target.consumer.weight: target for target in problem.found if solvable(target)}
    if not coupled & set(takers):
        return {}, "no consumer in a residual connection runs once and is solved by patch"
    # Layers between consumers lose no channels, but their inputs change.
    norms, cut = following_norms(graph), {target.consumer.weight for target in problem.found}
    for consumer in graph.consumers:
        if consumer.weight in cut:
            continue
        target = target_of(consumer, torch.zeros(len(consumer.columns), dtype=torch.bool), (), norms)
        if solvable(target):
            takers[consumer.weight] = target
    return takers, ""


def all_in_turn(problem: LeastSquaresProblem, state: State) -> bool:
    """Whether all consumers of dropped channels can be solved in turn."""
    takers, _ = _takers(problem, state)
    return bool(takers) and takers.keys() >= {target.consumer.weight for target in problem.found}


def _by_kind(probes: Probes) -> list[ExampleInputs]:
    """The batches joined into one for each kind of probe (dreams, images with structure), unless shapes differ."""
    if len({tuple(tensor.shape[1:] for tensor in batch.tensors()) for batch in probes.batches}) > 1:
        return list(probes.batches)
    recalibration_batches = [
        batch for index, batch in enumerate(probes.batches) if index in probes.recalibration_batches
    ]
    others = [batch for index, batch in enumerate(probes.batches) if index not in probes.recalibration_batches]
    return [join(kind) for kind in (others, recalibration_batches) if kind]


def solve_sequentially(
    problem: LeastSquaresProblem, probes: Probes, done: Findings, renorm: bool
) -> SequentialResult | NotApplicable:
    """Solve consumers in execution order, each with the inputs that it has after all earlier layers are cut.

    Layers that lose no channels are solved as well, because their inputs change. Consumers that can't be solved in this
    way keep their solutions in ``done``. With ``renorm``, batch norms are recalibrated during the pass. If the whole is
    not possible, the result says why.
    """
    state, selection, settings = done.state, problem.selection, problem.settings
    takers, why = _takers(problem, state)
    if not takers:
        return NotApplicable(why, possible=False)
    if norm_masks(selection):
        return NotApplicable("there are layer norms over pruned channels")
    most = held_at_once(settings.memory, 2 * held_by_each(problem.model, probes.batches[0]))
    # Batches of one kind are joined if parts of each batch would be too small for statistics.
    batches = thinned(probes.batches, most) or thinned(_by_kind(probes), most)
    if not batches:
        room = f"{settings.memory / 2**20:.0f} MiB of memory hold {most} in both networks"
        return NotApplicable(f"{room}, which are too few; LeastSquares(memory=...) allows more")
    if any(attended_positions(problem.model, batch) for batch in batches):
        return NotApplicable("an attention mask excludes positions, but statistics on the way would contain them")
    again = {target.bias for target in takers.values()}
    findings = Findings(state, {name: value for name, value in done.values.items() if name not in again})
    # Solved weights have their output dimension first, which is how consumers that are solved here store them as well.
    others = {target.consumer.weight for target in problem.found} - takers.keys()
    kept = as_stored(problem.found, {name: findings.values[name] for name in others & findings.values.keys()})
    turns = 0

    def solve_one(turn: ConsumerDue) -> None:
        nonlocal turns
        target = takers[turn.calls[0].weight]
        solve_patches(target, _sums(problem, state, target, turn), selection, settings, findings)
        give_back()
        turns += 1
        problem.report("solving in turn", turns, len(takers))

    try:
        walked = run_paired(
            problem.model,
            batches,
            takers,
            ChainMap(kept, findings.values),
            solve_one,
            batch_statistics=probes.batch_statistics,
            renorm=renorm,
            recall=problem.recall,
        )
    except (NotPairable, RuntimeError) as error:
        return NotApplicable(first_line(error))
    values = problem.stored(findings.values, state)
    if renorm:
        values = renormalize(state, values, walked.original, walked.cut)
    return SequentialResult(values, shifted(values, state, walked.missing), findings)


def _sums(problem: LeastSquaresProblem, state: State, target: Target, turn: ConsumerDue) -> PatchSums:
    """The sums over the calls of a consumer that is reached."""
    sums, recall = empty_sums(target, problem.selection, state, problem.settings, problem.seed)[0], problem.recall
    assert isinstance(sums, PatchSums)
    known = recall.get(f"{target.consumer.weight}#output")
    sums.output = list(known or ())
    bias = state[target.consumer.bias].detach() if target.consumer.bias else None
    weight, pairs, joined = target.weight(state), [*zip(turn.calls, turn.wanted, strict=True)], 1
    # Fewer and larger products. A target without the bias would be as large as any tensor of the network.
    if bias is None and sums.takes_all(turn.whole, weight, len(pairs)):
        pairs, joined = [(turn.whole, turn.whole_wanted)], len(pairs)
    for call, wanted in pairs:
        if bias is not None:
            wanted = wanted - (bias if call.op == "linear" else bias.reshape(-1, *[1] * (wanted.dim() - 2)))
        sums.add(call, weight, wanted, joined=joined, with_output=not known)
    if not known:
        recall.keep(f"{target.consumer.weight}#output", sums.output)
    return sums
