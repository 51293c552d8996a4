"""Finds heads that can only be cut together with the residual connection that they read.

Code such as ``qkv.view(batch, tokens, 3, self.num_heads, width // self.num_heads)`` takes the size of a head from the
width of the layer's input. Heads can then only go if the input loses the same share. So it is with keys and values that
are made from fewer positions, ``reduce(x).reshape(batch, width, -1)``. A trace can't see where a number comes from, so
the network is tried on the meta device, where it has shapes but no values.
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
    suspects: dict[int, list[int]] = defaultdict(list)
    for number, group in enumerate(graph.groups):
        stream = _stream_of(graph, group)
        if stream is not None:
            suspects[stream].append(number)
    if not suspects:
        return graph
    try:
        return replace(graph, groups=_coupled(model, inputs, graph, suspects))
    except Exception:  # on the meta device, a user's code or tensors may do anything; verification then finds out
        return graph


def _coupled(
    model: nn.Module, inputs: ExampleInputs, graph: Graph, suspects: Mapping[int, Sequence[int]]
) -> tuple[Group, ...]:
    """The groups, of which those suspects are coupled that only run if both lose the same share."""
    modules, outline, attribute = dict(model.named_modules()), Outline(model, inputs), follower(model, graph)

    def fails(parts: Mapping[int, int]) -> bool:
        """Whether a cut of some groups to one part in so many less does not run."""
        choices = tuple(_less(graph.groups[number], share) for number, share in parts.items())
        return outline.trouble(Selection(choices, ()), attribute) is not None

    groups, kinds = list(graph.groups), dict[tuple[type[nn.Module], bool], bool]()
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
    return tuple(groups)


def _stream_of(graph: Graph, group: Group) -> int | None:
    """The number of the group that heads, or reduced positions, are made from, if both are equally wide; or None."""
    if not group.prunable or group.coupled_with or group.width < 2 or not group.consumers:
        return None
    if group.layer_norms and not group.coupled:
        sources = _read_by(graph, group, group.width)
        return sources.pop() if len(sources) == 1 else None
    sizes = {_evenly(slot.channels, group.width) for slot in group.consumers}
    size = max(sizes) if all(sizes) else 0  # layers between heads read one number of each
    sources = _read_by(graph, group, group.width * size) if size > 1 else set()
    # Queries are made from the stream itself, and keys from the stream at fewer positions.
    first = {number for number in sources if any(_read_by(graph, graph.groups[n], 0) & {number} for n in sources)}
    sources = first if len(sources) == 2 else sources
    return sources.pop() if len(sources) == 1 else None


def _read_by(graph: Graph, group: Group, width: int) -> set[int]:
    """The groups of this width (0 for any) that the layers read which make a group's channels."""
    weights = {producer.weight.parameter for producer in group.producers}
    return {
        number
        for number, other in enumerate(graph.groups)
        if other.prunable and other is not group
        for slot in other.consumers
        if slot.parameter in weights and width in (0, len(slot.channels))
    }


def _evenly(channels: Sequence[int], width: int) -> int:
    """How many columns each channel has; 0 if they have different numbers of them."""
    counts = Counter(channels)
    return next(iter(counts.values())) if len(counts) == width and len(set(counts.values())) == 1 else 0


def _kind(group: Group, modules: Mapping[str, nn.Module]) -> tuple[type[nn.Module], bool]:
    """The class of the module that contains a group's layers, and which part of its code: equal ones behave alike."""
    return type(modules.get(group.name.rpartition(".")[0], modules[""])), bool(group.layer_norms)


def _less(group: Group, share: int) -> Choice:
    """A cut of one channel in so many, evenly spread."""
    return Choice(group, tuple(channel for channel in range(group.width) if channel % share != share - 1))
