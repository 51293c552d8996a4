"""Describes a group's channels by the weights alone: raw filters, effective filters, and consumers' weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lbyl.graph import NOT_OURS, Depthwise, Group, Norm, Producer, Slot

State = Mapping[str, Tensor]
"""Parameters and buffers by name."""

_CACHED = 2**16
"""About this many float64 elements fit into the processor's cache."""


@dataclass(frozen=True)
class Filters:
    """The channels of one group as described by the weights, in float64, on the device of the weights.

    Each property is computed at its first use, because all of them together take several times the memory of the
    weights. ``weight``, ``raw``, ``offset``, ``energy``, ``center``, ``spread`` and ``batch_norm`` have a row or a
    number for each channel; ``len(filters)`` is the number of channels.

    Attributes:
        group: the group: its name, width, producers and consumers.
        state: the network's parameters and buffers, by name. They belong to the network and must not be changed.
    """

    group: Group
    state: State

    def __len__(self) -> int:
        return self.group.width

    @cached_property
    def raw(self) -> Float[Tensor, "channels fan_in"]:
        """The producers' own weights, one row for each channel, with the bias if no batch norm follows."""
        if not any(producer.stages for producer in self.group.producers):
            return self.weight  # equal, and this avoids a second copy
        parts = []
        for producer in self.group.producers:
            parts.append(_rows(self.state[producer.weight.parameter], producer.weight, self.group.width))
            if producer.bias and not producer.normalized:
                parts.append(_rows(self.state[producer.bias], producer.weight, self.group.width))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def norms(self, power: int) -> Float[Tensor, " channels"]:
        """``(sum_i |w_ji|^p)^(1/p)`` for each row of `raw`, computed without `raw` itself."""
        if power not in self._norms:
            self._norms[power] = self._summed(power)
        return self._norms[power]

    @cached_property
    def _norms(self) -> dict[int, Tensor]:
        return {}

    def _summed(self, power: int) -> Float[Tensor, " channels"]:
        parts, bare = [], not any(producer.stages for producer in self.group.producers)
        found = self._squares if power == 2 else self._powered(power)
        for producer, offset, powers in zip(self.group.producers, self._offsets, found, strict=True):
            slot = producer.weight
            parts.append(powers.sum(1))
            if producer.bias and not producer.normalized:
                bias = offset[:, None] if bare else _rows(self.state[producer.bias], slot, self.group.width)
                parts.append(bias.abs().pow(power).sum(1))
        return torch.stack(parts).sum(0).pow(1 / power)

    @cached_property
    def weight(self) -> Float[Tensor, "channels fan_in"]:
        """The effective filters: rows ``v_j = gamma_j / sigma_j * w_j``, flattened; ``[w | b]`` without batch norm."""
        parts = list(self._parts())
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _parts(self) -> Iterator[Float[Tensor, "channels some_of_fan_in"]]:
        for producer, offset in zip(self.group.producers, self._offsets, strict=True):
            yield _effective(producer, self.group, self.state)
            if not producer.normalized and producer.bias:
                yield offset[:, None]

    @cached_property
    def covariance(self) -> Float[Tensor, "channels channels"]:
        """``(V - m 1^T) (V - m 1^T)^T`` with the row means ``m`` of V, which is `weight`; computed without `weight`."""
        grams, totals, counts = zip(*[(p @ p.T, p.sum(1), p.shape[1]) for p in self._parts()], strict=True)
        total = torch.stack(totals).sum(0)
        return torch.stack(grams).sum(0) - torch.outer(total, total) / sum(counts)

    @cached_property
    def energy(self) -> Float[Tensor, " channels"]:
        """``|v_j|^2``, computed without `weight` itself, which takes several times the memory of the weights."""
        parts = []
        for producer, offset, squares in zip(self.group.producers, self._offsets, self._squares, strict=True):
            parts.append(_energy(producer, self.group, self.state, squares))
            if not producer.normalized and producer.bias:
                parts.append(offset.square())
        return torch.stack(parts).sum(0)

    @cached_property
    def offset(self) -> Float[Tensor, " channels"]:
        """``c_j = beta_j - gamma_j mu_j / sigma_j`` (+ ``gamma_j / sigma_j * bias_j``); zero without a norm."""
        pairs = zip(self.group.producers, self._offsets, strict=True)
        return torch.stack([c if producer.normalized else torch.zeros_like(c) for producer, c in pairs]).sum(0)

    @cached_property
    def batch_norm(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Gamma, beta, mean and variance of each channel, if one layer with one batch norm makes them; else None."""
        if len(self.group.producers) != 1 or len(self.group.producers[0].stages) != 1:
            return None
        (norm,), slot = self.group.producers[0].stages, self.group.producers[0].weight
        if not isinstance(norm, Norm) or norm.weight is None or norm.bias is None:
            return None
        names = norm.weight, norm.bias, norm.mean, norm.var
        gamma, beta, mean, var = (_rows(self.state[name], slot, self.group.width).mean(1) for name in names)
        return gamma, beta, mean, var

    @property
    def normalized(self) -> bool:
        """Whether a batch norm follows the producers."""
        return any(producer.normalized for producer in self.group.producers)

    @cached_property
    def center(self) -> Float[Tensor, " channels"]:
        """Mean of each channel before the activation: beta of its batch norm, else the bias."""
        pairs = zip(self._last, self._offsets, strict=True)
        return torch.stack([offset if last is None else last[0] for last, offset in pairs]).sum(0)

    @cached_property
    def spread(self) -> Float[Tensor, " channels"] | None:
        """Deviation of each channel before the activation: |gamma| of its batch norm; None without one."""
        known = [last[1] for last in self._last if last is not None]
        return torch.stack(known).square().sum(0).sqrt() if len(known) == len(self._last) else None

    @cached_property
    def peak(self) -> Float[Tensor, " channels"]:
        """The largest absolute weight with which any consumer reads the channel."""
        return _peak(self.group, self.state)

    @cached_property
    def _squares(self) -> list[Float[Tensor, "channels occurrences"]]:
        return self._powered(2)

    def _powered(self, power: int) -> list[Float[Tensor, "channels occurrences"]]:
        slots = [producer.weight for producer in self.group.producers]
        return [_powers(self.state[slot.parameter], slot, self.group.width, power) for slot in slots]

    @cached_property
    def _offsets(self) -> list[Tensor]:
        return [_offset(producer, self.group, self.state) for producer in self.group.producers]

    @cached_property
    def _last(self) -> list[tuple[Tensor, Tensor] | None]:
        return [_last_norm(producer, self.group, self.state) for producer in self.group.producers]


@dataclass(frozen=True)
class _Subset(Filters):
    """The filters of some channels only."""

    whole: Filters
    members: Int[Tensor, " members"]

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def raw(self) -> Tensor:
        return self.whole.raw[self.members]

    def norms(self, power: int) -> Tensor:
        return self.whole.norms(power)[self.members]

    @cached_property
    def weight(self) -> Tensor:
        return self.whole.weight[self.members]

    @cached_property
    def covariance(self) -> Tensor:
        return self.whole.covariance[self.members][:, self.members]

    @cached_property
    def energy(self) -> Tensor:
        return self.whole.energy[self.members]

    @cached_property
    def offset(self) -> Tensor:
        return self.whole.offset[self.members]

    @cached_property
    def center(self) -> Tensor:
        return self.whole.center[self.members]

    @cached_property
    def spread(self) -> Tensor | None:
        return None if self.whole.spread is None else self.whole.spread[self.members]

    @cached_property
    def peak(self) -> Tensor:
        return self.whole.peak[self.members]


def seats(slot: Slot, width: int) -> Int[Tensor, "channels occurrences"]:
    """The indices in a slot that carry each channel of the group, padded with -1."""
    if slot.channels == tuple(range(width)):
        return torch.arange(width)[:, None]
    channels = torch.tensor(slot.channels)
    order = torch.argsort(channels, stable=True)
    order = order[channels[order] != NOT_OURS]
    owners = channels[order]
    counts = torch.bincount(owners, minlength=width)
    # The position of each index among those of its channel.
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[owners]
    index = torch.full((width, int(counts.max())), -1)
    index[owners, place] = order
    return index


def carrying(slot: Slot, width: int, members: Sequence[int] | Int[Tensor, " members"]) -> Bool[Tensor, " indices"]:
    """Which indices of a slot carry these channels of a group."""
    ours = torch.zeros(width + 1, dtype=torch.bool)  # the last one is for NOT_OURS
    ours[torch.as_tensor(members)] = True
    return ours[torch.tensor(slot.channels)]


def describe(group: Group, state: State) -> Filters:
    """Effective filters and offsets of a group (arXiv 2502.08474, section 3; sigma is the standard deviation)."""
    return Filters(group, state)


def _last_norm(producer: Producer, group: Group, state: State) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation of each channel from the last batch norm, if that is the last linear map."""
    if not producer.stages or not isinstance(producer.stages[-1], Norm):
        return None
    norm, slot, width = producer.stages[-1], producer.weight, group.width
    gamma = _rows(state[norm.weight], slot, width).mean(1) if norm.weight else torch.ones(width, dtype=torch.float64)
    beta = _rows(state[norm.bias], slot, width).mean(1) if norm.bias else torch.zeros(width, dtype=torch.float64)
    return beta, gamma.abs()


def subset(filters: Filters, members: Int[Tensor, " members"]) -> Filters:
    """The filters of some channels only, in ascending order."""
    if len(members) == len(filters):
        return filters
    return _Subset(filters.group, filters.state, filters, members)


def paper_form_applies(group: Group, state: State) -> str | None:
    """None if the effective filters describe the channels; otherwise the reason why they do not."""
    for step in group.steps:
        if step.parametric:
            return f"{step.op} {step.layer!r} is between the filters and their consumers"
    for producer in group.producers:
        for stage in producer.stages:
            if isinstance(stage, Depthwise) and state[producer.weight.parameter][0, 0].numel() > 1:
                # Only a 1x1 layer and a depthwise one compose tap by tap.
                return f"depthwise {stage.layer!r} follows a layer whose kernel is wider than 1"
    return None


def columns_second(weight: Tensor, slot: Slot) -> Tensor:
    """A view of a consumer's weight with its input dimension second, as in convolutions and linear layers.

    Experts look like a grouped convolution with a single filter each, whose taps are the expert's outputs, and a vector
    looks like the weight of a single output.
    """
    return weight[None] if weight.dim() == 1 else weight.movedim(slot.dim, 1)


def _rows(tensor: Tensor, slot: Slot, width: int) -> Tensor:
    """The rows of a weight or a vector, by channel, in float64 on the CPU, wherever the network is."""
    tensor = _channels_first(tensor, slot)
    flat = tensor.detach().cpu().to(torch.float64, copy=True).reshape(tensor.shape[0], -1)
    if slot.channels == tuple(range(width)):
        return flat  # the usual case, and then no copy of a large weight is made
    index = seats(slot, width)
    rows = flat[index.clamp_min(0)] * (index >= 0)[..., None]
    return rows.reshape(width, -1)


def _effective(producer: Producer, group: Group, state: State) -> Float[Tensor, "channels fan_in"]:
    """The producer's weight with all linear maps after it folded in."""
    slot, width = producer.weight, group.width
    weight = _rows(state[slot.parameter], slot, width)
    occurrences = seats(slot, width).shape[1]
    for stage in producer.stages:
        weight = weight.reshape(width, occurrences, -1)
        if isinstance(stage, Norm):
            weight = weight.mul_(_norm(stage, slot, width, state)[0][..., None]).reshape(width, -1)
        else:
            taps = _rows(state[stage.weight], slot, width).reshape(width, occurrences, -1)
            # A 1x1 layer and a depthwise one compose to the outer product of their taps.
            weight = (weight[:, :, :, None] * taps[:, :, None, :]).reshape(width, -1)
    return weight


def _energy(
    producer: Producer, group: Group, state: State, squares: Float[Tensor, "channels occurrences"]
) -> Float[Tensor, " channels"]:
    """Sum of squares of the producer's effective weight, given that of the weight alone."""
    slot, width = producer.weight, group.width
    found = squares
    for stage in producer.stages:
        if isinstance(stage, Norm):
            found = found * _norm(stage, slot, width, state)[0].square()
        else:
            # |a b^T|^2 = |a|^2 |b|^2 for the outer product of taps.
            found = found * _powers(state[stage.weight], slot, width, 2)
    return found.sum(1)


def _powers(tensor: Tensor, slot: Slot, width: int, power: int) -> Float[Tensor, "channels occurrences"]:
    """The sum of ``|w|^p`` of each row of a weight, arranged by channels of the group."""
    tensor = _channels_first(tensor, slot)
    flat = tensor.detach().reshape(tensor.shape[0], -1)
    sums = [_raised_(piece.to(torch.float64, copy=True), power).sum(1) for piece in few_rows(flat)]
    return _rows(torch.cat(sums), slot, width)


def _channels_first(tensor: Tensor, slot: Slot) -> Tensor:
    """A producer's weight, or a vector of one number for each channel, with channels first.

    Of complex numbers, real and imaginary parts are weights of their own.
    """
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor
    if not slot.dim or tensor.dim() == 1:
        return tensor
    if slot.blocks == 1:
        return tensor.movedim(slot.dim, 0)
    # In a grouped transposed convolution, and in experts, the rows of each block make different channels.
    return tensor.movedim(slot.dim, 1).unflatten(0, (slot.blocks, -1)).transpose(1, 2).flatten(0, 1)


def few_rows(tensor: Tensor) -> Sequence[Tensor]:
    """A tensor in pieces of some rows, because allocating a float64 copy of all rows takes longer than most sums."""
    return tensor.split(max(1, _CACHED // max(tensor[:1].numel(), 1)))


def _raised_(values: Tensor, power: int) -> Tensor:
    """``|v|^p``, in place."""
    magnitudes = values if power % 2 == 0 else values.abs_()
    return magnitudes if power == 1 else magnitudes.pow_(power)


def _offset(producer: Producer, group: Group, state: State) -> Float[Tensor, " channels"]:
    """The constant that the producer and all linear maps after it add to each channel."""
    slot, width = producer.weight, group.width
    occurrences = seats(slot, width).shape[1]
    offset = (
        _rows(state[producer.bias], slot, width)
        if producer.bias
        else torch.zeros(width, occurrences, dtype=torch.float64)
    )
    for stage in producer.stages:
        if isinstance(stage, Norm):
            scale, mean, beta = _norm(stage, slot, width, state)
            offset = beta + scale * (offset - mean)
        else:
            taps = _rows(state[stage.weight], slot, width).reshape(width, occurrences, -1)
            offset = offset * taps.sum(2)
            if stage.bias:
                offset = offset + _rows(state[stage.bias], slot, width)
    return offset.mean(1)


def _norm(norm: Norm, slot: Slot, width: int, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """``gamma / sigma``, mean and beta of a batch norm, one row for each channel."""
    mean, var = (_rows(state[name], slot, width) for name in (norm.mean, norm.var))
    sigma = (var + norm.eps).sqrt()
    gamma = _rows(state[norm.weight], slot, width) if norm.weight else torch.ones_like(sigma)
    beta = _rows(state[norm.bias], slot, width) if norm.bias else torch.zeros_like(sigma)
    return gamma / sigma, mean, beta


def _peak(group: Group, state: State) -> Tensor:
    peak = torch.zeros(group.width, dtype=torch.float64)
    for slot in group.consumers:
        weight = columns_second(state[slot.parameter], slot).detach().abs()
        per_block = weight.reshape(slot.blocks, -1, *weight.shape[1:]).amax(1)  # blocks, in / blocks, taps
        column = per_block.reshape(len(slot.channels), -1).amax(1).cpu().to(torch.float64)
        channels = torch.tensor(slot.channels)
        ours = channels != NOT_OURS
        peak.scatter_reduce_(0, channels[ours], column[ours], "amax")
    return peak


def column_energy(slot: Slot, source: Float[Tensor, "out columns *taps"]) -> Float[Tensor, " columns_of_all_blocks"]:
    """The sum of squares of a consumer's weights for each of its input columns."""
    sums = []
    for block in source.detach().chunk(slot.blocks):
        total = torch.zeros_like(block[0], dtype=torch.float64)
        for rows in few_rows(block):
            # Not in place, because double() does not copy a float64 weight.
            total += rows.double().square().sum(0)
        sums.append(total.reshape(len(total), -1).sum(1))
    return torch.cat(sums).cpu()


def consumer_energy(slot: Slot, source: Float[Tensor, "out columns *taps"], width: int) -> Float[Tensor, " channels"]:
    """``|U_j|^2``: the sum of squares of a consumer's weights for each channel."""
    column = column_energy(slot, source)
    channels = torch.tensor(slot.channels)
    ours = channels != NOT_OURS
    return torch.zeros(width, dtype=torch.float64).index_add_(0, channels[ours], column[ours])
