"""Masks dropped channels in the uncut network: consumers get zero columns, and layer norms leave channels out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lbyl.errors import InputError
from lbyl.graph import Slot
from lbyl.runtime.layer_norms import NormMasks
from lbyl.runtime.reductions import Reduction
from lbyl.selection.filters import State, carrying, columns_second, few_rows, seats
from lbyl.selection.select import Selection


@dataclass(frozen=True)
class Delivery:
    """The approximation of one group's dropped channels by its kept ones: ``a_D ~ S^T a_K + shift``.

    All tensors are float64 on the CPU. A consumer with the columns ``U_K`` and ``U_D`` then has
    ``U_K diag(scale) + U_D S^T`` and no columns ``U_D``.

    Attributes:
        matrix: the delivery matrix S, of shape ``[kept, dropped]``.
        scale: a factor for each kept channel, usually 1.
        note: what the user should know; usually "".
        shift: a constant for each dropped channel; None for zero. It is added through the consumers' biases, or through
            the running means of batch norms after them, if they have either.
    """

    matrix: Float[Tensor, "kept dropped"]
    scale: Float[Tensor, " kept"]
    note: str = ""
    shift: Float[Tensor, " dropped"] | None = None

    @property
    def delivers(self) -> bool:
        """Whether S is not 0."""
        single = self.matrix.stride() == (0, 0)  # a single stored number, expanded
        return bool((self.matrix[:1, :1] if single else self.matrix).any())


_LARGEST = 2**33


def nothing_delivered(kept: int, dropped: int, note: str = "") -> Delivery:
    """S = 0, for plain pruning. S takes no memory and can't be written to."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    return Delivery(zero.expand(kept, dropped), torch.ones(kept, dtype=torch.float64), note)


def empty_delivery(kept: int, dropped: int) -> Delivery:
    """S = 0, in memory that can be written to.

    Raises:
        InputError: S would be too large for the memory.
    """
    if 8 * kept * dropped > _LARGEST:
        raise InputError(
            f"the delivery matrix of {kept} kept and {dropped} dropped channels is a matrix of "
            f"{8 * kept * dropped / 2**30:.0f} GiB; leave this group whole (ratio), or pass restore='prune'"
        )
    return Delivery(torch.zeros(kept, dropped, dtype=torch.float64), torch.ones(kept, dtype=torch.float64))


def with_masks(values: Mapping[str, Tensor], selection: Selection, state: State) -> dict[str, Tensor]:
    """The values, with zeros in the producers' weights for dropped channels where consumers can't mask them.

    This applies to groups over which a mean or a product is taken, and to layers that read channels with the same
    weight that makes them.
    """
    changed = dict(values)
    for choice in selection.choices:
        everywhere = choice.group.averages or choice.group.products
        for slot in choice.group.carriers if everywhere else choice.group.tied:
            value = changed.get(slot.parameter, state[slot.parameter].detach()).clone()
            rows = carrying(slot, choice.group.width, choice.drop).to(value.device)
            if slot.blocks > 1:
                zero_columns(value, rows, slot.blocks)
            else:
                value.index_fill_(slot.dim, rows.nonzero().flatten(), 0)
            changed[slot.parameter] = value
    return changed


def pruned_values(selection: Selection, state: State) -> dict[str, Tensor]:
    """The weights that plain pruning changes: consumers' weights with zeros in the columns of dropped channels."""
    values: dict[str, Tensor] = {}
    for choice in selection.choices:
        _, drop = choice.tensors()
        for slot in choice.group.consumers:
            weight = values.get(slot.parameter)
            if weight is None:
                weight = state[slot.parameter].detach().clone()
            mask_columns(columns_second(weight, slot), slot, choice.group.width, drop)
            values[slot.parameter] = weight
    return with_masks(values, selection, state)


Masks = Mapping[str, Sequence[Callable[[Tensor], object]]]
"""Functions that set the dropped columns of a weight to zero, in place, by the weight's name."""


def masks_of(selection: Selection) -> Masks:
    """Plain pruning as functions that are applied to copies of the consumers' weights."""
    found: dict[str, list[Callable[[Tensor], object]]] = defaultdict(list)
    for choice in selection.choices:
        _, drop = choice.tensors()
        for slot in (*choice.group.consumers, *choice.group.tied):
            found[slot.parameter].append(partial(_mask_whole, slot=slot, width=choice.group.width, drop=drop))
    return found


