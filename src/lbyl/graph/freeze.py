"""The end of a trace: turns what the rules found into a frozen :class:`lbyl.graph.types.Graph`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from lbyl.graph.builder import Builder, ProducerRecord
from lbyl.graph.types import (
    NOT_OURS,
    Average,
    Consumer,
    Graph,
    Group,
    LayerNorm,
    Producer,
    Size,
    Slot,
    Statistic,
    Step,
)
from lbyl.graph.union_find import NOBODY, compact, small, varies


def freeze(builder: Builder) -> Graph:
    """The channel graph of a program that the rules have walked through."""
    _fill_rectangles(builder)
    channels = _Channels(builder)
    _add_slots(builder, channels)
    sizes, broken = _shapes(builder, channels)
    for ids, why in [*builder.pins, *_fixed(builder), *broken]:
        for draft in channels.drafts_with(ids):
            draft.exclude(why)
    _add_operations(builder, channels)
    _add_averages(builder, channels)
    _add_layer_norms(builder, channels)
    _add_statistics(builder, channels)
    names: set[str] = set()
    return Graph(
        tuple(_group(builder, channels, draft, names, sizes) for draft in channels.drafts),
        tuple(_consumers(builder, channels)),
        tuple(dict.fromkeys(map(readable, builder.barriers))),
        sizes,
        computed=tuple(dict.fromkeys(builder.computed)),
        whole=tuple((name, readable(why)) for name, why in builder.whole.items()),
    )


@dataclass
class _Draft:
    """A group before it is frozen; see :class:`lbyl.graph.types.Group`.

    ``equal`` holds representatives of channels that are split into so many blocks of equal size.
    """

    index: int
    width: int
    producers: Sequence[ProducerRecord]
    carriers: list[Slot] = field(default_factory=list)
    consumers: list[Slot] = field(default_factory=list)
    coupled: bool = False
    steps: list[Step] = field(default_factory=list)
    averages: list[Average] = field(default_factory=list)
    layer_norms: list[LayerNorm] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    equal: list[tuple[Tensor, int]] = field(default_factory=list)
    products: list[str] = field(default_factory=list)
    compared: str = ""
    joined: str = ""
    reason: str | None = None

    def exclude(self, reason: str) -> None:
        """Record why the group can't be pruned. The first reason is kept."""
        self.reason = self.reason or readable(reason)


def readable(reason: str) -> str:
    """A reason without ``in ''``, which names the model itself."""
    return reason.replace(" in ''", "")


class _Channels:
    """Which group each id belongs to, and which channel of that group it is.

    The tensors ``group_of`` and ``channel_of`` are indexed by id; only entries at representatives are meaningful.
    ``NOT_OURS`` means that no layer makes the channel.
    """

    def __init__(self, builder: Builder) -> None:
        self.find = builder.ids.find
        self.pairs = builder.pairs
        self.group_of = torch.full((len(builder.ids),), NOT_OURS, dtype=torch.int64)
        self.channel_of = torch.full((len(builder.ids),), NOT_OURS, dtype=torch.int64)
        self.drafts: list[_Draft] = []
        aside = _aside(builder)
        for index, records in enumerate(_link_producers(builder)):
            roots = _distinct(self.find(torch.cat([record.ids for record in records])))
            free = roots[~torch.isin(roots, aside)]
            self.drafts.append(_Draft(index, len(free) or len(roots), records))
            for ids, why in builder.aside if not len(free) else ():
                if bool(torch.isin(self.find(ids), roots).any()):
                    self.drafts[-1].exclude(why)
            free = free if len(free) else roots
            self.group_of[free] = index
            self.channel_of[free] = torch.arange(len(free))

    def drafts_with(self, ids: Tensor) -> list[_Draft]:
        """The groups that some of these ids belong to."""
        found = set(self.group_of.take(self.find(self.pairs.channels(ids)).reshape(-1)).tolist()) - {NOT_OURS}
        return [self.drafts[index] for index in sorted(found)]

    def columns(self, ids: Tensor) -> tuple[tuple[int, int], ...]:
        """The group and the channel of each id."""
        roots = self.find(ids)
        return tuple(zip(self.group_of[roots].tolist(), self.channel_of[roots].tolist(), strict=True))


