"""Restoration by least squares: probe the network, solve each reader, move the statistics, measure."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lbyl.activations import ACTIVATIONS
from lbyl.assessment import Assessment, outputs_error
from lbyl.filters import State, describe, paper_form_applies, reader_energy, seats
from lbyl.graph import NOT_OURS, Graph, Norm, Reader, Slot
from lbyl.inputs import ExampleInputs
from lbyl.kept import kept_channels
from lbyl.lockstep import OutOfStep, Turn, walk_together
from lbyl.moments import ChannelMoments, ClosedFormSource, Probes, Progress
from lbyl.probing import OnRead, ReaderCall, run
from lbyl.regression import ChannelSums, Columns, Moments, PatchSums, Prior, Reading, Solution, WholeSums, solve
from lbyl.renorm import Look, Observer, look, pool, recenter, renormalize, transplant
from lbyl.restoration import Restoration, Restored, fold, silenced
from lbyl.restorers.base import Delivery, nothing_delivered
from lbyl.restorers.least_squares import LeastSquares
from lbyl.selection import Choice, Selection, generator_for
from lbyl.surgery import tensors_of


def _output_first(reader: Reader, state: State) -> Tensor:
    weight = state[reader.weight].detach()
    return weight.transpose(0, 1) if reader.dim == 0 else weight


@dataclass(frozen=True)
class Site:
    """A reader that is solved for: mostly one that loses input channels.

    Attributes:
        reader: the layer.
        dropped: for every input channel, whether it goes.
        bias: where a constant can be added to its output: its bias, or the running mean of the batch norm
            that follows it (``sign`` is then -1, for the mean is subtracted); None where there is neither.
        choices: the selection's indices of the groups that it reads and that lose channels.
        norm: the running mean of the batch norm that follows it, if one does.
    """

    reader: Reader
    dropped: Tensor
    bias: str | None
    sign: int
    choices: tuple[int, ...]
    norm: str | None = None

    def weight(self, state: State) -> Tensor:
        """The reader's weight, output first, however the layer stores it: a view."""
        return _output_first(self.reader, state)


@dataclass
class _Errors:
    """Powers of the reader's output: all of it, what pruning loses, what is still lost after restoration."""

    total: float = 0.0
    before: float = 0.0
    after: float = 0.0


@dataclass
class _Ledger:
    """What the solves find out, reader by reader.

    Attributes:
        state: the unpruned network's tensors.
        values: new ones, output first.
        errors: powers lost and left, for each choice.
        notes: what the user should know of each choice.
    """

    state: State
    values: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[int, _Errors] = field(default_factory=lambda: defaultdict(_Errors))
    notes: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))

    def note(self, numbers: Iterable[int], text: str) -> None:
        """Tell something of some choices."""
        for number in numbers:
            self.notes[number].append(text)

    def unseen(self, site: Site, numbers: Iterable[int]) -> None:
        """No probe came by the reader."""
        self.note(numbers, f"{site.reader.layer} was not seen in the forward pass: pruned without restoration")

    def singular(self, site: Site, numbers: Iterable[int]) -> None:
        """The moments could not be factored."""
        self.note(numbers, f"{site.reader.layer}: singular moments, solved by pseudo-inverse")

    def absorb(self, site: Site, shift: Tensor) -> None:
        """Add a constant to the reader's output, where one can be added."""
        if site.bias is None:
            return
        old = self.values.get(site.bias, self.state[site.bias].detach())
        self.values[site.bias] = (old.double() + site.sign * shift).to(old.dtype)

    def add(self, number: int, total: float, before: float, after: float) -> None:
        """Count a reader's powers towards a choice."""
        errors = self.errors[number]
        errors.total += total
        errors.before += before
        errors.after += after

    def row(self, number: int, choice: Choice) -> Restored:
        """What restoration did for one choice, for the report."""
        power = self.errors[number]
        relative = None
        if power.total:
            scale = max(power.total, 1e-300)
            relative = (power.before / scale) ** 0.5, (power.after / scale) ** 0.5
        return Restored(choice.group.name, None, 0.0, "; ".join(dict.fromkeys(self.notes[number])), relative)


