"""Restoration by least squares: probe the network, solve each reader, move the statistics, measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from lbyl.assessment import Assessment, outputs_error
from lbyl.filters import State
from lbyl.graph import Graph
from lbyl.inputs import ExampleInputs
from lbyl.kept import kept_channels
from lbyl.moments import ClosedFormSource, Probes, Progress
from lbyl.probing import OnRead, ReaderCall, run
from lbyl.regression import PatchSums, Reading, WholeSums
from lbyl.renorm import Look, Observer, look, pool, recenter, renormalize, transplant
from lbyl.restoration import Restoration, silenced
from lbyl.restorers.least_squares import LeastSquares
from lbyl.selection import Selection, generator_for
from lbyl.sites import Site, as_stored, masked, output_first, sites
from lbyl.solving import Findings, Sums, empty_sums, merged, solve_channels, solve_closed_form, solve_patches
from lbyl.surgery import tensors_of
from lbyl.turns import solve_in_turn


def fit(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    selection: Selection,
    settings: LeastSquares,
    seed: int,
    progress: Progress | None = None,
    readings: Mapping[str, Reading] | None = None,
) -> Restoration:
    """Restore every reader of a pruned group by least squares on moments.

    Args:
        model: the unpruned network in evaluation mode; nothing in it is changed.
        inputs: example inputs; probes follow their shapes and dtypes.
        graph: the channel graph.
        selection: which channels go.
        settings: the restorer.
        seed: for probes and sampled positions.
        progress: called as ``progress(stage, done, total)``.
        readings: moments of readers that were measured on these probes before, by the names of their weights.
    """
    state = tensors_of(model)
    found = sites(graph, selection)
    kept = kept_channels(selection)
    seconds: dict[str, float] = {}
    notes: list[str] = []
    ledger = Findings(state)
    with torch.no_grad():
        pruned = silenced(as_stored(found, {s.reader.weight: masked(s, state) for s in found}), selection, state)

    started = time.perf_counter()
    probes, looks = None, []
    norms = {site.reader.weight: site.norm for site in found if site.norm}
    if isinstance(settings.moments, ClosedFormSource):
        with torch.no_grad():
            solve_closed_form(selection, settings.moments, found, settings.strength(False), ledger)
        seconds["solve"] = time.perf_counter() - started
    else:
        probes = settings.moments.probes(model, inputs, generator_for(seed, "probes"), progress)
        seconds["probe"] = time.perf_counter() - started
        if probes.note:
            notes.append(probes.note)
        started = time.perf_counter()
        with torch.no_grad():
            looks = _measured(model, graph, selection, probes, found, settings, seed, ledger, progress, readings or {})
        seconds["solve"] = time.perf_counter() - started

    values = silenced(as_stored(found, ledger.values), selection, state)
    assessment = None
    started = time.perf_counter()
    if probes is not None:
        with torch.no_grad():
            looks = looks or [look(model, {}, batch, norms) for batch in probes.batches]
            judged = pool([looks[index] for index in probes.judged_in or range(len(looks))]).statistics
            world = judged if probes.batch_statistics else {}
            expected = run(model, probes.held_out, values=transplant({}, state, world))

            def error(candidate: Mapping[str, Tensor]) -> float:
                tensors = transplant(candidate, state, world)
                return outputs_error(expected, run(model, probes.held_out, values=tensors, kept=kept))

            before, after = error(pruned), error(values)
            said: list[str] = []
            unturned, renorm = values, False
            if settings.renorm and judged:
                chosen = probes.lifelike or range(len(looks))
                theirs = pool([looks[index] for index in chosen])
                ours = pool([look(model, values, probes.batches[index], norms, kept) for index in chosen])
                moved = renormalize(state, values, theirs.statistics, ours.statistics)
                lower = error(moved)
                renorm = lower < after
                if renorm:
                    unturned, values, after = moved, recenter(moved, state, theirs, ours, norms), lower
                else:
                    said.append(f"renorm left out: error on held-out probes {after:.3g} without, {lower:.3g} with")
            if settings.sequential or (settings.sequential is None and probes.matched):
                begun = time.perf_counter()
                turned = solve_in_turn(model, graph, selection, probes, found, settings, seed, ledger, renorm, progress)
                solving = time.perf_counter() - begun
                # Counted with the other solves, not as renorm.
                seconds["solve"] += solving
                started += solving
                if isinstance(turned, str):
                    if settings.sequential:
                        said.append(f"readers not solved in turn: {turned}")
                else:
                    halfway = _between(state, unturned, turned.on_probes, 0.5)
                    errors = {
                        "all at once": after,
                        "halfway between": error(halfway),
                        "in turn": error(turned.on_probes),
                    }
                    if settings.sequential:
                        errors = {"in turn": errors["in turn"]}
                    way = min(errors, key=lambda each: errors[each])
                    figures = ", ".join(f"{found:.3g} {each}" for each, found in errors.items())
                    said.append(f"readers solved {way}: error on held-out probes {figures}")
                    if way != "all at once":
                        whole = way == "in turn"
                        values = turned.values if whole else _between(state, values, turned.values, 0.5)
                        after, ledger = errors[way], merged(ledger, turned.ledger)
            notes += said
            if after > before:
                # Too few probes for the size of the layers: what was learned from them does not carry over.
                values, after, note = _less(values, pruned, state, before, after, error)
                notes.append(note)
        assessment = Assessment(before, after)
        seconds["renorm"] = time.perf_counter() - started

    rows = (ledger.row(number, choice) for number, choice in enumerate(selection.choices))
    return Restoration(values, tuple(rows), assessment, tuple(notes), seconds)


def _between(
    state: State, first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """A part of the way from one set of values to another; what one of them leaves out is as it was."""

    def of(values: Mapping[str, Tensor], name: str) -> Tensor:
        return values.get(name, state[name].detach())

    return {name: torch.lerp(of(first, name), of(second, name), share) for name in {**first, **second}}


def _less(
    values: Mapping[str, Tensor],
    pruned: Mapping[str, Tensor],
    state: State,
    before: float,
    after: float,
    error: Callable[[Mapping[str, Tensor]], float],
) -> tuple[dict[str, Tensor], float, str]:
    """A part of the way from plain pruning to a restoration that made the held-out error larger, or none of it."""
    for share in (0.5, 0.25):
        part = _between(state, pruned, values, share)
        if (found := error(part)) <= before:
            return part, found, f"only {share:.0%} of the restoration kept: all of it raised the held-out error"
    note = f"restoration left out: error on held-out probes {before:.3g} without, {after:.3g} with; give more probes"
    return dict(pruned), before, note


def _measured(
    model: nn.Module,
    graph: Graph,
    selection: Selection,
    probes: Probes,
    found: tuple[Site, ...],
    settings: LeastSquares,
    seed: int,
    ledger: Findings,
    progress: Progress | None,
    readings: Mapping[str, Reading],
) -> list[Look]:
    """Collect moments and solve, as many readers at a time as the budget allows, in execution order.

    Readers whose moments are known are solved with these. Returns what else was seen of the unpruned network,
    batch by batch, if it was run with batch statistics: nothing needs to be run again for renorm.
    """
    waiting: list[Site] = []
    for site in found:
        reading = readings.get(site.reader.weight)
        sums = empty_sums(site, selection, ledger.state, settings, seed)[0] if reading else None
        if reading is None or not isinstance(sums, PatchSums):
            waiting.append(site)
            continue
        kernels = site.weight(ledger.state).chunk(site.reader.blocks)
        sums.output = list(reading.output)
        pairs = zip(kernels, sums.columns.keep, sums.columns.drop, strict=True)
        sums.blocks = [reading.part(number, kernel, k, d) for number, (kernel, k, d) in enumerate(pairs)]
        solve_patches(site, sums, selection, settings, ledger)
    norms = {site.reader.weight for site in found if site.norm}
    # Readers of channels that a layer norm is taken over are fed something else once these are cut.
    kept, readers = kept_channels(selection), frozenset(reader.weight for reader in graph.readers)
    looks: list[Look] = []
    while waiting:
        taken: dict[str, tuple[Site, Sums]] = {}
        cost = 0
        while waiting:
            site = waiting[0]
            sums, bytes_needed, note = empty_sums(site, selection, ledger.state, settings, seed)
            if taken and cost + bytes_needed > settings.budget:
                break
            cost += bytes_needed
            taken[site.reader.weight] = (site, sums)
            waiting.pop(0)
            if note:
                ledger.note(site.choices, note)

        watch = probes.batch_statistics and not looks
        # The first pass is looked at to its end; the others stop where nothing more is wanted.
        last = list(taken)[-1] if graph.readers[-1].weight not in taken and not watch else None
        for batch in probes.batches:
            observer = Observer(norms) if watch else None
            run(
                model,
                batch,
                on_read=_collecting(taken, ledger.state, observer),
                on_norm=observer.on_norm if observer else None,
                batch_statistics=probes.batch_statistics,
                stop_after=last,
                kept=kept,
                foresee=readers,
            )
            if observer:
                looks.append(observer.look())
        for site, sums in taken.values():
            if isinstance(sums, PatchSums):
                solve_patches(site, sums, selection, settings, ledger)
            else:
                solve_channels(site, sums, selection, settings, ledger)
        if progress:
            progress("solving", len(found) - len(waiting), len(found))
    return looks


def _collecting(taken: Mapping[str, tuple[Site, Sums]], state: State, observer: Observer | None) -> OnRead:
    """What adds to the sums of readers what they are fed."""

    def on_read(call: ReaderCall) -> None:
        if observer:
            observer.on_read(call)
        if call.weight in taken:
            site, sums = taken[call.weight]
            for item in [sums] if isinstance(sums, PatchSums) else [entry[2] for entry in sums]:
                item.add(call, site.weight(state))

    return on_read


def read(
    model: nn.Module,
    graph: Graph,
    groups: Collection[int],
    probes: Probes,
    settings: LeastSquares,
    seed: int,
    limit: int,
) -> dict[str, Reading]:
    """Moments of all that the readers of some groups read, for `fit` to take parts of.

    Args:
        model: the unpruned network in evaluation mode; nothing in it is changed.
        graph: its channel graph.
        groups: indices of the groups that may lose channels.
        probes: what it is run on.
        settings: the restorer; readers that it solves by "mix" are left out.
        seed: for sampled positions.
        limit: bytes that all of them may take; readers that come later in the network are then left to `fit`, as are
            those of channels that a layer norm is taken over.
    """
    state = tensors_of(model)
    sums: dict[str, WholeSums] = {}
    weights: dict[str, Tensor] = {}
    for reader in graph.readers if settings.solve == "patch" else ():
        read_groups = {group for group, _ in reader.columns if group in groups}
        # Behind a layer norm, what is read depends on which channels stay.
        if reader.op == "conv3d" or not read_groups or any(graph.groups[index].layer_norms for index in read_groups):
            continue
        weight = output_first(reader, state)
        size = reader.blocks * (weight[0].numel()) ** 2 * 8
        if size > min(limit, settings.budget):
            continue
        limit -= size
        generator = generator_for(seed, f"{reader.weight}#positions")
        sums[reader.weight] = WholeSums(reader.blocks, settings.positions, generator)
        weights[reader.weight] = weight

    def on_read(call: ReaderCall) -> None:
        if call.weight in sums:
            sums[call.weight].add(call, weights[call.weight])

    with torch.no_grad():
        for batch in probes.batches if sums else ():
            run(model, batch, on_read=on_read, batch_statistics=probes.batch_statistics)
    return {name: reading for name, item in sums.items() if (reading := item.reading())}