# -- what the rules have found out, group by group --------------------------------------------------------


def _add_slots(builder: Builder, channels: _Channels) -> None:
    for record in (*builder.slots.values(), *builder.seconds.values()):
        roots = channels.find(record.ids)
        owners, places = channels.group_of[roots], channels.channel_of[roots]
        alone = bool((owners == owners[:1]).all())  # the usual case
        for index in sorted(set(owners[: 1 if alone else None].tolist()) - {NOT_OURS}):
            carried = places if alone else torch.where(owners == index, places, NOT_OURS)
            slot = Slot(record.parameter, record.dim, tuple(carried.tolist()), record.blocks)
            draft = channels.drafts[index]
            (draft.consumers if record.role == "consumer" else draft.carriers).append(slot)


def _add_operations(builder: Builder, channels: _Channels) -> None:
    for ids in builder.sums:
        for draft in channels.drafts_with(ids):
            draft.coupled = True
    for ids, layer in builder.products:
        for draft in channels.drafts_with(ids):
            draft.products.append(layer)
    for ids, name in builder.distances:
        for draft in channels.drafts_with(ids):
            draft.compared = draft.compared or readable(name)
    for ids, why in builder.joins:
        for draft in channels.drafts_with(ids):
            draft.joined = draft.joined or why
    for ids, step in builder.steps:
        for draft in channels.drafts_with(ids):
            if step not in draft.steps:
                draft.steps.append(step)
    for ids, blocks in builder.equal:
        for draft in channels.drafts_with(ids):
            draft.equal.append((channels.find(ids), blocks))


def _add_averages(builder: Builder, channels: _Channels) -> None:
    for record in builder.averages:
        over = channels.drafts_with(record.ids)
        if len(over) == 1 and _evenly(channels, record.ids, over[0].width):
            over[0].averages.append(Average(record.module, record.eps, record.weight, record.power))
            continue
        if record.reduction is not None:
            builder.statistics[record.reduction] = record.ids
            continue
        for draft in over:
            draft.exclude(f"{record.module!r} takes a mean over more channels than those of this group")


def _add_layer_norms(builder: Builder, channels: _Channels) -> None:
    for ids, norm in builder.layer_norms:
        over = channels.drafts_with(ids)
        for draft in over:
            if norm not in draft.layer_norms:
                draft.layer_norms.append(norm)


def _add_statistics(builder: Builder, channels: _Channels) -> None:
    for reduction, ids in builder.statistics.items():
        roots = channels.find(ids)
        owners = channels.group_of[roots]
        over = channels.drafts_with(ids)
        for draft in over:
            carried = torch.where(owners == draft.index, channels.channel_of[roots], NOT_OURS)
            draft.statistics.append(Statistic(reduction, tuple(carried.tolist()), reduction in builder.relative))


def _group(builder: Builder, channels: _Channels, draft: _Draft, names: set[str], sizes: Sequence[Size]) -> Group:
    """The frozen group, under a name that is not yet in ``names``."""
    blocks, trouble = _blocks(channels, draft)
    tied = tuple(slot for slot in draft.carriers if (slot.parameter, slot.dim) in builder.tied)
    if trouble:
        draft.exclude(trouble)
    if not draft.consumers and not tied and not draft.products:
        draft.exclude(_why_unread(draft))
    if draft.width < 2:
        draft.exclude(_why_single(draft))
    slots = {(slot.parameter, slot.dim): slot for slot in draft.carriers}
    producers = tuple(
        Producer(record.layer, slots[record.weight, record.dim], record.bias, tuple(record.stages))
        for record in draft.producers
    )
    # Parameters of the network itself belong to no layer with a name.
    called = [p.layer or p.weight.parameter for p in producers]
    name = next((each for each in called if each not in names), f"{called[0]}#{draft.index}")
    names.add(name)
    return Group(
        name=name,
        width=draft.width,
        producers=producers,
        carriers=tuple(draft.carriers),
        consumers=tuple(draft.consumers),
        blocks=blocks,
        coupled=draft.coupled,
        steps=tuple(draft.steps),
        averages=tuple(draft.averages),
        reason=draft.reason,
        layer_norms=tuple(draft.layer_norms),
        tied=tied,
        statistics=tuple(draft.statistics),
        products=tuple(dict.fromkeys(draft.products)),
        compared=draft.compared,
        pieces=tuple(dict.fromkeys(_pieces(draft, sizes))),
    )


