"""Solves one consumer from its moments, by patch or by mix, and collects the results."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lbyl.graph import NOT_OURS, Graph, Slot
from lbyl.moments import ChannelMoments, ClosedFormSource
from lbyl.moments.accumulate import UNFOLDED, ChannelSums, Columns, Moments, PatchSums
from lbyl.restore.base import Restored
from lbyl.restore.closed_form import activation_of
from lbyl.restore.least_squares.recall import Recall
from lbyl.restore.least_squares.settings import Settings
from lbyl.restore.ridge import Prior, Solution, check_finite, solve
from lbyl.restore.targets import Target, as_stored, masked, on_average
from lbyl.runtime.progress import Progress
from lbyl.runtime.seeding import generator_for
from lbyl.selection.filters import State, consumer_energy, describe, paper_form_applies, seats
from lbyl.selection.select import Choice, Selection
from lbyl.surgery.masking import Delivery, empty_delivery, fold, with_masks


@dataclass(frozen=True)
class LeastSquaresProblem:
    """One restoration by least squares.

    Attributes:
        model: the unpruned network in evaluation mode; nothing in it is changed.
        graph: its channel graph.
        selection: the kept and dropped channels.
        found: the consumers of dropped channels.
        settings: the restorer.
        seed: seed for probes and sampled positions.
        progress: called as ``progress(stage, done, total)``.
        recall: what earlier restorations on the same probes kept.
    """

    model: nn.Module
    graph: Graph
    selection: Selection
    found: tuple[Target, ...]
    settings: Settings
    seed: int
    progress: Progress | None
    recall: Recall = field(default_factory=Recall)

    def report(self, stage: str, done: int, total: int) -> None:
        """Report progress."""
        if self.progress:
            self.progress(stage, done, total)

    def stored(self, values: dict[str, Tensor], state: State) -> dict[str, Tensor]:
        """Solved weights as the layers store them, with dropped channels masked as in :func:`with_masks`."""
        return with_masks(as_stored(self.found, values), self.selection, state)


@dataclass
class _Powers:
    """Powers of a consumer's output: in total, lost by pruning, and still lost after restoration."""

    total: float = 0.0
    before: float = 0.0
    after: float = 0.0


@dataclass
class Findings:
    """The results of the solves.

    Attributes:
        state: the unpruned network's tensors.
        values: new tensors; weights have their output dimension first.
        errors: powers of the consumers' outputs for each choice of the selection.
        notes: what the user should know about each choice.
    """

    state: State
    values: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[int, _Powers] = field(default_factory=lambda: defaultdict(_Powers))
    notes: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))

    def note(self, numbers: Iterable[int], text: str) -> None:
        """Add a note to some choices."""
        for number in numbers:
            self.notes[number].append(text)

    def unseen(self, target: Target, numbers: Iterable[int]) -> None:
        """Note that a consumer did not run on the probes."""
        self.note(
            numbers,
            f"{target.consumer.layer or target.consumer.weight} did not run on the probes: pruned without restoration",
        )

    def singular(self, target: Target, numbers: Iterable[int]) -> None:
        """Note that a consumer's moments were singular."""
        self.note(numbers, f"{target.consumer.layer}: singular moments, solved by pseudo-inverse")

    def absorb(self, target: Target, shift: Tensor) -> None:
        """Add a constant to the consumer's output, if it has a bias or a batch norm after it."""
        if target.bias is None:
            return
        old = self.values.get(target.bias, self.state[target.bias].detach())
        self.values[target.bias] = (old.double() + target.sign * shift).to(old.dtype)

    def add(self, number: int, total: float, before: float, after: float) -> None:
        """Add a consumer's powers to those of a choice."""
        errors = self.errors[number]
        errors.total += total
        errors.before += before
        errors.after += after

    def row(self, number: int, choice: Choice) -> Restored:
        """The outcome of one choice, for the report."""
        power = self.errors[number]
        relative = None
        if power.total:
            scale = max(power.total, 1e-300)
            # Differences of sums may be negative by rounding.
            relative = math.sqrt(max(power.before, 0) / scale), math.sqrt(max(power.after, 0) / scale)
        return Restored(choice.group.name, None, 0.0, "; ".join(dict.fromkeys(self.notes[number])), relative)


def merged(findings: Findings, later: Findings) -> Findings:
    """The later results, and the earlier ones for choices without a later one."""
    notes = {number: [*findings.notes[number], *later.notes[number]] for number in {*findings.notes, *later.notes}}
    errors = {**findings.errors, **later.errors}
    return Findings(findings.state, later.values, defaultdict(_Powers, errors), defaultdict(list, notes))


_LONG, _MANY = 32, 2048
"""Kernels with more taps are solved by "mix" if their patches have more entries, which would take minutes."""

Sums = PatchSums | list[tuple[int, Slot, ChannelSums]]
"""The sums for one consumer: of patches, or of channels for each group, with the selection's index and the slot."""


