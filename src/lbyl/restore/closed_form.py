"""Restoration from the weights alone: one delivery matrix for each group, folded into the group's consumers."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from lbyl.errors import RestorationError
from lbyl.graph import NOT_OURS, Group, Slot
from lbyl.graph.activations import ACTIVATIONS
from lbyl.restore.base import Restoration, RestorationProblem, Restored, Restorer
from lbyl.restore.error_terms import Terms, reconstruction_terms
from lbyl.restore.targets import Target, find_targets, knowing_taps, on_average
from lbyl.runtime.checks import named_kind
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.seeding import generator_for
from lbyl.selection.filters import Filters, State, columns_second, describe, paper_form_applies, subset
from lbyl.selection.select import Choice, Selection
from lbyl.surgery.masking import Delivery, empty_delivery, fold, nothing_delivered, with_masks


@runtime_checkable
class Delivers(Protocol):
    """An object that computes the delivery matrix of one group from its weights."""

    def deliver(
        self,
        filters: Filters,
        keep: Int[Tensor, " kept"],
        drop: Int[Tensor, " dropped"],
        generator: torch.Generator,
    ) -> Delivery:
        """The delivery matrix from the kept to the dropped channels."""
        ...


class ClosedFormRestorer(Restorer):
    """Restores group by group from the weights alone: a subclass defines :meth:`deliver`."""

    @abstractmethod
    def deliver(
        self,
        filters: Filters,
        keep: Int[Tensor, " kept"],
        drop: Int[Tensor, " dropped"],
        generator: torch.Generator,
    ) -> Delivery:
        """The delivery matrix from the kept to the dropped channels of one group.

        Args:
            filters: the effective filters of the group, one row for each channel.
            keep: indices of the kept channels, ascending.
            drop: indices of the dropped channels, ascending.
            generator: the source of random numbers.

        Returns:
            S, a matrix of ``len(keep)`` rows and ``len(drop)`` columns in float64, and a factor for each kept channel.
        """

    def restore(self, problem: RestorationProblem) -> Restoration:
        """Solve every group and fold its delivery matrix into its consumers."""
        return restore_by_delivery(self, problem)


@dataclass(frozen=True)
class Delivering(ClosedFormRestorer):
    """Makes a restorer of a user's object that only has a ``deliver`` method."""

    own: Delivers

    @property
    def settings(self) -> object:
        """The user's object."""
        return self.own

    def deliver(
        self,
        filters: Filters,
        keep: Int[Tensor, " kept"],
        drop: Int[Tensor, " dropped"],
        generator: torch.Generator,
    ) -> Delivery:
        """The delivery matrix of the user's object."""
        return self.own.deliver(filters, keep, drop, generator)


def restore_by_delivery(restorer: Delivers, problem: RestorationProblem) -> Restoration:
    """Solve every group and fold its delivery matrix into its consumers.

    The closed forms only need the original weights, so the order of the groups does not matter. A layer that reads one
    group and produces another loses columns here, and rows in surgery.
    """
    values: dict[str, Tensor] = {}
    rows = []
    selection, state = problem.selection, tensors_of(problem.model)
    targets: dict[str, Target] = {}
    for index, choice in enumerate(selection.choices):
        started = time.perf_counter()
        keep, drop = choice.tensors()
        delivery, terms = deliver(choice, state, restorer, problem.seed)
        if delivery.shift is not None and not targets:
            found = knowing_taps(find_targets(problem.graph, selection), problem.model, problem.inputs)
            targets = {target.consumer.weight: target for target in found}
        for slot in choice.group.consumers:
            weight = values.get(slot.parameter)
            if weight is None:
                weight = state[slot.parameter].detach().clone()
            source = columns_second(state[slot.parameter].detach(), slot)
            fold(columns_second(weight, slot), source, slot, choice.group.width, keep, drop, delivery)
            values[slot.parameter] = weight
            target = targets.get(slot.parameter)
            if delivery.shift is not None and target and target.bias:
                shift = target.sign * _constant(target, source, slot, drop, delivery.shift)
                old = values.get(target.bias, state[target.bias].detach())
                values[target.bias] = (old.double() + shift).to(old.dtype)
        rows.append(Restored(choice.group.name, terms, time.perf_counter() - started, delivery.note))
        if problem.progress:
            problem.progress("restoring", index + 1, len(selection.choices))
    return Restoration(with_masks(values, selection, state), with_ties(selection, rows))


