"""Which channels go: a ratio for every group, and a criterion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lbyl.errors import InputError
from lbyl.graph import Graph, Group
from lbyl.runtime.seeding import generator_for
from lbyl.selection.criteria.base import Criterion, SeeingCriterion, needs_probes
from lbyl.selection.filters import Filters, State, describe, subset
from lbyl.selection.view import ChannelView, ColumnMoments, readings_of

Ratio = float | Mapping[str, float]

Choose = Callable[[Filters, int, torch.Generator], Int[Tensor, " kept"]]
"""Returns which of some channels to keep: ``choose(filters, count, generator)``."""


@dataclass(frozen=True)
class Choice:
    """The kept channels of one group, ascending."""

    group: Group
    keep: tuple[int, ...]
    filters: Filters | None = field(default=None, compare=False, repr=False)
    """What they were chosen by, where only norms were looked at, so that it takes little memory."""

    @cached_property
    def drop(self) -> tuple[int, ...]:
        """The channels that go, ascending."""
        kept = set(self.keep)
        return tuple(channel for channel in range(self.group.width) if channel not in kept)

    def tensors(self) -> tuple[Int[Tensor, " kept"], Int[Tensor, " dropped"]]:
        """Kept and dropped channels as index tensors."""
        return torch.tensor(self.keep, dtype=torch.int64), torch.tensor(self.drop, dtype=torch.int64)


@dataclass(frozen=True)
class Selection:
    """The choices for all groups that lose channels, and why each other group stays whole."""

    choices: tuple[Choice, ...]
    left: tuple[tuple[str, str], ...]


def kept_count(width: int, ratio: float) -> int:
    """floor(n (1 - ratio) + 1e-9), at least 1.

    >>> kept_count(10, 0.9), kept_count(10, 0.5), kept_count(3, 1 / 3)
    (1, 5, 2)
    """
    return max(1, math.floor(width * (1 - ratio) + 1e-9))


def check_ratio(ratio: Ratio) -> None:
    """Raise InputError for a share outside [0, 1)."""
    for key, share in ratio.items() if isinstance(ratio, Mapping) else [("ratio", ratio)]:
        if not isinstance(key, str):
            raise InputError(f"ratio has the key {key!r}; keys are globs of group and layer names, such as 'layer4.*'")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise InputError(f"{key}={share!r}: the share of channels to drop must be at least 0 and below 1")


def check_scope(scope: str) -> None:
    """Raise InputError for an unknown scope."""
    if scope not in ("inner", "all"):
        raise InputError(f"scope={scope!r}: choose 'inner' (groups that no residual sum couples) or 'all'")


def ratio_for(group: Group, ratio: Ratio, prefix: str = "") -> float:
    """The ratio that applies to a group: the last pattern that matches its full name or a producing layer's."""
    if not isinstance(ratio, Mapping):
        return float(ratio)
    found = 0.0
    for pattern, share in ratio.items():
        if any(fnmatchcase(prefix + name, pattern) for name in (group.name, *group.layers)):
            found = float(share)
    return found


@dataclass(frozen=True)
class ByCriterion:
    """Keep the channels that score highest; among equals, the first.

    Attributes:
        criterion: what scores them.
        moments: what consumers are fed, by the names of their weights, for a criterion that looks at it.
    """

    criterion: Criterion | SeeingCriterion
    moments: Mapping[str, ColumnMoments] = field(default_factory=dict, repr=False)

    def __call__(self, filters: Filters, count: int, generator: torch.Generator) -> Int[Tensor, " kept"]:
        """Which of some channels to keep."""
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
        if isinstance(sees := getattr(self.criterion, "sees", None), str):
            seen = self.moments if needs_probes(self.criterion) else None
            readings = readings_of(filters, members, seen)
            if sees != "consumers" and not readings:
                return part.norms(2)  # no probe came by, so the weights have to tell
            scores = self.criterion.score(ChannelView(part, readings, generator))  # pyright: ignore[reportCallIssue, reportArgumentType]
        else:
            scores = self.criterion.score(part.raw, generator)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if scores.shape != (len(members),):
            raise InputError(
                f"{name}.score returned shape {tuple(scores.shape)} for {len(members)} filters; return one score a row"
            )
        if not bool(torch.isfinite(scores).all()):
            raise InputError(f"{name}.score returned NaN or infinity for a channel of {filters.group.name}")
        return scores

    def norms(self, filters: Filters) -> Float[Tensor, " channels"] | None:
        """The scores, where they are norms of the filters: then no channel's depends on the others."""
        # Of the class itself: who derives from it has another score, as a rule.
        order = vars(type(self.criterion)).get("norm_order")
        return None if order is None else filters.norms(order)


@dataclass(frozen=True)
class Ranking:
    """The channels of a group in the order in which a criterion keeps them.

    Attributes:
        blocks: the channels of each block, best first. Grouped convolutions make several blocks, and all of them keep
            equally many channels.
        scores: the score of each channel among those of its block.
        filters: what was scored, where scores are norms, so that it takes little memory.
    """

    blocks: Int[Tensor, "blocks size"]
    scores: Float[Tensor, " channels"]
    filters: Filters | None = None

    def kept(self, count: int) -> tuple[int, ...]:
        """The channels that stay where each block keeps so many, ascending."""
        return tuple(sorted(self.blocks[:, :count].flatten().tolist()))

    def order(self) -> tuple[int, ...]:
        """All channels, best first, the blocks in turn: any whole round keeps equally many of each block."""
        found: list[int] = []
        for members in self.blocks.T:
            ascending = members.sort().values
            best = torch.argsort(self.scores[ascending], descending=True, stable=True)
            found += ascending[best].tolist()
        return tuple(found)