def empty_sums(
    target: Target, selection: Selection, state: State, settings: Settings, seed: int
) -> tuple[Sums, int, str]:
    """Empty sums for one consumer, their size in bytes, and a note if "mix" replaces "patch"."""
    consumer = target.consumer
    weight = target.weight(state)
    generator = generator_for(seed, f"{consumer.weight}#positions")
    taps = weight[0, 0].numel() if weight.dim() > 2 else 1
    keep = [torch.nonzero(~gone).flatten() for gone in target.dropped.chunk(consumer.blocks)]
    drop = [torch.nonzero(gone).flatten() for gone in target.dropped.chunk(consumer.blocks)]
    rows = len(weight) // consumer.blocks
    size = sum(len(k) * taps * (len(k) * taps + rows) * 8 for k in keep)
    note = ""
    experts = consumer.experts > 0 and consumer.blocks > 1  # moments among channels of all of them would be too large
    if (settings.solve == "patch" or experts) and consumer.op not in UNFOLDED:
        widest = max(len(k) for k in keep) * taps
        long = taps > _LONG and widest > _MANY
        if (size <= settings.budget or experts) and not long:
            device = weight.device
            columns = Columns(tuple(k.to(device) for k in keep), tuple(d.to(device) for d in drop))
            return PatchSums(columns, settings.positions, generator), size, ""
        why = f"its kernels are long ({taps} taps)" if long else f"patch moments would take {size / 2**20:.0f} MiB"
        note = f"{consumer.layer}: solved by mix, because {why}"
    entries = []
    for number in target.choices:
        choice = selection.choices[number]
        slot = next(slot for slot in choice.group.consumers if slot.parameter == consumer.weight)
        index = seats(slot, choice.group.width).to(weight.device)
        entries.append((number, slot, ChannelSums(index, settings.positions, generator)))
    return entries, sum(selection.choices[n].group.width ** 2 * 8 for n, *_ in entries), note


def solve_patches(
    target: Target,
    sums: PatchSums,
    selection: Selection,
    settings: Settings,
    findings: Findings,
) -> None:
    """Fit the whole kernel of a consumer to the contribution of its dropped channels, or to another target."""
    weight = masked(target, findings.state)
    findings.values[target.consumer.weight] = weight
    if not sums.blocks:
        findings.unseen(target, target.choices)
        return
    rows = len(weight) // target.consumer.blocks
    shift = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    expected, experts = None, target.consumer.experts > 0
    if not experts and len(target.choices) == 1 and all(group != NOT_OURS for group, _ in target.consumer.columns):
        choice = selection.choices[target.choices[0]]
        slot = next(slot for slot in choice.group.consumers if slot.parameter == target.consumer.weight)
        if NOT_OURS not in slot.channels:
            gram, trust = expected_moments(choice, findings.state, settings)
            expected = None if gram is None else (_by_column(gram, slot, choice.group.width), trust)
    solutions: list[tuple[float, Solution]] = []
    counted = sum(moments.count for moments in sums.blocks) if experts else 0
    for number, (keep, drop, moments) in enumerate(zip(sums.columns.keep, sums.columns.drop, sums.blocks, strict=True)):
        if not bool(moments.rr.any()):
            continue  # nothing is missing here
        out = slice(number * rows, (number + 1) * rows)
        prior = _patch_prior(target, keep, drop, number, target.weight(findings.state)[out], expected)
        ridge = settings.strength(prior is not None, len(moments.p) / moments.count)
        check_finite(moments.pp, target.consumer.layer)
        solution = solve(moments, ridge, centered=target.bias is not None, prior=prior)
        added = solution.coefficients.T.reshape(rows, len(keep), *weight.shape[2:])
        weight[out][:, keep] += added.to(weight.dtype)
        shift[out] = solution.shift
        solutions.append((moments.count / counted if experts else 1.0, solution))
        if solution.singular:
            findings.singular(target, target.choices)
    findings.absorb(target, shift)
    count, total, square = sums.output
    power = float((square / count - (total / count).square()).clamp_min(0).sum())
    before, after = (float(sum(p * getattr(s, side).sum() for p, s in solutions)) for side in ("before", "after"))
    if experts and (few := sum(moments.count < len(moments.p) for moments in sums.blocks)):
        findings.note(
            target.choices,
            f"{few} of {len(sums.blocks)} experts got fewer tokens than they keep neurons: the fewer, the less "
            "they are restored; pass more texts to restore them",
        )
    for choice in target.choices:
        findings.add(choice, power, before, after)


def _by_column(gram: Tensor, slot: Slot, width: int) -> Tensor:
    """Channel moments expanded to a consumer's input columns; different columns of a channel are uncorrelated."""
    channels = torch.tensor(slot.channels)
    place = torch.empty_like(channels)
    for number, column in enumerate(seats(slot, width).T):
        place[column[column >= 0]] = number
    return gram[channels][:, channels] * (place[:, None] == place[None, :])