def sites(graph: Graph, selection: Selection) -> tuple[Site, ...]:
    """Every reader that loses input channels, in execution order."""
    index_of = {group.name: index for index, group in enumerate(graph.groups)}
    dropped_of = {index_of[choice.group.name]: set(choice.drop) for choice in selection.choices}
    order = {index_of[choice.group.name]: number for number, choice in enumerate(selection.choices)}
    norms = _norms(graph)
    found = []
    for reader in graph.readers:
        dropped = torch.tensor([channel in dropped_of.get(group, ()) for group, channel in reader.columns])
        if bool(dropped.any()):
            groups = dict.fromkeys(group for group, _ in reader.columns if group in order)
            found.append(_site(reader, dropped, tuple(order[group] for group in groups), norms))
    return tuple(found)


def _norms(graph: Graph) -> dict[str, Norm]:
    """The batch norm right behind a layer, by the name of the layer's weight."""
    first = {p.weight.parameter: p.stages[0] for group in graph.groups for p in group.producers if p.stages}
    return {weight: stage for weight, stage in first.items() if isinstance(stage, Norm)}


def _site(reader: Reader, dropped: Tensor, choices: tuple[int, ...], norms: Mapping[str, Norm]) -> Site:
    norm = norms.get(reader.weight)
    following = norm.mean if norm else None
    bias, sign = (reader.bias, 1) if reader.bias else (following, -1 if following else 1)
    return Site(reader, dropped, bias, sign, choices, following)


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
    ledger = _Ledger(state)
    with torch.no_grad():
        pruned = silenced(_stored(found, {s.reader.weight: masked(s, state) for s in found}), selection, state)

    started = time.perf_counter()
    probes, looks = None, []
    norms = {site.reader.weight: site.norm for site in found if site.norm}
    if isinstance(settings.moments, ClosedFormSource):
        with torch.no_grad():
            _closed_form(selection, settings.moments, found, settings.strength(False), ledger)
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

    values = silenced(_stored(found, ledger.values), selection, state)
    assessment = None
    started = time.perf_counter()
    if probes is not None:
        with torch.no_grad():
            looks = looks or [look(model, {}, batch, norms) for batch in probes.batches]
            original = pool(looks).statistics
            world = original if probes.batch_statistics else {}
            expected = run(model, probes.held_out, values=transplant({}, state, world))

            def error(candidate: Mapping[str, Tensor]) -> float:
                tensors = transplant(candidate, state, world)
                return outputs_error(expected, run(model, probes.held_out, values=tensors, kept=kept))

            before, after = error(pruned), error(values)
            said: list[str] = []
            renorm = False
            if settings.renorm and original:
                chosen = probes.lifelike or range(len(looks))
                theirs = pool([looks[index] for index in chosen])
                ours = pool([look(model, values, probes.batches[index], norms, kept) for index in chosen])
                moved = renormalize(state, values, theirs.statistics, ours.statistics)
                lower = error(moved)
                renorm = lower < after
                if renorm:
                    values, after = recenter(moved, state, theirs, ours, norms), lower
                else:
                    said.append(f"renorm left out: error on held-out probes {after:.3g} without, {lower:.3g} with")
            if settings.sequential or (settings.sequential is None and probes.matched):
                begun = time.perf_counter()
                turned = _in_turn(model, graph, selection, probes, found, settings, seed, ledger, renorm, progress)
                solving = time.perf_counter() - begun
                # Counted with the other solves, not as renorm.
                seconds["solve"] += solving
                started += solving
                if isinstance(turned, str):
                    if settings.sequential:
                        said.append(f"readers not solved in turn: {turned}")
                else:
                    other = error(turned.on_probes)
                    figures = f"error on held-out probes {other:.3g} in turn, {after:.3g} all at once"
                    if settings.sequential or other < after:
                        values, after, ledger = turned.values, other, _merged(ledger, turned.ledger)
                        said = [f"readers solved in turn, to make up for what residual sums lose: {figures}"]
                    else:
                        said.append(f"readers solved all at once: {figures}")
            notes += said
            if after > before:
                # Too few probes for the size of the layers: what was learned from them does not carry over.
                values, after, note = _less(values, pruned, state, before, after, error)
                notes.append(note)
        assessment = Assessment(before, after)
        seconds["renorm"] = time.perf_counter() - started

    rows = (ledger.row(number, choice) for number, choice in enumerate(selection.choices))
    return Restoration(values, tuple(rows), assessment, tuple(notes), seconds)


