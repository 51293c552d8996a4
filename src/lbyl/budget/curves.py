"""Error curves: the predicted error of each group at each width, measured on probes or computed from the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lbyl.budget.outputs import Cut, measure_for
from lbyl.graph import Graph, Group, Slot
from lbyl.graph.types import last_to_run
from lbyl.moments import Probes
from lbyl.moments.accumulate import ChannelSums, Moments, WholeSums
from lbyl.runtime.forward import ConsumerCall, run_intercepted
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress, counted
from lbyl.runtime.seeding import generator_for
from lbyl.selection.filters import State, columns_second, consumer_energy, describe, paper_form_applies, seats
from lbyl.selection.select import ByCriterion, ranked
from lbyl.surgery.masking import Delivery, fold

_RIDGE = 1e-2


@dataclass(frozen=True)
class Curve:
    """The predicted error of one group at each of its widths.

    Attributes:
        group: index of the group in the graph.
        order: its channels, the most important first; a width k keeps the first k.
        error: squared relative error with k kept channels, for k = 0 .. width: of the network's outputs where it was
            tried what cuts change there, otherwise of the consumers' outputs.
    """

    group: int
    order: tuple[int, ...]
    error: Float[Tensor, " widths"]


def error_curve(
    covariance: Float[Tensor, "channels channels"], energy: Float[Tensor, " channels"], ridge: float = _RIDGE
) -> Float[Tensor, " widths"]:
    """Squared relative error if only the first k channels are kept, for all k at once.

    With the Cholesky factor ``L L^T = G + ridge``, the residual variance of channel j given the first k channels is
    ``G_jj - sum_{i<k} L_ji^2``. It is weighted by the energy ``|U_j|^2`` of the consumers' weights for channel j.

    Args:
        covariance: the covariance G of the channels, in the order of their importance.
        energy: squared norm of the consumers' weights for each channel.
        ridge: added to the diagonal, relative to its mean, as least squares does.
    """
    count = len(covariance)
    diagonal = covariance.diagonal().clamp_min(0)
    total = (energy * diagonal).sum()
    if float(total) <= 0:
        return torch.zeros(count + 1, dtype=torch.float64)
    strength = max(ridge * float(diagonal.mean()), 1e-12 * float(diagonal.max()))
    steadied = covariance.clone()
    steadied.diagonal().add_(strength)
    factor, info = torch.linalg.cholesky_ex(steadied)
    del steadied
    if int(info):
        factor = torch.diag(diagonal.sqrt())  # treats channels as uncorrelated
    error = torch.zeros(count + 1, dtype=torch.float64)
    widths = torch.arange(count + 1)
    for rows in torch.arange(count).split(_ROWS):
        explained = torch.nn.functional.pad(factor[rows].square_().cumsum_(1), (1, 0))
        left = (diagonal[rows, None] - explained).clamp_min_(0).mul_(energy[rows, None])
        error += left.masked_fill_(rows[:, None] < widths, 0).sum(0)
    error /= total
    # The error never grows when more channels are kept.
    return error.flip(0).cummax(0).values.flip(0)


_ROWS = 512
"""Channels whose errors are worked out at a time, for all of a wide layer's would be large."""
_CONSUMERS = 6
"""The curve of a group with more consumers (a residual connection) is measured on only this many of them."""
_NOTHING = 1e-9
"""Errors that are not more than this are none."""


@dataclass(frozen=True)
class Curves:
    """The error curves of all groups, which are measured once and used for any number of budgets."""

    curves: tuple[Curve, ...]
    notes: tuple[str, ...] = ()


def measure_curves(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    groups: Sequence[int],
    state: State,
    by: ByCriterion,
    probes: Probes | None,
    seed: int,
    progress: Progress | None = None,
    room: int = 2**31,
) -> Curves:
    """Measure or compute the predicted error of groups at each of their widths.

    Args:
        model: the unpruned network in evaluation mode.
        inputs: its inputs.
        graph: its channel graph.
        groups: indices of the groups that may lose channels.
        state: its tensors.
        by: the ranking of channels.
        probes: the probes for moments; without them, curves follow from the weights alone.
        seed: seed for the criterion and for sampling positions.
        progress: called as ``progress(stage, done, total)``.
        room: bytes that the moments of a pass over the probes may take; where all take more, there are more passes.
    """
    orders = {index: ranked(graph.groups[index], state, by, seed).order() for index in groups}
    with torch.no_grad():
        if probes is None:
            return Curves(tuple(_from_weights(graph, index, orders[index], state) for index in groups))
        curves, note = _from_probes(model, inputs, graph, orders, state, probes, seed, progress, room)
    return Curves(tuple(curves), (note,) if note else ())


