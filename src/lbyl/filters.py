"""What the weights alone say about a group's channels: raw filters, effective filters, how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lbyl.graph import NOT_OURS, Depthwise, Group, Norm, Producer, Slot

State = Mapping[str, Tensor]
"""Parameters and buffers by name."""


@dataclass(frozen=True)
class Filters:
    """The channels of one group as the weights describe them, in float64.

    Attributes:
        raw: the producers' own weights, one row a channel; with the bias where no batch norm follows.
        weight: one row a channel, ``v_j = gamma_j / sigma_j * w_j`` flattened; without a batch norm ``[w | b]``.
        offset: ``c_j = beta_j - gamma_j mu_j / sigma_j`` (+ ``gamma_j / sigma_j * bias_j``); zero without a norm.
        normalized: whether a batch norm gave the offset.
        center: mean of each channel before the activation: beta of its batch norm, else the bias.
        spread: deviation of each channel before the activation: |gamma| of its batch norm; None without one.
        peak: the largest absolute weight with which any reader reads the channel.
    """

    raw: Float[Tensor, "channels fan_in"]
    weight: Float[Tensor, "channels fan_in"]
    offset: Float[Tensor, " channels"]
    normalized: bool
    center: Float[Tensor, " channels"]
    spread: Float[Tensor, " channels"] | None
    peak: Float[Tensor, " channels"]


def seats(slot: Slot, width: int) -> Int[Tensor, "channels occurrences"]:
    """Where each channel of the group stands in a slot: indices, padded with -1."""
    channels = torch.tensor(slot.channels)
    where = [torch.nonzero(channels == channel).flatten() for channel in range(width)] if width <= 64 else None
    if where is None:
        order = torch.argsort(channels, stable=True)
        order = order[channels[order] != NOT_OURS]
        counts = torch.bincount(channels[order], minlength=width)
        where = list(torch.split(order, counts.tolist()))
    return torch.nn.utils.rnn.pad_sequence(where, batch_first=True, padding_value=-1)


def describe(group: Group, state: State) -> Filters:
    """Effective filters and offsets of a group (method of LBYL, section 3; sigma is the true deviation)."""
    weights, offsets, centers, spreads = [], [], [], []
    for producer in group.producers:
        weight, offset = _effective(producer, group, state)
        if not producer.normalized and producer.bias:
            weight = torch.cat([weight, offset[:, None]], 1)
        weights.append(weight)
        offsets.append(offset if producer.normalized else torch.zeros_like(offset))
        center, spread = _last_norm(producer, group, state)
        centers.append(offset if center is None else center)
        spreads.append(spread)
    known = [spread for spread in spreads if spread is not None]
    effective = torch.cat(weights, 1) if len(weights) > 1 else weights[0]
    return Filters(
        # Without anything that follows, the filter is what the layer stores; no second copy of it is made.
        raw=_raw_rows(group, state) if any(producer.stages for producer in group.producers) else effective,
        weight=effective,
        offset=torch.stack(offsets).sum(0),
        normalized=any(producer.normalized for producer in group.producers),
        center=torch.stack(centers).sum(0),
        spread=torch.stack(known).square().sum(0).sqrt() if len(known) == len(spreads) else None,
        peak=_peak(group, state),
    )


def _last_norm(producer: Producer, group: Group, state: State) -> tuple[Tensor | None, Tensor | None]:
    """Mean and deviation that the last batch norm gives each channel, if it is the last linear map."""
    if not producer.stages or not isinstance(producer.stages[-1], Norm):
        return None, None
    norm, slot, width = producer.stages[-1], producer.weight, group.width
    gamma = _rows(state[norm.weight], slot, width).mean(1) if norm.weight else torch.ones(width).double()
    beta = _rows(state[norm.bias], slot, width).mean(1) if norm.bias else torch.zeros(width).double()
    return beta, gamma.abs()


def subset(filters: Filters, members: Int[Tensor, " members"]) -> Filters:
    """The filters of some channels only, in rising order."""
    if len(members) == len(filters.raw):
        return filters
    return Filters(
        filters.raw[members],
        filters.weight[members],
        filters.offset[members],
        filters.normalized,
        filters.center[members],
        None if filters.spread is None else filters.spread[members],
        filters.peak[members],
    )


def paper_form_applies(group: Group, state: State) -> str | None:
    """None where the effective filters describe the channels; else what stands in the way."""
    for step in group.steps:
        if step.parametric:
            return f"{step.op} {step.layer!r} lies between the filters and their readers"
    for producer in group.producers:
        for stage in producer.stages:
            if isinstance(stage, Depthwise) and state[producer.weight.parameter][0, 0].numel() > 1:
                # Only a 1x1 layer and a depthwise one compose tap by tap.
                return f"depthwise {stage.layer!r} follows a layer whose kernel is wider than 1"
    return None


def _raw_rows(group: Group, state: State) -> Float[Tensor, "channels fan_in"]:
    parts = []
    for producer in group.producers:
        parts.append(_rows(state[producer.weight.parameter], producer.weight, group.width))
        if producer.bias and not producer.normalized:
            parts.append(_rows(state[producer.bias], producer.weight, group.width))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def columns_second(weight: Tensor, slot: Slot) -> Tensor:
    """A view of a reader's weight with its input dimension second, as convolutions and linear layers have it."""
    return weight.transpose(0, 1) if slot.dim == 0 else weight


