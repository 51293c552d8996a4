"""Readers solved one after the other, each on what the network gives it once all before it is cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lbyl.graph import Norm
from lbyl.moments import Probes
from lbyl.moments.accumulate import PatchSums
from lbyl.restore.least_squares.paired_forward import OutOfStep, Turn, walk_together
from lbyl.restore.least_squares.recalibrate import renormalize, shifted
from lbyl.restore.least_squares.solve import Findings, Problem, empty_sums, solve_patches
from lbyl.restore.least_squares.targets import Site, following_norms, site_of
from lbyl.runtime.batches import first_rows, join, thinned
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.memory import give_back, held_at_once, held_bytes
from lbyl.selection.filters import State
from lbyl.surgery.masking import kept_channels


@dataclass(frozen=True)
class Turned:
    """What solving one reader after the other comes to: on the probes, and with means as real inputs have them."""

    on_probes: dict[str, Tensor]
    values: dict[str, Tensor]
    ledger: Findings


@dataclass(frozen=True)
class Declined:
    """Why readers are not solved in turn, and whether they might have been: in this network there is what it takes."""

    why: str
    possible: bool = True


def _takers(problem: Problem, state: State) -> tuple[dict[str, Site], str]:
    """The readers that can be solved in turn, by the names of their weights; or why that is not to be tried."""
    graph, selection, settings = problem.graph, problem.selection, problem.settings
    coupled = {p.weight.parameter for group in graph.groups if group.coupled for p in group.producers}
    if not any(isinstance(stage, Norm) for g in graph.groups for p in g.producers for stage in p.stages):
        return {}, "there is no batch norm"
    if not any(site.reader.weight in coupled for site in problem.found):
        return {}, "no reader of a pruned group goes into a residual sum"

    def solvable(site: Site) -> bool:
        once = site.reader.calls == 1 and site.reader.dim == 1
        return once and isinstance(empty_sums(site, selection, state, settings, 0)[0], PatchSums)

    takers = {site.reader.weight: site for site in problem.found if solvable(site)}
    if not coupled & set(takers):
        return {}, "no reader that goes into a residual sum runs once and is solved by patch"
    # Layers in between lose no channels, but what they read has changed.
    norms, cut = following_norms(graph), {site.reader.weight for site in problem.found}
    for reader in graph.readers:
        if reader.weight in cut:
            continue
        site = site_of(reader, torch.zeros(len(reader.columns), dtype=torch.bool), (), norms)
        if solvable(site):
            takers[reader.weight] = site
    return takers, ""


def _by_kind(probes: Probes) -> list[ExampleInputs]:
    """All dreams, say, as one batch, and all that looks like real inputs as another; as they are if shapes differ."""
    if len({tuple(tensor.shape[1:] for tensor in batch.tensors()) for batch in probes.batches}) > 1:
        return list(probes.batches)
    lifelike = [batch for index, batch in enumerate(probes.batches) if index in probes.lifelike]
    others = [batch for index, batch in enumerate(probes.batches) if index not in probes.lifelike]
    return [join(kind) for kind in (others, lifelike) if kind]


def solve_in_turn(problem: Problem, probes: Probes, done: Findings, renorm: bool) -> Turned | Declined:
    """Solve readers in execution order, each on what the network gives it once all before it is cut.

    Layers that lose no channels are solved too, for what they read has changed. Readers that can't be solved so keep
    what they have in the ledger that is ``done``. With ``renorm`` batch-norm statistics move on the way. Returns why
    not where it can't be done.
    """
    state, selection, settings = done.state, problem.selection, problem.settings
    takers, why = _takers(problem, state)
    if not takers:
        return Declined(why, possible=False)
    if kept_channels(selection):
        return Declined("layer norms take their statistics over the channels that stay")
    most = held_at_once(settings.memory, 2 * held_bytes(problem.model, first_rows(probes.batches[0])))
    # Where parts of them would tell too little of their statistics, batches of a kind become one.
    batches = thinned(probes.batches, most) or thinned(_by_kind(probes), most)
    if not batches:
        room = f"{settings.memory / 2**20:.0f} MiB of memory hold {most} in both networks"
        return Declined(f"{room}, too few; LeastSquares(memory=...) gives more")
    again = {site.bias for site in takers.values()}
    ledger = Findings(state, {name: value for name, value in done.values.items() if name not in again})
    turns = 0

    def solve_one(turn: Turn) -> None:
        nonlocal turns
        site = takers[turn.calls[0].weight]
        sums = empty_sums(site, selection, state, settings, problem.seed)[0]
        assert isinstance(sums, PatchSums)
        bias = state[site.reader.bias].detach() if site.reader.bias else None
        for call, wanted in zip(turn.calls, turn.wanted, strict=True):
            if bias is not None:
                wanted = wanted - (bias if call.op == "linear" else bias.reshape(-1, *[1] * (wanted.dim() - 2)))
            sums.add(call, site.weight(state), wanted)
        solve_patches(site, sums, selection, settings, ledger)
        give_back()
        turns += 1
        problem.report("solving in turn", turns, len(takers))

    try:
        walked = walk_together(
            problem.model,
            batches,
            takers,
            ledger.values,
            solve_one,
            batch_statistics=probes.batch_statistics,
            renorm=renorm,
        )
    except (OutOfStep, RuntimeError) as error:
        return Declined((str(error).strip().splitlines() or [type(error).__name__])[0])
    if not walked.made_up:
        return Declined("no reader was seen to go into a sum")
    values = problem.stored(ledger.values, state)
    if renorm:
        values = renormalize(state, values, walked.original, walked.cut)
    return Turned(values, shifted(values, state, walked.missing), ledger)