def _pieces(draft: _Draft, sizes: Sequence[Size]) -> Iterator[tuple[int, ...]]:
    """The channels of values that have some of a group's channels and no others."""
    for size in sizes:
        found = {channel for _, channel in size.columns}
        if {index for index, _ in size.columns} == {draft.index} and len(found) < draft.width:
            yield tuple(sorted(found))


def _why_unread(draft: _Draft) -> str:
    """Why there is no weight that would lose columns if a group lost channels."""
    over = next((statistic.reduction for statistic in draft.statistics), None)
    return "no layer reads these channels" + (f": only {over.op} in {over.module!r} is taken over them" if over else "")


def _why_single(draft: _Draft) -> str:
    """Why a group has only one channel."""
    if all(len(record.ids) == 1 for record in draft.producers):
        return "it has a single channel"
    return f"its channels can only be cut all together: {draft.joined or 'the code adds or multiplies them'}"


def _consumers(builder: Builder, channels: _Channels) -> Iterator[Consumer]:
    for record in builder.consumers.values():
        columns = channels.columns(builder.slots[record.weight, record.dim].ids)
        layer, weight, bias, op = record.layer, record.weight, record.bias, record.op
        yield Consumer(layer, weight, bias, op, record.blocks, columns, record.calls, record.dim, record.experts)


# -- what keeps channels from being pruned -----------------------------------------------------------------


def _fixed(builder: Builder) -> Iterator[tuple[Tensor, str]]:
    """Ids along dimensions that must keep their size, and why."""
    for shadow, dims, part, why in builder.fixed:
        final = _cuttable(builder, shadow)
        if any(varies(final, dim) for dim in dims):
            yield small(builder.ids.find(part)).reshape(-1), why


def _fill_rectangles(builder: Builder) -> None:
    """Merge channels that a view arranges in rows and columns, as a channel shuffle does, so that cuts leave no gaps.

    One axis stays free, and the channels along the others, which have one place on it, are cut together. It is the axis
    that the code leaves open; or else the longest, and of equal ones the last, because groups come before what is in
    them.
    """
    changed = True
    while changed:
        changed = False
        for shape in builder.shapes:
            final = _cuttable(builder, shape.shadow)
            moving = _moving(final)
            if len(moving) < 2 or not bool(builder.ids.issued(small(final)).any()):
                continue
            longest = max(moving, key=lambda dim: (final.shape[dim], dim))
            free = shape.free if shape.free in moving else longest
            builder.join(final, [dim for dim in moving if dim != free])
            changed |= not torch.equal(builder.ids.find(final), final)


def _shapes(builder: Builder, channels: _Channels) -> tuple[tuple[Size, ...], list[tuple[Tensor, str]]]:
    """Sizes that the model's code may spell out; and ids that no longer fill a rectangular shape once some are cut."""
    sizes: dict[Size, None] = {}
    broken = []
    for shape in builder.shapes:
        shadow, module = shape.shadow, shape.module
        if builder.pairs.among(shadow):
            continue  # a size of pairs is no multiple of a number of channels; verification finds code that gives one
        final = _cuttable(builder, shadow)
        moving = _moving(final)
        if len(moving) > 1:
            layout = f"a view in {module!r} arranges its channels in rows and columns"
            broken.append((small(final).reshape(-1), f"{layout}; a cut would leave gaps"))
        elif moving:
            columns = channels.columns(small(final).reshape(-1))
            sizes[Size(module, final.shape[moving[0]], columns, moving[0], final.dim())] = None
    return tuple(sizes), broken


def _cuttable(builder: Builder, shadow: Tensor) -> Tensor:
    """A shadow in which channels that always stay are replaced by those beside them, where these do not change.

    An example are keys of which all heads share a part: such a key has one row for each head.
    """
    shadow = compact(builder.ids.find(shadow))
    if not builder.aside:
        return shadow
    stays = torch.isin(small(shadow), _aside(builder)).expand(shadow.shape)
    if not bool(small(stays).any()):
        return shadow
    for dim in _moving(shadow):
        least = torch.where(stays, len(builder.ids), shadow).amin(dim, keepdim=True)
        most = torch.where(stays, NOBODY, shadow).amax(dim, keepdim=True)
        if not bool((least < most).any()):
            shadow, stays = most.expand(shadow.shape), stays.all(dim, keepdim=True).expand(shadow.shape)
    return compact(shadow)


