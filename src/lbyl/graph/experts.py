"""Gives every expert of a mixture its own channels: a group of their hidden neurons becomes one block for each expert.

A trace does not know which expert a token goes to, so rules follow one expert for all. Where everything that the
channels pass through is stacked by expert, each expert may keep neurons of its own. All keep equally many, because
their matrices are stacked in one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from lbyl.graph.types import NOT_OURS, Consumer, Graph, Group, Producer, Slot

ALIGNED = 8
"""Grouped products need rows of a multiple of 16 bytes, which are 8 numbers in half precision."""


def by_expert(graph: Graph, stacked: Mapping[str, int], lengths: Mapping[str, tuple[int, ...]]) -> Graph:
    """The graph in which hidden neurons of experts are channels of one block for each expert.

    Args:
        graph: the graph as traced, with one channel for the same neuron of all experts.
        stacked: the number of experts by the names of the weights that grouped products read.
        lengths: the shapes of all parameters, to find biases that are stacked as well.
    """
    counts = {index: _experts(group, stacked, lengths) for index, group in enumerate(graph.groups)}
    counts = {index: count for index, count in counts.items() if count}
    groups = tuple(
        _expanded(group, counts[index]) if index in counts else _aligned(group, stacked)
        for index, group in enumerate(graph.groups)
    )
    consumers = tuple(_reading(consumer, counts, graph) for consumer in graph.consumers)
    return replace(graph, groups=groups, consumers=consumers)


def _experts(group: Group, stacked: Mapping[str, int], lengths: Mapping[str, tuple[int, ...]]) -> int:
    """How many experts make the channels of a group, if each of its parameters is stacked by them; else 0."""
    counts = {stacked.get(producer.weight.parameter, 0) for producer in group.producers}
    if len(counts) != 1 or not all(counts) or len(set(group.blocks)) > 1 or group.reason:
        return 0
    (count,) = counts
    others = group.averages or group.layer_norms or group.statistics or group.products or group.tied or group.coupled
    slots = (*group.carriers, *group.consumers)
    alone = all(slot.dim > 0 and slot.blocks == 1 and lengths[slot.parameter][0] == count for slot in slots)
    return count if alone and not others else 0


def _expanded(group: Group, experts: int) -> Group:
    def own(slot: Slot) -> Slot:
        return replace(slot, channels=_for_all(slot.channels, experts, group.width), blocks=experts)

    def made(producer: Producer) -> Producer:
        return replace(producer, weight=own(producer.weight))

    return replace(
        group,
        width=group.width * experts,
        producers=tuple(made(producer) for producer in group.producers),
        carriers=tuple(own(slot) for slot in group.carriers),
        consumers=tuple(own(slot) for slot in group.consumers),
        blocks=tuple(expert for expert in range(experts) for _ in range(group.width)),
        multiple=math.gcd(group.width, ALIGNED),
    )


def _aligned(group: Group, stacked: Mapping[str, int]) -> Group:
    """The group, which keeps rows of a size that grouped products take if they read or make its channels."""
    slots = (*(producer.weight for producer in group.producers), *group.consumers)
    if not any(slot.parameter in stacked for slot in slots):
        return group
    return replace(group, multiple=math.gcd(group.width // len(set(group.blocks)), ALIGNED))


def _for_all(channels: tuple[int, ...], experts: int, width: int) -> tuple[int, ...]:
    """The channels of every expert: those of expert e are numbered from ``e * width``."""
    return tuple(
        channel if channel == NOT_OURS else channel + expert * width
        for expert in range(experts)
        for channel in channels
    )


def _reading(consumer: Consumer, counts: Mapping[int, int], graph: Graph) -> Consumer:
    """The consumer, with columns for each expert where it reads channels of their own."""
    read = {group for group, _ in consumer.columns}
    if len(read) != 1 or not (experts := counts.get(group := read.pop(), 0)):
        return consumer
    channels = _for_all(tuple(channel for _, channel in consumer.columns), experts, graph.groups[group].width)
    return replace(consumer, blocks=experts, columns=tuple((group, channel) for channel in channels))