def _from_weights(graph: Graph, index: int, order: tuple[int, ...], state: State) -> Curve:
    """The curve under the paper's assumptions, or from the filters' norms if these assumptions do not apply."""
    group = graph.groups[index]
    filters = describe(group, state)
    readers = [consumer_energy(slot, _source(state, slot), group.width) for slot in (*group.consumers, *group.tied)]
    energy = torch.stack(readers).sum(0) if readers else torch.ones(group.width, dtype=torch.float64)
    if paper_form_applies(group, state):
        size, labels = filters.energy.cpu(), torch.tensor(group.blocks)
        members = [torch.nonzero(labels == label).flatten() for label in torch.unique(labels)]
        return Curve(index, order, _joint([(m, torch.diag(size[m]), 1.0) for m in members], energy, order))
    rows = filters.weight[list(order)]
    return Curve(index, order, error_curve(rows @ rows.T, energy[list(order)]))


def _joint(
    parts: Sequence[tuple[Tensor, Tensor, float]], energy: Float[Tensor, " channels"], order: Sequence[int]
) -> Float[Tensor, " widths"]:
    """The curve of channels in parts that are uncorrelated with each other and keep equally many channels.

    Each part has its channels, their covariance, and a factor for its errors. Between widths that all parts can share,
    the error is interpolated.
    """
    rank, curves = torch.tensor(order).argsort(), list[Tensor]()
    for members, covariance, factor in parts:
        best = rank[members].argsort()
        curve = error_curve(covariance[best[:, None], best], energy[members[best]])
        curves.append(curve * factor * (energy[members] * covariance.diagonal().clamp_min(0)).sum())
    total = torch.stack(curves).sum(0)
    if float(total[0]) <= 0:
        return torch.zeros(len(order) + 1, dtype=torch.float64)
    between = torch.arange(len(order) + 1, dtype=torch.float64) / len(parts)
    low = between.floor().long()
    return torch.lerp(total[low], total[(low + 1).clamp_max(len(total) - 1)], between - low) / total[0]


def _from_probes(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    orders: Mapping[int, tuple[int, ...]],
    state: State,
    probes: Probes,
    seed: int,
    progress: Progress | None,
    room: int,
) -> tuple[list[Curve], str]:
    measure = measure_for(model, inputs, probes, state, len(orders), seed)
    curves: list[Curve] = []
    for indices in _passes(graph, orders, room):
        seen = _seen(model, graph, indices, state, probes, seed, progress)
        own = [_curve(graph, index, orders[index], state, seen.get(index, [])) for index in indices]
        changed: dict[int, dict[int, float]] = {index: {} for index in indices}
        cuts = _cuts(graph, counted(own, progress, "weighing groups"), seen, state, measure.shares)
        for (index, kept), error in measure(cuts).items():
            changed[index][kept] = error
        curves += (at_the_outputs(curve, changed[curve.group]) for curve in own)
    return curves, measure.note


_Sums = ChannelSums | WholeSums
"""Moments among all channels of a group, or for experts, among those of each of them."""
_Seen = Sequence[tuple[Slot, _Sums]]


def _moments(group: Group, slot: Slot, item: _Sums) -> list[tuple[Tensor, Moments]]:
    """Channels and their moments: all channels together, or those of each expert that got any token."""
    if isinstance(item, ChannelSums):
        return [] if item.moments is None else [(torch.arange(group.width), item.moments)]
    channels = torch.tensor(slot.channels).reshape(slot.blocks, -1)
    return [(own, moments) for own, moments in zip(channels, item.blocks, strict=True) if moments.count]


