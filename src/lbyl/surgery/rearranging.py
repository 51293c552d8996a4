"""Layers that rearrange axes by a pattern, as those of einops do: the lengths that they keep follow a cut.

A layer ``Rearrange("b n (h d) -> b h n d", h=8)`` looks up the length of an axis by its name. The pattern says which
axis of a view each name belongs to, so that a length that equals another one by chance stays as it is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from lbyl.graph import Size

_OPEN = "..."
"""Stands for any number of axes in a pattern."""


def is_rearranging(module: nn.Module) -> bool:
    """Whether a module keeps a pattern and the lengths of axes in it, as layers of einops do."""
    kept = vars(module)
    pattern, lengths = kept.get("pattern"), kept.get("axes_lengths")
    return isinstance(pattern, str) and pattern.count("->") == 1 and isinstance(lengths, dict)


def shrinking_lengths(
    module: Any, sizes: Sequence[Size], gone: Collection[tuple[int, int]]
) -> Iterator[tuple[str, int, int]]:
    """The names of axes of a rearranging module that get shorter, with their old and new lengths.

    Args:
        module: the module; see :func:`is_rearranging`.
        sizes: sizes of the views in it, and the channels along them.
        gone: the channels that are dropped, as in :attr:`lbyl.graph.Size.columns`.
    """
    wanted: dict[str, set[int]] = defaultdict(set)
    for size in sizes:
        stays = torch.tensor([column not in gone for column in size.columns])
        for layout in _layouts(module.pattern, size.rank):
            names = layout[size.axis]
            lengths = _lengths(names, module.axes_lengths, size.value)
            for place, name in enumerate(names if lengths else ()):
                if name in module.axes_lengths:
                    rows = stays.reshape(lengths).movedim(place, 0).flatten(1) if len(names) > 1 else stays[:, None]
                    wanted[name].add(int(rows.any(1).sum()))
    for name, new in wanted.items():
        if len(new) == 1 and new != {module.axes_lengths[name]}:
            yield name, module.axes_lengths[name], new.pop()


def set_length(module: Any, name: str, length: int) -> None:
    """Set the length of an axis in all places where a rearranging module keeps it."""
    module.axes_lengths = {**module.axes_lengths, name: length}
    if "_axes_lengths" in vars(module):
        module._axes_lengths = tuple(module.axes_lengths.items())
    for making in ("recipe", "multirecipe"):  # what the module makes of its pattern; older versions put lengths in it
        if f"_{making}" in vars(module):
            setattr(module, f"_{making}", getattr(module, making)())


def _layouts(pattern: str, rank: int) -> Iterator[list[list[str]]]:
    """The names along each axis of the views that a pattern leads to, of those with so many axes.

    First, the axes in parentheses are split, and in the end, other ones are merged.
    """
    left, right = (_groups(side) for side in pattern.split("->"))
    split = [group if group == [_OPEN] else [name] for group in left for name in group]
    for groups, layout in ((left, split), (right, right)):
        if any(len(group) != 1 for group in groups):
            missing = rank - len(layout) + 1
            if [_OPEN] in layout and missing >= 0:
                place = layout.index([_OPEN])
                layout = [*layout[:place], *([_OPEN] for _ in range(missing)), *layout[place + 1 :]]
            if len(layout) == rank:
                yield layout


def _groups(side: str) -> list[list[str]]:
    """The names in one side of a pattern, for each axis; axes of length one have none."""
    found = re.findall(r"\([^)]*\)|[^\s()]+", side)
    return [[name for name in group.strip("()").split() if name != "1"] for group in found]


def _lengths(names: Sequence[str], known: dict[str, int], size: int) -> tuple[int, ...]:
    """The lengths of axes that together have a size; empty where they do not fit it, or are not determined by it."""
    given = [int(name) if name.isdecimal() else known.get(name) for name in names]
    rest, left = divmod(size, prod(length for length in given if length is not None))
    if left or given.count(None) > 1 or (None not in given and rest != 1):
        return ()
    return tuple(rest if length is None else length for length in given)
