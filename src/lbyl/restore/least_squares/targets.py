"""Where least squares acts: consumers that lose input channels, and where their constants go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lbyl.graph import Consumer, Graph, Norm
from lbyl.selection.filters import State
from lbyl.selection.select import Selection
from lbyl.surgery.masking import zero_columns


def output_first(consumer: Consumer, state: State) -> Tensor:
    """A consumer's weight, output first, however the layer stores it: a view."""
    weight = state[consumer.weight].detach()
    return weight.transpose(0, 1) if consumer.dim == 0 else weight


@dataclass(frozen=True)
class Target:
    """A consumer that is solved for: mostly one that loses input channels.

    Attributes:
        consumer: the layer.
        dropped: for every input channel, whether it goes.
        bias: where a constant can be added to its output: its bias, or the running mean of the batch norm
            that follows it (``sign`` is then -1, for the mean is subtracted); None where there is neither.
        choices: the selection's indices of the groups that it reads and that lose channels.
        norm: the running mean of the batch norm that follows it, if one does.
    """

    consumer: Consumer
    dropped: Tensor
    bias: str | None
    sign: int
    choices: tuple[int, ...]
    norm: str | None = None

    def weight(self, state: State) -> Tensor:
        """The consumer's weight, output first, however the layer stores it: a view."""
        return output_first(self.consumer, state)


def find_targets(graph: Graph, selection: Selection) -> tuple[Target, ...]:
    """Every consumer that loses input channels, in execution order."""
    index_of = {group.name: index for index, group in enumerate(graph.groups)}
    dropped_of = {index_of[choice.group.name]: set(choice.drop) for choice in selection.choices}
    order = {index_of[choice.group.name]: number for number, choice in enumerate(selection.choices)}
    norms = following_norms(graph)
    found = []
    for consumer in graph.consumers:
        dropped = torch.tensor([channel in dropped_of.get(group, ()) for group, channel in consumer.columns])
        if bool(dropped.any()):
            groups = dict.fromkeys(group for group, _ in consumer.columns if group in order)
            found.append(target_of(consumer, dropped, tuple(order[group] for group in groups), norms))
    return tuple(found)


def following_norms(graph: Graph) -> dict[str, Norm]:
    """The batch norm right behind a layer, by the name of the layer's weight."""
    first = {p.weight.parameter: p.stages[0] for group in graph.groups for p in group.producers if p.stages}
    return {weight: stage for weight, stage in first.items() if isinstance(stage, Norm)}


def target_of(consumer: Consumer, dropped: Tensor, choices: tuple[int, ...], norms: Mapping[str, Norm]) -> Target:
    """A consumer with its place for a constant; ``norms`` are the :func:`following_norms`."""
    norm = norms.get(consumer.weight)
    following = norm.mean if norm else None
    bias, sign = (consumer.bias, 1) if consumer.bias else (following, -1 if following else 1)
    return Target(consumer, dropped, bias, sign, choices, following)


def as_stored(found: tuple[Target, ...], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values as the layers store them, where the solves had the output first."""
    input_first = {target.consumer.weight for target in found if target.consumer.dim == 0}
    return {name: v.transpose(0, 1).contiguous() if name in input_first else v for name, v in values.items()}


def masked(target: Target, state: State) -> Tensor:
    """The consumer's weight with its dropped columns zero: plain pruning."""
    return zero_columns(target.weight(state).clone(), target.dropped, target.consumer.blocks)