def _mask_whole(weight: Tensor, slot: Slot, width: int, drop: Tensor) -> None:
    mask_columns(columns_second(weight, slot), slot, width, drop)


def fold(
    weight: Float[Tensor, "out columns *taps"],
    source: Float[Tensor, "out columns *taps"],
    slot: Slot,
    width: int,
    keep: Int[Tensor, " kept"],
    drop: Int[Tensor, " dropped"],
    delivery: Delivery,
) -> Float[Tensor, "out columns *taps"]:
    """Fold a delivery into a consumer's weight: ``U'[:, K] = U[:, K] scale + U[:, D] S^T`` and ``U'[:, D] = 0``.

    U is ``source``; ``weight`` is changed to U' and returned. If a channel has several columns (after a flatten), the
    delivery applies to each of them.
    """
    if not delivery.delivers and bool((delivery.scale == 1).all()):
        return mask_columns(weight, slot, width, drop)
    index = seats(slot, width)  # channels, places
    per_block = len(slot.channels) // slot.blocks
    rows = len(source) // slot.blocks
    for number in range(slot.blocks):
        out = slice(number * rows, (number + 1) * rows)
        inside = (index >= number * per_block) & (index < (number + 1) * per_block)
        here_k, here_d = inside[keep].any(1), inside[drop].any(1)
        columns_k = index[keep[here_k]] - number * per_block
        columns_d = index[drop[here_d]] - number * per_block
        scale = delivery.scale[here_k].to(source.device)
        if not columns_d.numel() and bool((scale == 1).all()):
            continue  # nothing changes
        s = delivery.matrix[here_k][:, here_d].to(source.device)
        for u, target in zip(few_rows(source[out]), few_rows(weight[out]), strict=True):
            # rows, channels, places, taps
            restored, dropped = u[:, columns_k].to(torch.float64), u[:, columns_d].to(torch.float64)
            restored *= scale.reshape([1, -1] + [1] * (restored.dim() - 2))
            restored += torch.einsum("od...,kd->ok...", dropped, s)
            target[:, columns_k] = restored.to(weight.dtype)
            target[:, columns_d] = 0
    return weight


def mask_columns(
    weight: Float[Tensor, "out columns *taps"], slot: Slot, width: int, drop: Int[Tensor, " dropped"]
) -> Float[Tensor, "out columns *taps"]:
    """Set ``U[:, D] = 0`` in ``weight`` and return it."""
    return zero_columns(weight, carrying(slot, width, drop), slot.blocks)


def zero_columns(
    weight: Float[Tensor, "out columns *taps"], gone: Bool[Tensor, " columns_of_all_blocks"], blocks: int
) -> Float[Tensor, "out columns *taps"]:
    """Set dropped columns to zero, in place; each block of a grouped convolution has its own columns."""
    gone = gone.to(weight.device)
    if blocks == 1:
        return weight.index_fill_(1, gone.nonzero().flatten(), 0)
    parts = weight.unflatten(0, (blocks, -1))  # blocks, rows, columns of a block, taps
    parts.masked_fill_(gone.reshape([blocks, 1, -1] + [1] * (weight.dim() - 2)), 0)
    return weight


def norm_masks(selection: Selection) -> dict[str | Reduction, Bool[Tensor, " channels"]]:
    """The kept channels at each layer norm and at other statistics over dropped channels."""
    kept: dict[str | Reduction, Tensor] = {}
    for choice in selection.choices:
        names = {norm.weight for norm in choice.group.layer_norms}
        for slot in choice.group.carriers:
            if slot.parameter in names:
                here = ~carrying(slot, choice.group.width, choice.drop)
                kept[slot.parameter] = kept[slot.parameter] & here if slot.parameter in kept else here
        for statistic in choice.group.statistics:
            there = torch.tensor(statistic.channels)
            here, key = ~torch.isin(there, torch.tensor(choice.drop)), statistic.reduction
            kept[key] = kept[key] & here if key in kept else here
    return kept


def still_masked(kept: NormMasks, part: Selection) -> dict[str | Reduction, Bool[Tensor, " channels"]]:
    """The kept channels among those that remain after a part of the selection was cut and the rest is masked."""
    cut = norm_masks(part)
    left = {name: mask[cut[name]] if name in cut else mask for name, mask in kept.items()}
    return {name: mask for name, mask in left.items() if not bool(mask.all())}