def _moving(shadow: Tensor) -> list[int]:
    """The dimensions along which a compact shadow changes."""
    return [dim for dim in range(shadow.dim()) if varies(shadow, dim)]


def _evenly(channels: _Channels, ids: Tensor, width: int) -> bool:
    """Whether these are all channels of one group, each equally often. Only then one factor corrects every cut."""
    roots = channels.find(ids)
    if bool((channels.group_of[roots] == NOT_OURS).any()):
        return False
    return len(set(torch.bincount(channels.channel_of[roots], minlength=width).tolist())) == 1


def _blocks(channels: _Channels, draft: _Draft) -> tuple[tuple[int, ...], str | None]:
    """Label the channels so that grouped convolutions allow any cut that removes equally many of every label."""
    width = draft.width
    if not draft.equal:
        return (0,) * width, None
    labels = torch.zeros(width, dtype=torch.int64)
    for roots, blocks in draft.equal:
        ours = channels.group_of[roots] == draft.index
        block = torch.arange(len(roots)) * blocks // len(roots)
        # Which blocks each channel occurs in. Channels that occur in the same blocks get the same label.
        seats = torch.unique(channels.channel_of[roots[ours]] * blocks + block[ours])
        counts = torch.bincount(seats // blocks, minlength=width)
        if bool((counts == 1).all()):
            rows = seats % blocks
        else:
            kinds: dict[tuple[int, ...], int] = {}
            each = iter((seats % blocks).tolist())
            rows = torch.tensor([kinds.setdefault(tuple(islice(each, n)), len(kinds)) for n in counts.tolist()])
        labels = torch.unique(labels * (width + blocks) + rows, return_inverse=True)[1]
    sizes = torch.bincount(labels)
    common = math.gcd(*sizes.tolist())
    if common > 1 and len(set(sizes.tolist())) > 1:
        # Blocks of different sizes are made of smaller ones of equal size.
        order = torch.argsort(labels, stable=True)
        labels[order] = torch.arange(width) // common
        sizes = torch.bincount(labels)
    # Numbered in order of appearance.
    names = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    result = tuple(names[label] for label in labels.tolist())
    if len(set(sizes.tolist())) > 1:
        return result, "layers or views split these channels into blocks of different sizes"
    return result, None


# -- which producers belong together -----------------------------------------------------------------------


def _link_producers(builder: Builder) -> list[list[ProducerRecord]]:
    """Producers that share a channel form one group; in order of execution.

    Channels that stay while others of their layer may be cut do not count, unless a layer has no others.
    """
    owner: dict[int, int] = {}
    sets: list[list[ProducerRecord]] = []
    aside = set(_aside(builder).tolist())
    for record in builder.producers.values():
        every = set(builder.ids.find(record.ids).tolist()) - {NOBODY}
        roots = every - aside or every
        met = sorted({owner[root] for root in roots if root in owner})
        if met:
            target = met[0]
            for other in met[1:]:
                sets[target] += sets[other]
                sets[other] = []
                owner = {root: target if index == other else index for root, index in owner.items()}
        else:
            target = len(sets)
            sets.append([])
        sets[target].append(record)
        owner.update(dict.fromkeys(roots, target))
    order = {id(record): position for position, record in enumerate(builder.producers.values())}
    return [sorted(records, key=lambda record: order[id(record)]) for records in sets if records]


def _aside(builder: Builder) -> Tensor:
    """The channels that stay while others of their layer may be cut."""
    return builder.ids.find(torch.cat([torch.zeros(0, dtype=torch.int64), *(ids for ids, _ in builder.aside)]))


def _distinct(ids: Tensor) -> Tensor:
    """Distinct values in order of first appearance."""
    return torch.tensor(list(dict.fromkeys(ids.tolist())), dtype=torch.int64)