def _rows(tensor: Tensor, slot: Slot, width: int) -> Tensor:
    if slot.dim and tensor.dim() > 1:
        tensor = tensor.movedim(slot.dim, 0)
    flat = tensor.detach().to(torch.float64, copy=True).reshape(tensor.shape[0], -1)
    if slot.channels == tuple(range(width)):
        return flat  # the usual case, and then no copy of a large weight is made
    index = seats(slot, width)
    rows = flat[index.clamp_min(0)] * (index >= 0)[..., None]
    return rows.reshape(width, -1)


def _effective(producer: Producer, group: Group, state: State) -> tuple[Tensor, Tensor]:
    slot, width = producer.weight, group.width
    weight = _rows(state[slot.parameter], slot, width)
    occurrences = seats(slot, width).shape[1]
    offset = _rows(state[producer.bias], slot, width) if producer.bias else torch.zeros(width, occurrences).double()
    for stage in producer.stages:
        if isinstance(stage, Norm):
            mean, var = (_rows(state[name], slot, width) for name in (stage.mean, stage.var))
            sigma = (var + stage.eps).sqrt()
            gamma = _rows(state[stage.weight], slot, width) if stage.weight else torch.ones_like(sigma)
            beta = _rows(state[stage.bias], slot, width) if stage.bias else torch.zeros_like(sigma)
            scale = gamma / sigma
            weight = weight.reshape(width, occurrences, -1).mul_(scale[..., None]).reshape(width, -1)
            offset = beta + scale * (offset - mean)
        else:
            taps = _rows(state[stage.weight], slot, width).reshape(width, occurrences, -1)
            # A 1x1 layer and a depthwise one compose to the outer product of their taps.
            weight = weight.reshape(width, occurrences, -1)
            weight = (weight[:, :, :, None] * taps[:, :, None, :]).reshape(width, -1)
            offset = offset * taps.sum(2)
            if stage.bias:
                offset = offset + _rows(state[stage.bias], slot, width)
    return weight, offset.mean(1)


def _peak(group: Group, state: State) -> Tensor:
    peak = torch.zeros(group.width, dtype=torch.float64)
    for slot in group.readers:
        weight = columns_second(state[slot.parameter], slot).detach().abs()
        per_block = weight.reshape(slot.blocks, -1, *weight.shape[1:]).amax(1)  # blocks, in / blocks, taps
        column = per_block.reshape(len(slot.channels), -1).amax(1).to(torch.float64)
        channels = torch.tensor(slot.channels)
        ours = channels != NOT_OURS
        peak.scatter_reduce_(0, channels[ours], column[ours], "amax")
    return peak


def reader_energy(slot: Slot, source: Float[Tensor, "out columns *taps"], width: int) -> Float[Tensor, " channels"]:
    """``|U_j|^2``: the sum of squares of the weights with which a reader takes each channel."""
    per_block = source.detach().double().square().reshape(slot.blocks, -1, *source.shape[1:])
    column = per_block.sum(1).reshape(len(slot.channels), -1).sum(1).cpu()
    channels = torch.tensor(slot.channels)
    ours = channels != NOT_OURS
    return torch.zeros(width, dtype=torch.float64).index_add_(0, channels[ours], column[ours])
