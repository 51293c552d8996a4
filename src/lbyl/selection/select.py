"""Selects the channels to drop, by a ratio for every group and a criterion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lbyl.errors import InputError, LbylError, first_line
from lbyl.graph import Graph, Group
from lbyl.runtime.seeding import generator_for
from lbyl.selection.criteria.base import Criterion, SeeingCriterion, needs_probes
from lbyl.selection.filters import Filters, State, describe, subset
from lbyl.selection.view import ChannelView, ColumnMoments, readings_of

Ratio = float | Mapping[str, float]

Choose = Callable[[Filters, int, torch.Generator], Int[Tensor, " kept"]]
"""A function ``choose(filters, count, generator)`` that returns the channels to keep."""


@dataclass(frozen=True)
class Choice:
    """The kept channels of one group, ascending."""

    group: Group
    keep: tuple[int, ...]
    filters: Filters | None = field(default=None, compare=False, repr=False)
    """The filters, if the criterion only used their norms, so that these need not be computed again."""

    @cached_property
    def drop(self) -> tuple[int, ...]:
        """The dropped channels, ascending."""
        kept = set(self.keep)
        return tuple(channel for channel in range(self.group.width) if channel not in kept)

    def tensors(self) -> tuple[Int[Tensor, " kept"], Int[Tensor, " dropped"]]:
        """Kept and dropped channels as index tensors."""
        return torch.tensor(self.keep, dtype=torch.int64), torch.tensor(self.drop, dtype=torch.int64)


@dataclass(frozen=True)
class Selection:
    """The choices for all groups that lose channels, and for every other group the reason why it is not pruned."""

    choices: tuple[Choice, ...]
    left: tuple[tuple[str, str], ...]


def kept_count(width: int, ratio: float) -> int:
    """The number of kept channels out of n: floor(n (1 - ratio) + 1e-9), at least 1.

    >>> kept_count(10, 0.9), kept_count(10, 0.5), kept_count(3, 1 / 3)
    (1, 5, 2)
    """
    return max(1, math.floor(width * (1 - ratio) + 1e-9))


def checked_ratio(ratio: Ratio) -> Ratio:
    """The ratio with numbers of Python in place of numbers of other libraries.

    Raises:
        InputError: a share is no number in [0, 1), or a key is no text.
    """
    for key, share in ratio.items() if isinstance(ratio, Mapping) else [("ratio", ratio)]:
        if not isinstance(key, str):
            raise InputError(f"ratio has the key {key!r}; keys are globs of group and layer names, such as 'layer4.*'")
        if isinstance(share, bool) or not isinstance(share, Real):
            raise InputError(f"{key}={share!r}: the share of channels to drop must be a number, at least 0 and below 1")
        if not 0 <= share < 1:
            raise InputError(f"{key}={share!r}: the share of channels to drop must be at least 0 and below 1")
    if isinstance(ratio, Mapping):
        return {key: _number(share) for key, share in ratio.items()}
    return _number(ratio)


def _number(share: float) -> float:
    return share if isinstance(share, (int, float)) else float(share)


def check_scope(scope: str) -> None:
    """Raise InputError for an unknown scope."""
    if scope not in ("inner", "all"):
        raise InputError(f"scope={scope!r}: choose 'inner' (groups outside of residual connections) or 'all'")


def ratio_for(group: Group, ratio: Ratio, prefix: str = "") -> float:
    """The ratio of a group: that of the last pattern that matches its full name or the name of a producing layer."""
    if not isinstance(ratio, Mapping):
        return float(ratio)
    found = 0.0
    for pattern, share in ratio.items():
        if any(fnmatchcase(prefix + name, pattern) for name in (group.name, *group.layers)):
            found = float(share)
    return found


@dataclass(frozen=True)
class ByCriterion:
    """Keeps the channels with the highest scores, and the first ones among equal scores.

    Attributes:
        criterion: the criterion that scores channels.
        moments: moments of consumers' inputs, by the names of their weights, for a criterion that needs them.
    """

    criterion: Criterion | SeeingCriterion
    moments: Mapping[str, ColumnMoments] = field(default_factory=dict, repr=False)

    def __call__(self, filters: Filters, count: int, generator: torch.Generator) -> Int[Tensor, " kept"]:
        """The ``count`` channels to keep, ascending."""
        members = torch.arange(len(filters))
        return torch.argsort(self.scores(filters, members, generator), descending=True, stable=True)[:count]

    def scores(
        self, filters: Filters, members: Int[Tensor, " members"], generator: torch.Generator
    ) -> Float[Tensor, " members"]:
        """The scores of some channels of a group."""
        part, norms = subset(filters, members), self.norms(filters)
        if norms is not None:
            return norms[members]
        name = type(self.criterion).__name__
        seeing = isinstance(sees := getattr(self.criterion, "sees", None), str)
        given: tuple[Any, ...] = (part.raw, generator)
        if seeing:
            seen = self.moments if needs_probes(self.criterion) else None
            readings = readings_of(filters, members, seen)
            if sees != "consumers" and not any(bool(reading.square.any()) for reading in readings):
                return part.norms(2)  # no consumer ran on the probes, or an expert got no token
            given = (ChannelView(part, readings, generator),)
        try:
            scores = self.criterion.score(*given)
        except LbylError:
            raise
        except Exception as error:  # a user's criterion may raise anything
            way = f"; sees = {sees!r} says what it gets (lbyl.SeeingCriterion)" if seeing else ""
            if isinstance(error, TypeError) and not seeing:
                way = "; for a view it needs the attribute sees (lbyl.SeeingCriterion)"
            raise InputError(
                f"{name}.score failed on {filters.group.name} ({len(members)} filters): {first_line(error)}{way}"
            ) from error
        if not isinstance(scores, Tensor):
            raise InputError(f"{name}.score returned a {type(scores).__name__}; return a tensor with a score per row")
        if scores.shape != (len(members),):
            raise InputError(
                f"{name}.score returned shape {tuple(scores.shape)} for {len(members)} filters; return a score per row"
            )
        if scores.is_complex():
            raise InputError(f"{name}.score returned complex numbers, which have no order; return real ones")
        if not bool(torch.isfinite(scores).all()):
            raise InputError(f"{name}.score returned NaN or infinity for a channel of {filters.group.name}")
        return scores

    def norms(self, filters: Filters) -> Float[Tensor, " channels"] | None:
        """The scores if they are norms of the filters, which do not depend on other channels; else None."""
        # Only of the class itself, because derived classes usually have other scores.
        order = vars(type(self.criterion)).get("norm_order")
        if order is None:
            return None
        if not isinstance(order, int) or order < 1:
            raise InputError(f"{type(self.criterion).__name__}.norm_order is {order!r}; it must be 1, 2 or so")
        return filters.norms(order)


@dataclass(frozen=True)
class Ranking:
    """The channels of a group, ranked by a criterion.

    Attributes:
        blocks: the channels of each block, best first. Grouped convolutions make several blocks, which must keep
            equally many channels.
        scores: the score of each channel within its block.
        filters: the filters, if scores are their norms.
    """

    blocks: Int[Tensor, "blocks size"]
    scores: Float[Tensor, " channels"]
    filters: Filters | None = None

    def kept(self, count: int) -> tuple[int, ...]:
        """The kept channels if each block keeps ``count``, ascending."""
        return tuple(sorted(self.blocks[:, :count].flatten().tolist()))

    def order(self) -> tuple[int, ...]:
        """All channels, best first, one of each block in turn, so that prefixes hold equally many of each block."""
        found: list[int] = []
        for members in self.blocks.T:
            ascending = members.sort().values
            best = torch.argsort(self.scores[ascending], descending=True, stable=True)
            found += ascending[best].tolist()
        return tuple(found)


def blocks_of(group: Group) -> Int[Tensor, "blocks size"]:
    """The channels of each block of a group. All blocks have the same size."""
    labels = torch.tensor(group.blocks)
    return torch.argsort(labels, stable=True).reshape(len(labels.unique()), -1)


def ranked(group: Group, state: State, by: ByCriterion, seed: int) -> Ranking:
    """Rank the channels of a group block by block."""
    filters, blocks = describe(group, state), blocks_of(group)
    norms = by.norms(filters)
    if norms is not None:
        scores, seen = norms.cpu(), filters
    else:
        parts = [
            by.scores(filters, members, generator_for(seed, f"{group.name}#{group.blocks[int(members[0])]}"))
            for members in blocks
        ]
        scores, seen = torch.empty(group.width, dtype=parts[0].dtype), None
        for members, part in zip(blocks, parts, strict=True):
            scores[members] = part.cpu()
    best = torch.argsort(scores[blocks], dim=1, descending=True, stable=True)
    return Ranking(blocks.gather(1, best), scores, seen)


@dataclass(frozen=True)
class KeptCounts:
    """How many channels each group keeps.

    Attributes:
        counts: kept channels by group index; groups without an entry are not pruned.
        uneven: why a residual connection and its heads are not pruned, by the name of the residual connection's group.
        others: why groups without an entry are not pruned.
    """

    counts: Mapping[int, int]
    uneven: Mapping[str, str] = field(default_factory=dict)
    others: str = "ratio 0"


def kept_by_ratio(graph: Graph, ratio: Ratio, path: str = "") -> KeptCounts:
    """The kept counts for a ratio.

    Args:
        graph: the channel graph.
        ratio: a share, or ``{glob: share}`` over group and layer names.
        path: path of the graph's submodule, because globs match full names.
    """
    ratio = checked_ratio(ratio)
    prefix = f"{path}." if path else ""
    shares = {group.name: ratio_for(group, ratio, prefix) for group in graph.groups}
    counts = {
        index: _evenly_kept(group, shares[group.name])
        for index, group in enumerate(graph.groups)
        if shares[group.name] > 0 and group.reason is None
    }
    counts |= _beside_experts(graph, shares, counts)
    index_of = {group.name: index for index, group in enumerate(graph.groups)}
    uneven: dict[str, str] = {}
    for name, family in _families(graph).items():
        together, why = _same_share(family, shares[name])
        if why:
            uneven[name] = why
        counts |= {index_of[group]: count for group, count in together.items() if index_of[group] in counts}
    return KeptCounts(counts, uneven)


def check_patterns(ratio: Ratio, names: Iterable[str]) -> None:
    """Raise InputError for a pattern that matches no group or layer."""
    names = list(names)
    for pattern in ratio if isinstance(ratio, Mapping) else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"ratio: {pattern!r} matches no group or layer; lbyl.inspect lists their names")


def _evenly_kept(group: Group, share: float) -> int:
    """The number of channels that a group keeps if each of its blocks loses the same share, or nearly.

    A block keeps the multiple of ``group.multiple`` that is nearest to its share, and at least one.
    """
    blocks = len(set(group.blocks))
    count = kept_count(group.width // blocks, share)
    if group.multiple > 1:
        count = max(1, round(count / group.multiple)) * group.multiple
    return blocks * count


def _beside_experts(graph: Graph, shares: Mapping[str, float], counts: Mapping[int, int]) -> dict[int, int]:
    """Kept counts of groups that are a multiple as wide as the experts beside them: the same multiple after the cut.

    Configurations give the width of shared experts as a number of experts, and a rounded count would not be one.
    """
    found = dict[int, int]()
    for index, experts in enumerate(graph.groups):
        blocks = len(set(experts.blocks))
        if experts.multiple == 1 or blocks == 1 or index not in counts:
            continue
        width, beside = experts.width // blocks, f"{experts.name.rpartition('.')[0]}."
        for other, group in enumerate(graph.groups):
            alike = group.name.startswith(beside) and shares[group.name] == shares[experts.name]
            if other in counts and group.multiple == 1 and alike and group.width % width == 0:
                found[other] = group.width // width * (counts[index] // blocks)
    return found


def _families(graph: Graph) -> dict[str, tuple[Group, ...]]:
    """Groups of residual connections with the heads that must lose the same share, by the name of the former."""
    names = dict.fromkeys(group.coupled_with for group in graph.groups if group.coupled_with)
    return {name: (graph.group(name), *(g for g in graph.groups if g.coupled_with == name)) for name in names}


def _same_share(family: Sequence[Group], share: float) -> tuple[dict[str, int], str]:
    """Kept counts of a residual connection's group and its heads, or the reason why there are none.

    All lose the same share, which is at most ``share``.
    """
    stream, *heads = family
    together = math.gcd(*(group.width for group in heads))
    part = Fraction(math.ceil(together * (1 - share) - 1e-9), together)
    if part == 1:
        # Keys may be made from a twin of the residual connection at fewer positions, which goes with it as well.
        said = ", ".join(str(count) for count in sorted({group.width for group in heads} - {stream.width}))
        return {}, f"{stream.name!r} and its {said} heads can't lose the same share at this ratio"
    counts = {group.name: _evenly_kept(group, float(1 - part)) for group in family}
    if any(counts[group.name] != part * group.width for group in family):
        return {}, f"{stream.name!r} has blocks, which can't lose {float(1 - part):.1%} each as its heads do"
    return counts, ""


def select(graph: Graph, state: State, kept: KeptCounts, scope: str, choose: Choose, seed: int) -> Selection:
    """Choose the kept channels of every group in scope.

    Args:
        graph: the channel graph.
        state: the network's tensors.
        kept: how many channels each group keeps.
        scope: "inner" or "all".
        choose: the function that chooses the channels to keep.
        seed: seed of all random numbers.

    Raises:
        InputError: the scope is unknown.
    """
    check_scope(scope)
    found: dict[str, Choice] = {}
    left: list[tuple[str, str]] = []
    for index, group in enumerate(graph.groups):
        if group.reason is not None:
            left.append((group.name, group.reason))
        elif scope == "inner" and group.excluded_from_inner:
            left.append((group.name, f'{group.excluded_from_inner} (scope="all" includes it)'))
        elif index not in kept.counts:
            left.append((group.name, kept.others))
        elif kept.counts[index] >= group.width:
            left.append((group.name, f"{group.width} channels: nothing to drop at this ratio"))
        else:
            found[group.name] = _choice(group, state, kept.counts[index], choose, seed)
    for family in _families(graph).values():
        why = _kept_apart(family, found) or kept.uneven.get(family[0].name, "")
        left += [(group.name, why) for group in family if why and found.pop(group.name, None)]
    return Selection(tuple(found[g.name] for g in graph.groups if g.name in found), tuple(left))


def _kept_apart(family: Sequence[Group], found: Mapping[str, Choice]) -> str:
    """The reason why a residual connection's group and its heads can't be cut together; "" if they can."""
    stream, *heads = family
    for group in heads if stream.name in found else [stream]:
        if group.name not in found:
            reason = group.reason or "none of its channels is dropped"
            return f"it has to lose the same share as {group.name!r}, which is not pruned: {reason}"
    return ""


def check_selection(selection: Selection) -> None:
    """Raise InputError, with the reasons, if no channel is dropped."""
    if not selection.choices:
        reasons = "; ".join(f"{name}: {why}" for name, why in selection.left[:3])
        none = "the model has no layer to cut; layers in a plain list count only in an nn.ModuleList"
        raise InputError(f"no group can be pruned with these settings ({reasons or none})")


def _choice(group: Group, state: State, count: int, choose: Choose, seed: int) -> Choice:
    if isinstance(choose, ByCriterion):
        ranking = ranked(group, state, choose, seed)
        best = ranking.blocks.tolist()
        return Choice(group, _in_every_part(group, best, count // len(best)), ranking.filters)
    filters, blocks = describe(group, state), blocks_of(group)
    best = []
    for members in blocks:
        generator = generator_for(seed, f"{group.name}#{group.blocks[int(members[0])]}")
        chosen = members[choose(subset(filters, members), count // len(blocks), generator)].tolist()
        best.append([*chosen, *(channel for channel in members.tolist() if channel not in set(chosen))])
    return Choice(group, _in_every_part(group, best, count // len(best)))


def _in_every_part(group: Group, best: Sequence[Sequence[int]], count: int) -> tuple[int, ...]:
    """The kept channels, ascending: the best of each block, but at least one of each layer's (``group.parts``).

    A layer that would lose all of its channels keeps its best one, in place of the worst kept one that no other layer
    needs. All blocks keep more if that is not possible.

    Args:
        group: the group.
        best: the channels of each block, best first.
        count: how many each block keeps.
    """
    kept = [list(block[:count]) for block in best]
    for part in group.parts:
        if any(channel in part for block in kept for channel in block):
            continue
        places = ((place, number) for number, block in enumerate(best) for place, c in enumerate(block) if c in part)
        for place, number in sorted(places):
            spare = next((c for c in reversed(kept[number]) if _is_spare(c, kept, group.parts)), None)
            if spare is not None:
                kept[number][kept[number].index(spare)] = best[number][place]
                break
        else:
            return _in_every_part(group, best, count + group.multiple)
    return tuple(sorted(channel for block in kept for channel in block))


def _is_spare(channel: int, kept: Sequence[Sequence[int]], parts: Sequence[frozenset[int]]) -> bool:
    """Whether no part has only this one of the kept channels."""
    others = {each for block in kept for each in block} - {channel}
    return all(part & others for part in parts if channel in part)
