"""What the readers should weigh instead: new weights for every layer that reads a pruned group."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lbyl.activations import ACTIVATIONS
from lbyl.assessment import Assessment
from lbyl.filters import State, carrying, columns_second, describe, few_rows, paper_form_applies, seats, subset
from lbyl.graph import Slot
from lbyl.moments import Progress
from lbyl.restorers import Prune, Restorer
from lbyl.restorers.base import Delivery, nothing_delivered
from lbyl.restorers.terms import Terms, reconstruction_terms
from lbyl.selection import Choice, Selection, generator_for


@dataclass(frozen=True)
class Restored:
    """What restoration did for one group."""

    group: str
    terms: Terms | None
    seconds: float
    note: str
    errors: tuple[float, float] | None = None
    """Relative error of the readers' outputs on the probes: after plain pruning, after restoration."""


@dataclass(frozen=True)
class Restoration:
    """New values of parameters and buffers, at their unpruned shapes: dropped columns are zero."""

    values: dict[str, Tensor]
    groups: tuple[Restored, ...]
    assessment: Assessment | None = None
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


def restore(
    selection: Selection,
    state: State,
    restorer: Restorer,
    seed: int,
    progress: Progress | None = None,
    masked: bool = True,
) -> Restoration:
    """Solve every group and fold its delivery matrix into the layers that read it.

    The closed forms need the original weights only, so the order of the groups does not matter: a layer that
    reads one group and produces another loses columns here and rows in surgery.

    With ``masked=False`` weights that would change by zeros alone are left out: `silences` lays these on later, where
    the uncut network has to run.
    """
    values: dict[str, Tensor] = {}
    rows = []
    for index, choice in enumerate(selection.choices):
        started = time.perf_counter()
        keep, drop = choice.tensors()
        delivery, terms = deliver(choice, state, restorer, seed)
        for slot in choice.group.readers if masked or not isinstance(restorer, Prune) else ():
            weight = values.get(slot.parameter)
            if weight is None:
                weight = state[slot.parameter].detach().clone()
            source = columns_second(state[slot.parameter].detach(), slot)
            fold(columns_second(weight, slot), source, slot, choice.group.width, keep, drop, delivery)
            values[slot.parameter] = weight
        rows.append(Restored(choice.group.name, terms, time.perf_counter() - started, delivery.note))
        if progress:
            progress("restoring", index + 1, len(selection.choices))
    told = rows if isinstance(restorer, Prune) else with_ties(selection, rows)
    return Restoration(silenced(values, selection, state), tuple(told))


def with_ties(selection: Selection, rows: Sequence[Restored]) -> tuple[Restored, ...]:
    """The rows, with a note where a layer could not be restored, for its weight makes the channels that it reads."""
    told = []
    for choice, row in zip(selection.choices, rows, strict=True):
        names = [f"{slot.parameter} makes these channels and reads them: cut only" for slot in choice.group.tied]
        told.append(replace(row, note="; ".join(filter(None, [row.note, *names]))))
    return tuple(told)


def silenced(values: Mapping[str, Tensor], selection: Selection, state: State) -> dict[str, Tensor]:
    """The values, with dropped channels zero from the start where a mean is taken over all channels of a group.

    So they are where a layer reads with the weight that makes the channels: it can't leave them out in another way.
    """
    changed = dict(values)
    for choice in selection.choices:
        for slot in choice.group.carriers if choice.group.averages else choice.group.tied:
            value = changed.get(slot.parameter, state[slot.parameter].detach()).clone()
            rows = carrying(slot, choice.group.width, choice.drop).to(value.device)
            changed[slot.parameter] = value.index_fill_(slot.dim, rows.nonzero().flatten(), 0)
    return changed


Silences = Mapping[str, Sequence[Callable[[Tensor], object]]]
"""What sets the dropped columns of a weight to zero, in place, by the weight's name."""


def silences(selection: Selection) -> Silences:
    """Plain pruning of the readers, to be laid on copies of their weights when these are made."""
    found: dict[str, list[Callable[[Tensor], object]]] = defaultdict(list)
    for choice in selection.choices:
        _, drop = choice.tensors()
        for slot in (*choice.group.readers, *choice.group.tied):
            found[slot.parameter].append(partial(_silence_whole, slot=slot, width=choice.group.width, drop=drop))
    return found


def _silence_whole(weight: Tensor, slot: Slot, width: int, drop: Tensor) -> None:
    silence(columns_second(weight, slot), slot, width, drop)