def _merged(ledger: _Ledger, later: _Ledger) -> _Ledger:
    """What the later solves found out, and the earlier ones where there was no later one."""
    notes = {number: [*ledger.notes[number], *later.notes[number]] for number in {*ledger.notes, *later.notes}}
    errors = {**ledger.errors, **later.errors}
    return _Ledger(ledger.state, later.values, defaultdict(_Errors, errors), defaultdict(list, notes))


def _stored(found: tuple[Site, ...], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values as the layers store them, where the solves had the output first."""
    input_first = {site.reader.weight for site in found if site.reader.dim == 0}
    return {name: v.transpose(0, 1).contiguous() if name in input_first else v for name, v in values.items()}


def _less(
    values: Mapping[str, Tensor],
    pruned: Mapping[str, Tensor],
    state: State,
    before: float,
    after: float,
    error: Callable[[Mapping[str, Tensor]], float],
) -> tuple[dict[str, Tensor], float, str]:
    """A part of the way from plain pruning to a restoration that made the held-out error larger, or none of it."""
    start = {name: pruned.get(name, state[name].detach()) for name in values}
    for share in (0.5, 0.25):
        part = {name: torch.lerp(start[name], value, share) for name, value in values.items()}
        if (found := error(part)) <= before:
            return part, found, f"only {share:.0%} of the restoration kept: all of it raised the held-out error"
    note = f"restoration left out: error on held-out probes {before:.3g} without, {after:.3g} with; give more probes"
    return dict(pruned), before, note


def masked(site: Site, state: State) -> Tensor:
    """The reader's weight with its dropped columns zero: plain pruning."""
    weight = site.weight(state).clone()
    rows = len(weight) // site.reader.blocks
    for number, gone in enumerate(site.dropped.chunk(site.reader.blocks)):
        weight[number * rows : (number + 1) * rows][:, gone.to(weight.device)] = 0
    return weight


# -- from the running network --------------------------------------------------------------------------


def _measured(
    model: nn.Module,
    graph: Graph,
    selection: Selection,
    probes: Probes,
    found: tuple[Site, ...],
    settings: LeastSquares,
    seed: int,
    ledger: _Ledger,
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
        sums = _sums(site, selection, ledger.state, settings, seed)[0] if reading else None
        if reading is None or not isinstance(sums, PatchSums):
            waiting.append(site)
            continue
        kernels = site.weight(ledger.state).chunk(site.reader.blocks)
        sums.output = list(reading.output)
        pairs = zip(kernels, sums.columns.keep, sums.columns.drop, strict=True)
        sums.blocks = [reading.part(number, kernel, k, d) for number, (kernel, k, d) in enumerate(pairs)]
        _solve_patches(site, sums, selection, settings, ledger)
    norms = {site.reader.weight for site in found if site.norm}
    # Readers of channels that a layer norm is taken over are fed something else once these are cut.
    kept, readers = kept_channels(selection), frozenset(reader.weight for reader in graph.readers)
    looks: list[Look] = []
    while waiting:
        taken: dict[str, tuple[Site, _Sums]] = {}
        cost = 0
        while waiting:
            site = waiting[0]
            sums, bytes_needed, note = _sums(site, selection, ledger.state, settings, seed)
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
                _solve_patches(site, sums, selection, settings, ledger)
            else:
                _solve_channels(site, sums, selection, settings, ledger)
        if progress:
            progress("solving", len(found) - len(waiting), len(found))
    return looks


def _collecting(taken: Mapping[str, tuple[Site, _Sums]], state: State, observer: Observer | None) -> OnRead:
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
        weight = _output_first(reader, state)
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


_Sums = PatchSums | list[tuple[int, Slot, ChannelSums]]


def _sums(site: Site, selection: Selection, state: State, settings: LeastSquares, seed: int) -> tuple[_Sums, int, str]:
    """Empty accumulators for one reader, their size in bytes, and a note when "patch" had to give way."""
    reader = site.reader
    weight = site.weight(state)
    generator = generator_for(seed, f"{reader.weight}#positions")
    taps = weight[0, 0].numel() if weight.dim() > 2 else 1
    keep = [torch.nonzero(~gone).flatten() for gone in site.dropped.chunk(reader.blocks)]
    drop = [torch.nonzero(gone).flatten() for gone in site.dropped.chunk(reader.blocks)]
    size = sum((len(k) * taps) ** 2 * 8 for k in keep)
    note = ""
    if settings.solve == "patch" and reader.op != "conv3d":
        if size <= settings.budget:
            device = weight.device
            columns = Columns(tuple(k.to(device) for k in keep), tuple(d.to(device) for d in drop))
            return PatchSums(columns, settings.positions, generator), size, ""
        note = f"{reader.layer}: solved by mix, patch moments would take {size / 2**20:.0f} MiB"
    entries = []
    for number in site.choices:
        choice = selection.choices[number]
        slot = next(slot for slot in choice.group.readers if slot.parameter == reader.weight)
        index = seats(slot, choice.group.width).to(weight.device)
        entries.append((number, slot, ChannelSums(index, settings.positions, generator)))
    return entries, sum(selection.choices[n].group.width ** 2 * 8 for n, *_ in entries), note


def _solve_patches(
    site: Site,
    sums: PatchSums,
    selection: Selection,
    settings: LeastSquares,
    ledger: _Ledger,
) -> None:
    weight = masked(site, ledger.state)
    ledger.values[site.reader.weight] = weight
    if not sums.blocks:
        ledger.unseen(site, site.choices)
        return
    rows = len(weight) // site.reader.blocks
    shift = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    expected = None
    if len(site.choices) == 1 and all(group != NOT_OURS for group, _ in site.reader.columns):
        choice = selection.choices[site.choices[0]]
        slot = next(slot for slot in choice.group.readers if slot.parameter == site.reader.weight)
        if NOT_OURS not in slot.channels:
            gram, trust = expected_moments(choice, ledger.state, settings)
            expected = None if gram is None else (_by_column(gram, slot, choice.group.width), trust)
    solutions: list[Solution] = []
    for number, (keep, drop, moments) in enumerate(zip(sums.columns.keep, sums.columns.drop, sums.blocks, strict=True)):
        if not bool(moments.rr.any()):
            continue  # nothing is missing here
        out = slice(number * rows, (number + 1) * rows)
        prior = _patch_prior(site, keep, drop, number, site.weight(ledger.state)[out], expected)
        ridge = settings.strength(prior is not None)
        solution = solve(moments, ridge, centered=site.bias is not None, prior=prior)
        added = solution.coefficients.T.reshape(rows, len(keep), *weight.shape[2:])
        weight[out][:, keep] += added.to(weight.dtype)
        shift[out] = solution.shift
        solutions.append(solution)
        if solution.singular:
            ledger.singular(site, site.choices)
    ledger.absorb(site, shift)
    count, total, square = sums.output
    power = float((square / count - (total / count).square()).sum())
    before, after = (float(sum(getattr(s, side).sum() for s in solutions)) for side in ("before", "after"))
    for choice in site.choices:
        ledger.add(choice, power, before, after)


def _by_column(gram: Tensor, slot: Slot, width: int) -> Tensor:
    """Channel moments spread over a reader's input columns; different places of a channel are unrelated."""
    channels = torch.tensor(slot.channels)
    place = torch.empty_like(channels)
    for number, column in enumerate(seats(slot, width).T):
        place[column[column >= 0]] = number
    return gram[channels][:, channels] * (place[:, None] == place[None, :])


def _patch_prior(
    site: Site, keep: Tensor, drop: Tensor, number: int, kernel: Tensor, expected: tuple[Tensor, float] | None
) -> Prior | None:
    """Expected patch moments of one block of a reader: taps are unrelated, channels as the weights say."""
    if expected is None:
        return None
    first = number * len(site.dropped) // site.reader.blocks
    gram = expected[0].to(kernel.device)
    kept, between = gram[first + keep][:, first + keep], gram[first + keep][:, first + drop]
    taps = kernel[0, 0].numel() if kernel.dim() > 2 else 1
    gone = kernel[:, drop].reshape(len(kernel), len(drop), taps).double()
    pp = torch.kron(kept, torch.eye(taps, dtype=kept.dtype, device=kept.device))
    pr = torch.einsum("kd,odt->kto", between, gone).reshape(-1, len(kernel))
    return Prior(pp, pr, expected[1])


def _solve_channels(
    site: Site,
    entries: list[tuple[int, Slot, ChannelSums]],
    selection: Selection,
    settings: LeastSquares,
    ledger: _Ledger,
) -> None:
    ledger.values[site.reader.weight] = masked(site, ledger.state)
    for number, slot, sums in entries:
        if sums.moments is None or sums.columns is None:
            ledger.unseen(site, [number])
            continue
        n = sums.moments.count
        mean = sums.moments.p / n
        centered = site.bias is not None
        power = sums.moments.pp / n - (torch.outer(mean, mean) if centered else 0)
        moments = ChannelMoments(mean.cpu(), power.cpu())
        columns = (sums.columns / n).cpu()
        expected, trust = expected_moments(selection.choices[number], ledger.state, settings)
        ridge = settings.strength(expected is not None)
        prior = None if expected is None else (expected, trust)
        _deliver(site, number, slot, selection, moments, columns, ridge, ledger, prior)


# -- one reader after the other ------------------------------------------------------------------------


@dataclass(frozen=True)
class _InTurn:
    """What solving one reader after the other comes to: on the probes, and with means as real inputs have them."""

    on_probes: dict[str, Tensor]
    values: dict[str, Tensor]
    ledger: _Ledger


def _takers(
    graph: Graph, selection: Selection, found: tuple[Site, ...], settings: LeastSquares, state: State
) -> tuple[dict[str, Site], str]:
    """The readers that can be solved in turn, by the names of their weights; or why that is not to be tried."""
    coupled = {p.weight.parameter for group in graph.groups if group.coupled for p in group.producers}
    if not any(isinstance(stage, Norm) for g in graph.groups for p in g.producers for stage in p.stages):
        return {}, "there is no batch norm"
    if not any(site.reader.weight in coupled for site in found):
        return {}, "no reader of a pruned group goes into a residual sum"

    def solvable(site: Site) -> bool:
        once = site.reader.calls == 1 and site.reader.dim == 1
        return once and isinstance(_sums(site, selection, state, settings, 0)[0], PatchSums)

    takers = {site.reader.weight: site for site in found if solvable(site)}
    if not coupled & set(takers):
        return {}, "no reader that goes into a residual sum runs once and is solved by patch"
    # Layers in between lose no channels, but what they read has changed.
    norms = _norms(graph)
    for reader in graph.readers:
        site = _site(reader, torch.zeros(len(reader.columns), dtype=torch.bool), (), norms)
        if reader.weight not in {s.reader.weight for s in found} and solvable(site):
            takers[reader.weight] = site
    return takers, ""


def _in_turn(
    model: nn.Module,
    graph: Graph,
    selection: Selection,
    probes: Probes,
    found: tuple[Site, ...],
    settings: LeastSquares,
    seed: int,
    done: _Ledger,
    renorm: bool,
    progress: Progress | None,
) -> _InTurn | str:
    """Solve readers in execution order, each on what the network gives it once all before it is cut.

    Layers that lose no channels are solved too, for what they read has changed. Readers that can't be solved so keep
    what they have in the ledger that is ``done``. With ``renorm`` batch-norm statistics move on the way. Returns why
    not where it can't be done.
    """
    state = done.state
    takers, why = _takers(graph, selection, found, settings, state)
    if not takers:
        return why
    if kept_channels(selection):
        return "layer norms take their statistics over the channels that stay"
    if (size := _joint_bytes(model, probes.batches)) > _JOINT:
        return f"the probes' activations would take {size / 2**30:.1f} GiB at once, more than {_JOINT / 2**30:g}"
    again = {site.bias for site in takers.values()}
    ledger = _Ledger(state, {name: value for name, value in done.values.items() if name not in again})
    turns = 0

    def solve_one(turn: Turn) -> None:
        nonlocal turns
        site = takers[turn.calls[0].weight]
        sums = _sums(site, selection, state, settings, seed)[0]
        assert isinstance(sums, PatchSums)
        bias = state[site.reader.bias].detach() if site.reader.bias else None
        for call, wanted in zip(turn.calls, turn.wanted, strict=True):
            if bias is not None:
                wanted = wanted - (bias if call.op == "linear" else bias.reshape(-1, *[1] * (wanted.dim() - 2)))
            sums.add(call, site.weight(state), wanted)
        _solve_patches(site, sums, selection, settings, ledger)
        turns += 1
        if progress:
            progress("solving in turn", turns, len(takers))

    try:
        walked = walk_together(
            model,
            probes.batches,
            takers,
            ledger.values,
            solve_one,
            batch_statistics=probes.batch_statistics,
            renorm=renorm,
        )
    except (OutOfStep, RuntimeError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not walked.made_up:
        return "no reader was seen to go into a sum"
    values = silenced(_stored(found, ledger.values), selection, state)
    if renorm:
        values = renormalize(state, values, walked.original, walked.cut)
    return _InTurn(values, {**values, **_shifted(values, state, walked.missing)}, ledger)


def _shifted(values: Mapping[str, Tensor], state: State, shifts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    now = {name: values.get(name, state[name].detach()) for name in shifts}
    return {name: (now[name].double() + shift).to(now[name].dtype) for name, shift in shifts.items()}


_JOINT = 4 * 2**30
"""Bytes of activations that solving in turn may hold: all of its probes, in both networks, at one layer."""


def _joint_bytes(model: nn.Module, batches: Sequence[ExampleInputs]) -> int:
    """About what one forward pass of both networks over all probes holds at its largest layer."""
    largest = 0

    def on_read(call: ReaderCall) -> None:
        nonlocal largest
        # The input, the output, and the output normalized.
        largest = max(largest, (call.x.numel() + 2 * call.out.numel()) * call.x.element_size())

    run(model, batches[0].map(lambda t: t[:1]), on_read=on_read)
    return 2 * sum(len(batch.tensors()[0]) for batch in batches) * largest


# -- from the weights alone ----------------------------------------------------------------------------


def _closed_form(
    selection: Selection,
    source: ClosedFormSource,
    found: tuple[Site, ...],
    ridge: float,
    ledger: _Ledger,
) -> None:
    made: dict[int, ChannelMoments | str] = {}
    for number, choice in enumerate(selection.choices):
        obstacle = paper_form_applies(choice.group, ledger.state)
        if obstacle:
            made[number] = f"pruned without restoration: the weights-only form does not apply, {obstacle}"
            ledger.note([number], str(made[number]))
            continue
        activation = next((step.op for step in choice.group.steps if step.op in ACTIVATIONS), None)
        kernel = tuple(ledger.state[choice.group.producers[0].weight.parameter].shape[2:])
        made[number] = source.moments(describe(choice.group, ledger.state), kernel, activation)
    for site in found:
        ledger.values[site.reader.weight] = masked(site, ledger.state)
        for number in site.choices:
            moments = made[number]
            if isinstance(moments, str):
                continue
            for slot in selection.choices[number].group.readers:
                if slot.parameter != site.reader.weight:
                    continue
                channels = torch.tensor(slot.channels)
                columns = torch.where(channels == NOT_OURS, 0.0, moments.mean[channels.clamp_min(0)])
                _deliver(site, number, slot, selection, moments, columns, ridge, ledger)


def _deliver(
    site: Site,
    number: int,
    slot: Slot,
    selection: Selection,
    moments: ChannelMoments,
    columns: Tensor,
    ridge: float,
    ledger: _Ledger,
    prior: tuple[Tensor, float] | None = None,
) -> None:
    """Solve for S on channel moments, fold it into the reader, and keep the mean of its output."""
    choice = selection.choices[number]
    keep, drop = choice.tensors()
    delivery, resid, singular = deliver_from_moments(choice, moments.covariance, ridge, prior)
    source = site.weight(ledger.state)
    old = ledger.values[slot.parameter].clone()
    new = fold(ledger.values[slot.parameter], source, slot, choice.group.width, keep, drop, delivery)
    ledger.values[slot.parameter] = new
    if singular:
        ledger.singular(site, [number])
    # What the dropped columns gave on average, less what the restored ones now give in their stead.
    rows, per_block = len(source) // slot.blocks, len(slot.channels) // slot.blocks
    ours = torch.tensor(slot.channels) != NOT_OURS
    gone = (site.dropped & ours).to(source.device)
    shift = torch.zeros(len(source), dtype=torch.float64, device=source.device)
    means = columns.to(source.device)
    for index in range(slot.blocks):
        out, inside = (
            slice(index * rows, (index + 1) * rows),
            slice(index * per_block, (index + 1) * per_block),
        )
        change = (new - old)[out].double().flatten(2).sum(2) if source.dim() > 2 else (new - old)[out].double()
        full = source[out].double().flatten(2).sum(2) if source.dim() > 2 else source[out].double()
        shift[out] = (full * gone[inside]) @ means[inside] - change @ means[inside]
    ledger.absorb(site, shift)
    # Channels count by the energy that the reader gives them; correlations between them are left out.
    energy = reader_energy(slot, source, choice.group.width)
    variance = moments.covariance.diagonal()
    ledger.add(
        number,
        float((energy * variance).sum()),
        float((energy * variance)[drop].sum()),
        float((energy[drop] * resid).sum()),
    )


def expected_moments(choice: Choice, state: State, settings: LeastSquares) -> tuple[Tensor | None, float]:
    """What the weights alone say about the channels' covariance, and how far to trust it; None for not at all."""
    trust = settings.prior
    if trust is None:
        trust = 0.0 if any(producer.normalized for producer in choice.group.producers) else 0.5
    if trust == 0 or paper_form_applies(choice.group, state):
        return None, 0.0
    filters = describe(choice.group, state).weight
    filters = filters - filters.mean(1, keepdim=True)
    return filters @ filters.T, trust


def deliver_from_moments(
    choice: Choice, covariance: Tensor, ridge: float, prior: tuple[Tensor, float] | None = None
) -> tuple[Delivery, Tensor, bool]:
    """S for a whole group, block by block; with the variance of each dropped channel that is left over."""
    keep, drop = choice.tensors()
    labels = torch.tensor(choice.group.blocks)
    delivery = nothing_delivered(len(keep), len(drop))
    left = torch.zeros(len(drop), dtype=torch.float64)
    singular = False
    for label in torch.unique(labels):
        k, d = torch.nonzero(labels[keep] == label).flatten(), torch.nonzero(labels[drop] == label).flatten()
        inside_k, inside_d = keep[k], drop[d]
        zeros = torch.zeros(len(k), dtype=torch.float64), torch.zeros(len(d), dtype=torch.float64)
        block = Moments(
            1,
            zeros[0],
            zeros[1],
            covariance[inside_k][:, inside_k],
            covariance[inside_k][:, inside_d],
            covariance.diagonal()[inside_d],
        )
        expected = None
        if prior is not None:
            expected = Prior(prior[0][inside_k][:, inside_k], prior[0][inside_k][:, inside_d], prior[1])
        solution = solve(block, ridge, centered=False, prior=expected)
        delivery.matrix[k[:, None], d[None, :]] = solution.coefficients
        left[d] = solution.after
        singular = singular or solution.singular
    return delivery, left, singular
