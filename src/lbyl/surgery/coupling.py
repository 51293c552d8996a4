"""Finds heads that can only be cut together with the residual connection that they read.

Code such as ``qkv.view(batch, tokens, 3, self.num_heads, width // self.num_heads)`` takes the size of a head from the
width of the layer's input. Heads can then only go if the input loses the same share. A trace can't see where a number
comes from, so the network is tried on the meta device, where it has shapes but no values.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from lbyl.graph import Graph, Group
from lbyl.runtime.inputs import ExampleInputs
from lbyl.selection.select import Choice, Selection
from lbyl.surgery.verification import Outline, follower


def with_coupled_heads(model: nn.Module, inputs: ExampleInputs, graph: Graph) -> Graph:
    """The graph in which such heads are coupled with the residual connection that they read.

    Args:
        model: the traced model; it is not changed.
        inputs: the example inputs.
        graph: its channel graph.
    """
    modules = dict(model.named_modules())
    suspects: dict[int, list[int]] = defaultdict(list)
    for number, group in enumerate(graph.groups):
        stream = _stream_of(graph, group)
        if stream is not None:
            suspects[stream].append(number)
    if not suspects:
        return graph
    outline, attribute = Outline(model, inputs), follower(model, graph)

    def fails(parts: Mapping[int, int]) -> bool:
        """Whether a cut of some groups to one part in so many less does not run."""
        choices = tuple(_less(graph.groups[number], share) for number, share in parts.items())
        return outline.trouble(Selection(choices, ()), attribute) is not None

    groups, kinds = list(graph.groups), dict[type[nn.Module], bool]()
    for stream, heads in suspects.items():
        for number in heads:
            kind = _kind(groups[number], modules)
            if kind not in kinds:
                kinds[kind] = fails({number: groups[number].width})
        bound = [number for number in heads if kinds[_kind(groups[number], modules)]]
        most = math.gcd(groups[stream].width, *(groups[number].width for number in bound))
        # A trial may also fail by chance, where a number of the code equals another size.
        shares = [most, *(share for share in (2, 3) if most % share == 0 and share < most)] if most > 1 else []
        if bound and any(not fails({number: share for number in (stream, *bound)}) for share in shares):
            for number in bound:
                groups[number] = replace(groups[number], coupled_with=groups[stream].name)
    return replace(graph, groups=tuple(groups))


def _stream_of(graph: Graph, group: Group) -> int | None:
    """The number of the group that heads read, if all heads together are as wide; None for other groups."""
    if not group.prunable or group.coupled_with or group.width < 2 or not group.consumers:
        return None
    sizes = {_evenly(slot.channels, group.width) for slot in group.consumers}
    size = max(sizes) if all(sizes) else 0  # layers between heads read one number of each
    if size < 2:
        return None
    weights = {producer.weight.parameter for producer in group.producers}
    read = {
        number
        for number, other in enumerate(graph.groups)
        if other.prunable and other is not group
        for slot in other.consumers
        if slot.parameter in weights and len(slot.channels) == group.width * size
    }
    return read.pop() if len(read) == 1 else None


def _evenly(channels: Sequence[int], width: int) -> int:
    """How many columns each channel has; 0 if they have different numbers of them."""
    counts = Counter(channels)
    return next(iter(counts.values())) if len(counts) == width and len(set(counts.values())) == 1 else 0


def _kind(group: Group, modules: Mapping[str, nn.Module]) -> type[nn.Module]:
    """The class of the module that contains a group's layers: all of one class share their code."""
    return type(modules.get(group.name.rpartition(".")[0], modules[""]))


def _less(group: Group, share: int) -> Choice:
    """A cut of one channel in so many, evenly spread."""
    return Choice(group, tuple(channel for channel in range(group.width) if channel % share != share - 1))