def deliver(choice: Choice, state: State, restorer: Restorer, seed: int) -> tuple[Delivery, Terms | None]:
    """One group's delivery matrix and its error terms; block by block where grouped convolutions need it."""
    group = choice.group
    keep, drop = choice.tensors()
    filters = (choice.filters if isinstance(restorer, Prune) else None) or describe(group, state)
    obstacle = None if isinstance(restorer, Prune) else paper_form_applies(group, state)
    if obstacle:
        note = f"pruned without restoration: the weights-only form does not apply, {obstacle}"
        return nothing_delivered(len(keep), len(drop), note), None
    activation = next((step.op for step in group.steps if step.op in ACTIVATIONS), None)
    generator = generator_for(seed, f"{group.name}#terms")
    whole = nothing_delivered(len(keep), len(drop))
    if isinstance(restorer, Prune):
        return whole, reconstruction_terms(filters, keep, drop, whole, activation, generator)
    labels = torch.tensor(group.blocks)
    notes = []
    for label in torch.unique(labels):
        members = torch.nonzero(labels == label).flatten()
        in_keep, in_drop = torch.isin(keep, members), torch.isin(drop, members)
        part = restorer.deliver(
            subset(filters, members),
            torch.searchsorted(members, keep[in_keep]),
            torch.searchsorted(members, drop[in_drop]),
            generator_for(seed, f"{group.name}#{int(label)}"),
        )
        whole.matrix[in_keep.nonzero(), in_drop.nonzero().T] = part.matrix
        whole.scale[in_keep] = part.scale
        notes.append(part.note)
    delivery = replace(whole, note="; ".join(note for note in dict.fromkeys(notes) if note))
    return delivery, reconstruction_terms(filters, keep, drop, delivery, activation, generator)


def fold(
    weight: Float[Tensor, "out columns *taps"],
    source: Float[Tensor, "out columns *taps"],
    slot: Slot,
    width: int,
    keep: Int[Tensor, " kept"],
    drop: Int[Tensor, " dropped"],
    delivery: Delivery,
) -> Float[Tensor, "out columns *taps"]:
    """``U'[:, K] = U[:, K] scale + U[:, D] S^T`` and ``U'[:, D] = 0``; ``weight`` is changed and returned.

    Where a channel has several columns (after a flatten), the delivery holds for each of its places.
    """
    if not bool(delivery.matrix.any()) and bool((delivery.scale == 1).all()):
        return silence(weight, slot, width, drop)
    index = seats(slot, width)  # channels, places
    per_block = len(slot.channels) // slot.blocks
    rows = len(source) // slot.blocks
    for number in range(slot.blocks):
        out = slice(number * rows, (number + 1) * rows)
        inside = (index >= number * per_block) & (index < (number + 1) * per_block)
        here_k, here_d = inside[keep].any(1), inside[drop].any(1)
        columns_k = index[keep[here_k]] - number * per_block
        columns_d = index[drop[here_d]] - number * per_block
        if not columns_k.numel() or not columns_d.numel():
            continue
        s = delivery.matrix[here_k][:, here_d].to(source.device)
        scale = delivery.scale[here_k].to(source.device)
        for u, target in zip(few_rows(source[out]), few_rows(weight[out]), strict=True):
            # rows, channels, places, taps
            restored, dropped = u[:, columns_k].to(torch.float64), u[:, columns_d].to(torch.float64)
            restored *= scale.reshape([1, -1] + [1] * (restored.dim() - 2))
            restored += torch.einsum("od...,kd->ok...", dropped, s)
            target[:, columns_k] = restored.to(weight.dtype)
            target[:, columns_d] = 0
    return weight


def silence(
    weight: Float[Tensor, "out columns *taps"], slot: Slot, width: int, drop: Int[Tensor, " dropped"]
) -> Float[Tensor, "out columns *taps"]:
    """``U[:, D] = 0``; ``weight`` is changed and returned."""
    columns = carrying(slot, width, drop).to(weight.device)
    if slot.blocks == 1:
        return weight.index_fill_(1, columns.nonzero().flatten(), 0)
    blocks = weight.unflatten(0, (slot.blocks, -1))  # blocks, rows, columns of a block, taps
    blocks.masked_fill_(columns.reshape([slot.blocks, 1, -1] + [1] * (weight.dim() - 2)), 0)
    return weight