def blocks_of(group: Group) -> Int[Tensor, "blocks size"]:
    """The channels of each block of a group; blocks are of one size, or the group would stay whole."""
    labels = torch.tensor(group.blocks)
    return torch.argsort(labels, stable=True).reshape(len(labels.unique()), -1)


def ranked(group: Group, state: State, by: ByCriterion, seed: int) -> Ranking:
    """Rank the channels of a group block by block, for widths to be chosen by and channels to be kept by."""
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
        counts: by the index of the group; groups that are not named stay whole.
        uneven: why a residual stream and its heads stay whole, by the stream's name.
    """

    counts: Mapping[int, int]
    uneven: Mapping[str, str] = field(default_factory=dict)


def kept_by_ratio(graph: Graph, ratio: Ratio, path: str = "") -> KeptCounts:
    """The kept counts that a ratio stands for.

    Args:
        graph: the channel graph.
        ratio: a share, or ``{glob: share}`` over group and layer names.
        path: of the submodule that the graph is of; globs are over full names.
    """
    check_ratio(ratio)
    prefix = f"{path}." if path else ""
    shares = {group.name: ratio_for(group, ratio, prefix) for group in graph.groups}
    counts = {
        index: _evenly_kept(group, shares[group.name])
        for index, group in enumerate(graph.groups)
        if shares[group.name] > 0 and group.reason is None
    }
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
    """What a group keeps in all where each of its blocks loses a share."""
    blocks = len(set(group.blocks))
    return blocks * kept_count(group.width // blocks, share)


def _families(graph: Graph) -> dict[str, tuple[Group, ...]]:
    """Streams with the heads that have to lose the same share, by the stream's name."""
    names = dict.fromkeys(group.coupled_with for group in graph.groups if group.coupled_with)
    return {name: (graph.group(name), *(g for g in graph.groups if g.coupled_with == name)) for name in names}


def _same_share(family: Sequence[Group], share: float) -> tuple[dict[str, int], str]:
    """Kept counts of a stream and its heads, or why there are none.

    Each loses the same share, at most the one asked for.
    """
    stream, *heads = family
    parts = {Fraction(math.ceil(group.width * (1 - share) - 1e-9), group.width) for group in heads}
    if len(parts) > 1 or max(parts) == 1:
        counts = ", ".join(str(count) for count in sorted({group.width for group in heads}))
        return {}, f"{stream.name!r} and its {counts} heads can't lose the same share at this ratio"
    part = parts.pop()
    together = {group.name: _evenly_kept(group, float(1 - part)) for group in family}
    if any(together[group.name] != part * group.width for group in family):
        return {}, f"{stream.name!r} comes in blocks, which can't lose {float(1 - part):.1%} each as its heads do"
    return together, ""


def select(graph: Graph, state: State, kept: KeptCounts, scope: str, choose: Choose, seed: int) -> Selection:
    """Choose the kept channels of every group in scope.

    Args:
        graph: the channel graph.
        state: the network's tensors.
        kept: how many channels each group keeps.
        scope: "inner" or "all".
        choose: which channels these are.
        seed: for whatever is drawn at random.

    Raises:
        InputError: an unknown scope.
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
            left.append((group.name, "ratio 0"))
        elif kept.counts[index] >= group.width:
            left.append((group.name, f"{group.width} channels: nothing to drop at this ratio"))
        else:
            found[group.name] = _choice(group, state, kept.counts[index], choose, seed)
    for family in _families(graph).values():
        why = _kept_apart(family, found) or kept.uneven.get(family[0].name, "")
        left += [(group.name, why) for group in family if why and found.pop(group.name, None)]
    return Selection(tuple(found[g.name] for g in graph.groups if g.name in found), tuple(left))


def _kept_apart(family: Sequence[Group], found: Mapping[str, Choice]) -> str:
    """Why a stream and its heads can't be cut together: one of them stays whole. "" where none does."""
    stream, *heads = family
    for group in heads if stream.name in found else [stream]:
        if group.name not in found:
            reason = group.reason or "nothing of it goes"
            return f"it has to lose the same share as {group.name!r}, which stays whole: {reason}"
    return ""


def check_selection(selection: Selection) -> None:
    """Raise InputError where nothing goes, with the reasons."""
    if not selection.choices:
        reasons = "; ".join(f"{name}: {why}" for name, why in selection.left[:3])
        raise InputError(f"no group can be pruned with these settings ({reasons or 'the model has no layer to cut'})")


def _choice(group: Group, state: State, count: int, choose: Choose, seed: int) -> Choice:
    if isinstance(choose, ByCriterion):
        ranking = ranked(group, state, choose, seed)
        return Choice(group, ranking.kept(count // len(ranking.blocks)), ranking.filters)
    filters, blocks = describe(group, state), blocks_of(group)
    keep = []
    for members in blocks:
        generator = generator_for(seed, f"{group.name}#{group.blocks[int(members[0])]}")
        keep.append(members[choose(subset(filters, members), count // len(blocks), generator)])
    return Choice(group, tuple(sorted(torch.cat(keep).tolist())))
