"""Where least squares acts: readers that lose input channels, and where their constants go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lbyl.graph import Graph, Norm, Reader
from lbyl.selection.filters import State
from lbyl.selection.select import Selection


def output_first(reader: Reader, state: State) -> Tensor:
    """A reader's weight, output first, however the layer stores it: a view."""
    weight = state[reader.weight].detach()
    return weight.transpose(0, 1) if reader.dim == 0 else weight


@dataclass(frozen=True)
class Site:
    """A reader that is solved for: mostly one that loses input channels.

    Attributes:
        reader: the layer.
        dropped: for every input channel, whether it goes.
        bias: where a constant can be added to its output: its bias, or the running mean of the batch norm
            that follows it (``sign`` is then -1, for the mean is subtracted); None where there is neither.
        choices: the selection's indices of the groups that it reads and that lose channels.
        norm: the running mean of the batch norm that follows it, if one does.
    """

    reader: Reader
    dropped: Tensor
    bias: str | None
    sign: int
    choices: tuple[int, ...]
    norm: str | None = None

    def weight(self, state: State) -> Tensor:
        """The reader's weight, output first, however the layer stores it: a view."""
        return output_first(self.reader, state)


def sites(graph: Graph, selection: Selection) -> tuple[Site, ...]:
    """Every reader that loses input channels, in execution order."""
    index_of = {group.name: index for index, group in enumerate(graph.groups)}
    dropped_of = {index_of[choice.group.name]: set(choice.drop) for choice in selection.choices}
    order = {index_of[choice.group.name]: number for number, choice in enumerate(selection.choices)}
    norms = following_norms(graph)
    found = []
    for reader in graph.readers:
        dropped = torch.tensor([channel in dropped_of.get(group, ()) for group, channel in reader.columns])
        if bool(dropped.any()):
            groups = dict.fromkeys(group for group, _ in reader.columns if group in order)
            found.append(site_of(reader, dropped, tuple(order[group] for group in groups), norms))
    return tuple(found)


def following_norms(graph: Graph) -> dict[str, Norm]:
    """The batch norm right behind a layer, by the name of the layer's weight."""
    first = {p.weight.parameter: p.stages[0] for group in graph.groups for p in group.producers if p.stages}
    return {weight: stage for weight, stage in first.items() if isinstance(stage, Norm)}


def site_of(reader: Reader, dropped: Tensor, choices: tuple[int, ...], norms: Mapping[str, Norm]) -> Site:
    """A reader with its place for a constant; ``norms`` are the :func:`following_norms`."""
    norm = norms.get(reader.weight)
    following = norm.mean if norm else None
    bias, sign = (reader.bias, 1) if reader.bias else (following, -1 if following else 1)
    return Site(reader, dropped, bias, sign, choices, following)


def as_stored(found: tuple[Site, ...], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values as the layers store them, where the solves had the output first."""
    input_first = {site.reader.weight for site in found if site.reader.dim == 0}
    return {name: v.transpose(0, 1).contiguous() if name in input_first else v for name, v in values.items()}


def masked(site: Site, state: State) -> Tensor:
    """The reader's weight with its dropped columns zero: plain pruning."""
    weight = site.weight(state).clone()
    rows = len(weight) // site.reader.blocks
    for number, gone in enumerate(site.dropped.chunk(site.reader.blocks)):
        weight[number * rows : (number + 1) * rows][:, gone.to(weight.device)] = 0
    return weight
