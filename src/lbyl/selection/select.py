"""Which channels go: a ratio for every group, and a criterion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from lbyl.selection.criteria.base import Criterion
from lbyl.selection.filters import Filters, State, describe, subset

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
        """NormMasks and dropped channels as index tensors."""
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
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise InputError(f"{key}={share!r}: the share of channels to drop must be at least 0 and below 1")


def ratio_for(group: Group, ratio: Ratio) -> float:
    """The ratio that applies to a group: the last pattern that matches its name or a producing layer's."""
    if not isinstance(ratio, Mapping):
        return float(ratio)
    found = 0.0
    for pattern, share in ratio.items():
        if any(fnmatchcase(name, pattern) for name in (group.name, *group.layers)):
            found = float(share)
    return found


@dataclass(frozen=True)
class ByCriterion:
    """Keep the channels that score highest; among equals, the first."""

    criterion: Criterion

    def __call__(self, filters: Filters, count: int, generator: torch.Generator) -> Int[Tensor, " kept"]:
        """Which of some channels to keep."""
        norms = self.norms(filters)
        scores = self.criterion.score(filters.raw, generator) if norms is None else norms
        if scores.shape != (len(filters),):
            raise InputError(
                f"{type(self.criterion).__name__}.score returned shape {tuple(scores.shape)} for {len(filters)} "
                "filters; return one score a row"
            )
        return torch.argsort(scores, descending=True, stable=True)[:count]

    def norms(self, filters: Filters) -> Float[Tensor, " channels"] | None:
        """The scores, where they are norms of the filters: then no channel's depends on the others."""
        # Of the class itself: who derives from it has another score, as a rule.
        order = vars(type(self.criterion)).get("norm_order")
        return None if order is None else filters.norms(order)


def select(graph: Graph, state: State, ratio: Ratio, scope: str, choose: Choose, seed: int) -> Selection:
    """Choose the kept channels of every group in scope.

    Raises:
        InputError: an unknown scope, a ratio out of range, or a pattern that matches no group.
    """
    if scope not in ("inner", "all"):
        raise InputError(f"scope={scope!r}: choose 'inner' (groups that no residual sum couples) or 'all'")
    check_ratio(ratio)
    if isinstance(ratio, Mapping):
        names = {name for group in graph.groups for name in (group.name, *group.layers)}
        for pattern in ratio:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(f"ratio: {pattern!r} matches no group or layer; lbyl.inspect lists their names")
    choices, left = [], []
    for group in graph.groups:
        share = ratio_for(group, ratio)
        if group.reason is not None:
            left.append((group.name, group.reason))
        elif scope == "inner" and group.excluded_from_inner:
            left.append((group.name, f'{group.excluded_from_inner} (scope="all" includes it)'))
        elif share == 0:
            left.append((group.name, "ratio 0"))
        else:
            choice = _choice(group, state, share, choose, seed)
            if len(choice.keep) < group.width:
                choices.append(choice)
            else:
                left.append((group.name, f"{group.width} channels: nothing to drop at this ratio"))
    found = {choice.group.name: choice for choice in choices}
    for name in dict.fromkeys(group.coupled_with for group in graph.groups if group.coupled_with):
        family = (graph.group(name), *(group for group in graph.groups if group.coupled_with == name))
        together, why = _together(family, found, state, ratio_for(family[0], ratio), choose, seed)
        for group in family:
            if group.name in found and not together:
                left.append((group.name, why))
                del found[group.name]
        found |= together
    return Selection(tuple(found[g.name] for g in graph.groups if g.name in found), tuple(left))


def _together(
    family: Sequence[Group], found: Mapping[str, Choice], state: State, share: float, choose: Choose, seed: int
) -> tuple[dict[str, Choice], str]:
    """Choices for a stream and its heads, the same share of each, at most the one asked for; or why there are none."""
    stream, *heads = family
    for group in heads if stream.name in found else [stream]:
        if group.name not in found:
            reason = group.reason or "nothing of it goes"
            return {}, f"it has to lose the same share as {group.name!r}, which stays whole: {reason}"
    parts = {Fraction(math.ceil(group.width * (1 - share) - 1e-9), group.width) for group in heads}
    if len(parts) > 1 or max(parts) == 1:
        counts = ", ".join(str(count) for count in sorted({group.width for group in heads}))
        return {}, f"{stream.name!r} and its {counts} heads can't lose the same share at this ratio"
    part = parts.pop()
    together = {group.name: _choice(group, state, float(1 - part), choose, seed) for group in family}
    if any(len(choice.keep) != part * choice.group.width for choice in together.values()):
        return {}, f"{stream.name!r} comes in blocks, which can't lose {float(1 - part):.1%} each as its heads do"
    return together, ""


def check_selection(selection: Selection) -> None:
    """Raise InputError where nothing goes, with the reasons."""
    if not selection.choices:
        reasons = "; ".join(f"{name}: {why}" for name, why in selection.left[:3])
        raise InputError(f"no group can be pruned with these settings ({reasons or 'the model has no layer to cut'})")


def _choice(group: Group, state: State, share: float, choose: Choose, seed: int) -> Choice:
    filters, labels = describe(group, state), torch.tensor(group.blocks)
    # Blocks are of one size, or the group would stay whole.
    blocks = torch.argsort(labels, stable=True).reshape(len(labels.unique()), -1)
    count = kept_count(blocks.shape[1], share)
    norms = choose.norms(filters) if isinstance(choose, ByCriterion) else None
    if norms is not None:
        best = torch.argsort(norms.cpu()[blocks], dim=1, descending=True, stable=True)[:, :count]
        return Choice(group, tuple(sorted(blocks.gather(1, best).flatten().tolist())), filters)
    keep = []
    for members in blocks:
        generator = generator_for(seed, f"{group.name}#{int(labels[members[0]])}")
        keep.append(members[choose(subset(filters, members), count, generator)])
    return Choice(group, tuple(sorted(torch.cat(keep).tolist())))