def _patch_prior(
    target: Target, keep: Tensor, drop: Tensor, number: int, kernel: Tensor, expected: tuple[Tensor, float] | None
) -> Prior | None:
    """Expected patch moments of one block of a consumer: uncorrelated kernel positions, channels as in the weights."""
    if expected is None:
        return None
    first = number * len(target.dropped) // target.consumer.blocks
    gram = expected[0].to(kernel.device)
    kept, between = gram[first + keep][:, first + keep], gram[first + keep][:, first + drop]
    taps = kernel[0, 0].numel() if kernel.dim() > 2 else 1
    gone = kernel[:, drop].reshape(len(kernel), len(drop), taps).double()
    pp = torch.kron(kept, torch.eye(taps, dtype=kept.dtype, device=kept.device))
    pr = torch.einsum("kd,odt->kto", between, gone).reshape(-1, len(kernel))
    return Prior(pp, pr, expected[1])


def solve_channels(
    target: Target,
    entries: list[tuple[int, Slot, ChannelSums]],
    selection: Selection,
    settings: Settings,
    findings: Findings,
) -> None:
    """Fit the delivery matrix of each group that a consumer reads."""
    findings.values[target.consumer.weight] = masked(target, findings.state)
    for number, slot, sums in entries:
        if sums.moments is None or sums.columns is None:
            findings.unseen(target, [number])
            continue
        check_finite(sums.moments.pp, target.consumer.layer)
        n = sums.moments.count
        mean = sums.moments.p / n
        centered = target.bias is not None
        power = sums.moments.pp / n - (torch.outer(mean, mean) if centered else 0)
        moments = ChannelMoments(mean.cpu(), power.cpu())
        columns = (sums.columns / n).cpu()
        expected, trust = expected_moments(selection.choices[number], findings.state, settings)
        ridge = settings.strength(expected is not None)
        prior = None if expected is None else (expected, trust)
        _deliver(target, number, slot, selection, moments, columns, ridge, findings, prior)


def solve_closed_form(
    selection: Selection,
    source: ClosedFormSource,
    found: tuple[Target, ...],
    ridge: float,
    findings: Findings,
) -> None:
    """Solve every group with moments that follow from the weights alone."""
    made: dict[int, ChannelMoments | str] = {}
    for number, choice in enumerate(selection.choices):
        obstacle = paper_form_applies(choice.group, findings.state)
        if obstacle:
            made[number] = f"pruned without restoration: the weights-only form does not apply, {obstacle}"
            findings.note([number], str(made[number]))
            continue
        activation = activation_of(choice.group)
        kernel = tuple(findings.state[choice.group.producers[0].weight.parameter].shape[2:])
        made[number] = source.moments(describe(choice.group, findings.state), kernel, activation)
    for target in found:
        findings.values[target.consumer.weight] = masked(target, findings.state)
        for number in target.choices:
            moments = made[number]
            if isinstance(moments, str):
                continue
            for slot in selection.choices[number].group.consumers:
                if slot.parameter != target.consumer.weight:
                    continue
                channels = torch.tensor(slot.channels)
                columns = torch.where(channels == NOT_OURS, 0.0, moments.mean[channels.clamp_min(0)])
                _deliver(target, number, slot, selection, moments, columns, ridge, findings)


def _deliver(
    target: Target,
    number: int,
    slot: Slot,
    selection: Selection,
    moments: ChannelMoments,
    columns: Tensor,
    ridge: float,
    findings: Findings,
    prior: tuple[Tensor, float] | None = None,
) -> None:
    """Solve for S on channel moments, fold it into the consumer, and preserve the mean of its output."""
    choice = selection.choices[number]
    keep, drop = choice.tensors()
    delivery, resid, singular = deliver_from_moments(choice, moments.covariance, ridge, prior)
    source, new = target.weight(findings.state), findings.values[slot.parameter]
    gone = target.dropped & (torch.tensor(slot.channels) != NOT_OURS)
    means = columns.to(source.device)
    # The mean contribution of the dropped columns, minus that of the restored ones.
    asked = on_average(target, source, means * gone.to(means)) + on_average(target, new, means)
    findings.values[slot.parameter] = new = fold(new, source, slot, choice.group.width, keep, drop, delivery)
    findings.absorb(target, asked - on_average(target, new, means))
    if singular:
        findings.singular(target, [number])
    # Channels are weighted by the energy of the consumer's weights; correlations between them are neglected.
    energy = consumer_energy(slot, source, choice.group.width)
    variance = moments.covariance.diagonal()
    findings.add(
        number,
        float((energy * variance).sum()),
        float((energy * variance)[drop].sum()),
        float((energy[drop] * resid).sum()),
    )


def expected_moments(choice: Choice, state: State, settings: Settings) -> tuple[Tensor | None, float]:
    """The channels' covariance that follows from the weights alone (None if unused), and its weight in the mixture."""
    trust = settings.prior
    if trust is None:
        trust = 0.0 if any(producer.normalized for producer in choice.group.producers) else 0.5
    if trust == 0 or paper_form_applies(choice.group, state):
        return None, 0.0
    return describe(choice.group, state).covariance, trust


def deliver_from_moments(
    choice: Choice, covariance: Tensor, ridge: float, prior: tuple[Tensor, float] | None = None
) -> tuple[Delivery, Tensor, bool]:
    """S for a whole group, block by block, with residual variances of dropped channels; and whether G is singular."""
    keep, drop = choice.tensors()
    labels = torch.tensor(choice.group.blocks)
    delivery = empty_delivery(len(keep), len(drop))
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
