"""Restoration from the weights alone: one delivery matrix a group, folded into the layers that read it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lbyl.graph.activations import ACTIVATIONS
from lbyl.restore.base import Restoration, Restored, Restorer
from lbyl.restore.error_terms import Terms, reconstruction_terms
from lbyl.restore.prune import Prune
from lbyl.runtime.progress import Progress
from lbyl.runtime.seeding import generator_for
from lbyl.selection.filters import State, columns_second, describe, paper_form_applies, subset
from lbyl.selection.select import Choice, Selection
from lbyl.surgery.masking import Delivery, fold, nothing_delivered, with_masks


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

    With ``masked=False`` weights that would change by zeros alone are left out: `masks_of` lays these on later, where
    the uncut network has to run.
    """
    values: dict[str, Tensor] = {}
    rows = []
    for index, choice in enumerate(selection.choices):
        started = time.perf_counter()
        keep, drop = choice.tensors()
        delivery, terms = deliver(choice, state, restorer, seed)
        for slot in choice.group.consumers if masked or not isinstance(restorer, Prune) else ():
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
    return Restoration(with_masks(values, selection, state), tuple(told))


def with_ties(selection: Selection, rows: Sequence[Restored]) -> tuple[Restored, ...]:
    """The rows, with a note where a layer could not be restored, for its weight makes the channels that it reads."""
    told = []
    for choice, row in zip(selection.choices, rows, strict=True):
        names = [f"{slot.parameter} makes these channels and reads them: cut only" for slot in choice.group.tied]
        told.append(replace(row, note="; ".join(filter(None, [row.note, *names]))))
    return tuple(told)


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