def _constant(target: Target, source: Tensor, slot: Slot, drop: Tensor, shift: Tensor) -> Tensor:
    """The change of a consumer's output when each of the dropped channels has a constant value."""
    channels = torch.tensor(slot.channels)
    constants = torch.zeros(int(channels.max()) + 1, dtype=torch.float64).index_copy_(0, drop, shift)
    columns = torch.where(channels == NOT_OURS, 0.0, constants[channels.clamp_min(0)])
    return on_average(target, source, columns.to(source.device))


def with_ties(selection: Selection, rows: Sequence[Restored]) -> tuple[Restored, ...]:
    """The rows, with a note where a layer that reads the channels could not be restored."""
    told = []
    for choice, row in zip(selection.choices, rows, strict=True):
        makes = {producer.weight.parameter for producer in choice.group.producers}
        how = {True: "both makes and reads these channels", False: "reads these channels in a way that has no solution"}
        names = [f"{slot.parameter} {how[slot.parameter in makes]}: cut, not restored" for slot in choice.group.tied]
        told.append(replace(row, note="; ".join(filter(None, [row.note, *names]))))
    return tuple(told)


def deliver(choice: Choice, state: State, restorer: Delivers, seed: int) -> tuple[Delivery, Terms | None]:
    """One group's delivery matrix and error terms; grouped convolutions are solved block by block."""
    group = choice.group
    keep, drop = choice.tensors()
    filters = describe(group, state)
    obstacle = paper_form_applies(group, state)
    if obstacle:
        note = f"pruned without restoration: the weights-only form does not apply, {obstacle}"
        return nothing_delivered(len(keep), len(drop), note), None
    whole = empty_delivery(len(keep), len(drop))
    labels = torch.tensor(group.blocks)
    notes, shift = [], torch.zeros(len(drop), dtype=torch.float64)
    for label in torch.unique(labels):
        members = torch.nonzero(labels == label).flatten()
        in_keep, in_drop = torch.isin(keep, members), torch.isin(drop, members)
        part = restorer.deliver(
            subset(filters, members),
            torch.searchsorted(members, keep[in_keep]),
            torch.searchsorted(members, drop[in_drop]),
            generator_for(seed, f"{group.name}#{int(label)}"),
        )
        _check_delivery(part, int(in_keep.sum()), int(in_drop.sum()), restorer, group.name)
        if part.delivers:
            whole.matrix[in_keep.nonzero(), in_drop.nonzero().T] = part.matrix.to(whole.matrix)
        whole.scale[in_keep] = part.scale.to(whole.scale)
        if part.shift is not None:
            shift[in_drop] = part.shift.to(shift)
        notes.append(part.note)
    told = "; ".join(note for note in dict.fromkeys(notes) if note)
    delivery = replace(whole, note=told, shift=shift if bool(shift.any()) else None)
    return delivery, terms_of(choice, filters, delivery, seed)


def _check_delivery(part: object, kept: int, dropped: int, restorer: Delivers, group: str) -> None:
    """Raise RestorationError unless a restorer returned what fits so many channels."""
    who = f"{type(getattr(restorer, 'own', restorer)).__name__}.deliver"
    if not isinstance(part, Delivery):
        raise RestorationError(f"{who} returned {named_kind(part)} for {group!r}; return an lbyl.Delivery")
    wanted = {"matrix": (kept, dropped), "scale": (kept,), "shift": (dropped,)}
    for name, shape in wanted.items():
        tensor: Tensor | None = getattr(part, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise RestorationError(
                f"{who} returned a {name} of {'x'.join(map(str, tensor.shape)) or 'no size'} for {group!r}, where "
                f"{kept} channels stay and {dropped} go: {'x'.join(map(str, shape))}"
            )
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise RestorationError(f"{who} returned a {name} with NaN or infinity for {group!r}")


def terms_of(choice: Choice, filters: Filters, delivery: Delivery, seed: int) -> Terms:
    """The paper's error terms of one group."""
    keep, drop = choice.tensors()
    generator = generator_for(seed, f"{choice.group.name}#terms")
    return reconstruction_terms(filters, keep, drop, delivery, activation_of(choice.group), generator)


def activation_of(group: Group) -> str | None:
    """The activation between a group's producers and consumers, if it is in `lbyl.graph.activations`, else None."""
    return next((step.op for step in group.steps if step.op in ACTIVATIONS), None)