def _looked_at(group: Group) -> Sequence[Slot]:
    """The consumers that the curve of a group is taken on."""
    return group.consumers[:: max(1, -(-len(group.consumers) // _CONSUMERS))]


def _passes(graph: Graph, indices: Iterable[int], room: int) -> list[list[int]]:
    """Groups whose moments are summed up in one pass over the probes."""
    passes: list[list[int]] = []
    left = 0
    for index in indices:
        group = graph.groups[index]
        size = 8 * group.width**2 // len(set(group.blocks)) * len(_looked_at(group))
        if not passes or size > left:
            passes.append([])
            left = room
        passes[-1].append(index)
        left -= size
    return passes


def _seen(
    model: nn.Module,
    graph: Graph,
    indices: Sequence[int],
    state: State,
    probes: Probes,
    seed: int,
    progress: Progress | None,
) -> dict[int, _Seen]:
    """Moments of the channels of some groups at their consumers."""
    sums: dict[str, list[tuple[int, Slot, _Sums]]] = defaultdict(list)
    stacked = {consumer.weight for consumer in graph.consumers if consumer.experts}
    for index in indices:
        group = graph.groups[index]
        for slot in _looked_at(group):
            generator = generator_for(seed, f"{slot.parameter}#widths")
            item: _Sums = ChannelSums(seats(slot, group.width), 4000, generator)
            if slot.blocks > 1 and slot.parameter in stacked:  # each expert reads channels of its own
                item = WholeSums(slot.blocks, 4000, generator)
            sums[slot.parameter].append((index, slot, item))

    def on_consumer(call: ConsumerCall) -> None:
        for _, slot, item in sums.get(call.weight, ()):
            source = _source(state, slot)
            item.add(call, source[..., 0] if isinstance(item, WholeSums) else source)

    last = last_to_run([consumer for consumer in graph.consumers if consumer.weight in sums])
    for batch in counted(probes.batches, progress, "looking at widths"):
        run_intercepted(
            model, batch, on_consumer=on_consumer, batch_statistics=probes.batch_statistics, stop_after=last
        )
    found: dict[int, list[tuple[Slot, _Sums]]] = defaultdict(list)
    for entries in sums.values():
        for index, slot, item in entries:
            if _moments(graph.groups[index], slot, item):
                found[index].append((slot, item))
    return dict(found)


def _curve(graph: Graph, index: int, order: tuple[int, ...], state: State, seen: _Seen) -> Curve:
    """The mean over the group's consumers; from the weights where none was seen."""
    if not seen:
        return _from_weights(graph, index, order, state)
    group, curves = graph.groups[index], []
    for slot, item in seen:
        known, parts = _moments(group, slot, item), []
        positions = sum(moments.count for _, moments in known)
        for members, moments in known:
            mean = (moments.p / moments.count).cpu()
            covariance = moments.pp.cpu() / moments.count - torch.outer(mean, mean)
            parts.append((members, covariance, moments.count / positions))
        curves.append(_joint(parts, consumer_energy(slot, _source(state, slot), group.width), order))
    return Curve(index, order, torch.stack(curves).mean(0))


def measured_widths(curve: Curve, shares: Sequence[float]) -> list[int]:
    """The widths at which it is measured what a cut changes at the network's outputs, unless it loses nothing."""
    width = len(curve.order)
    kept = dict.fromkeys(max(1, round(width * (1 - share))) for share in shares)
    return [k for k in kept if k < width and float(curve.error[k]) > _NOTHING]


def at_the_outputs(curve: Curve, errors: Mapping[int, float]) -> Curve:
    """The curve of the network's outputs: measured at some widths, with the ratio of both errors in between.

    Args:
        curve: the error of the consumers' outputs.
        errors: the squared relative error of the network's outputs, by the number of kept channels.
    """
    ratios = {float(curve.error[kept]): max(error / float(curve.error[kept]), 1e-6) for kept, error in errors.items()}
    if not ratios:
        return curve
    own, factors = np.log(sorted(ratios.items())).T
    between = np.interp(curve.error.clamp_min(1e-12).log().numpy(), own, factors)
    error = curve.error * torch.from_numpy(between).exp()
    return replace(curve, error=error.flip(0).cummax(0).values.flip(0))


def _cuts(
    graph: Graph, curves: Iterable[Curve], seen: Mapping[int, _Seen], state: State, shares: Sequence[float]
) -> Iterator[Cut[tuple[int, int]]]:
    """Cuts of each group, by the group's index and the number of channels that it keeps."""
    for curve in curves:
        group, found = graph.groups[curve.group], seen.get(curve.group)
        for kept in measured_widths(curve, shares) if found else ():
            yield (curve.group, kept), _cut_weights(group, curve.order, kept, found or (), state)


def _cut_weights(group: Group, order: Sequence[int], kept: int, seen: _Seen, state: State) -> dict[str, Tensor]:
    """The weights of consumers if a group keeps so many channels, and these make up for the others.

    Layer norms keep the statistics of the uncut network, because the group's own error does not contain that change.
    """
    stays = torch.zeros(group.width, dtype=torch.bool)
    stays[list(order[:kept])] = True
    values: dict[str, Tensor] = {}
    for slot, item in seen:
        weight = values.get(slot.parameter, state[slot.parameter].detach().clone())
        for members, moments in _moments(group, slot, item):
            keep, drop = (torch.nonzero(here).flatten() for here in (stays[members], ~stays[members]))
            # Not centered, because biases are not corrected here, so kept channels must compensate for means as well.
            gram = (moments.pp / moments.count).cpu()
            ridge = 0.01 * float(gram.diagonal().mean()) + 1e-12
            matrix = torch.linalg.solve(
                gram[keep][:, keep] + ridge * torch.eye(len(keep), dtype=torch.float64), gram[keep][:, drop]
            )
            delivery, source = Delivery(matrix, torch.ones(len(keep), dtype=torch.float64)), _source(state, slot)
            fold(columns_second(weight, slot), source, slot, group.width, members[keep], members[drop], delivery)
        values[slot.parameter] = weight
    return values


def _source(state: State, slot: Slot) -> Tensor:
    return columns_second(state[slot.parameter].detach(), slot)
