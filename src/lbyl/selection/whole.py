"""Names the parameters that no group reaches, so that a network that hardly shrinks is not left unexplained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from lbyl.graph import Graph

_WORTH_TELLING = 0.05
"""The share of a network's parameters from which on they are named."""


def left_whole(graph: Graph, parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A note on weights that can't become smaller with any settings: how many, which, and why; "" if they are few.

    Args:
        graph: the channel graph.
        parameters: the network's parameters, where tied ones have all of their names.
    """
    reached = {slot.parameter for g in graph.groups if g.prunable for slot in (*g.carriers, *g.consumers)}
    names: dict[int, list[str]] = defaultdict(list)
    sizes: dict[int, int] = {}
    for name, tensor in parameters:
        names[id(tensor)].append(name)
        sizes[id(tensor)] = tensor.numel() if tensor.dim() > 1 else 0
    whole = {own[0]: sizes[key] for key, own in names.items() if sizes[key] and not reached & set(own)}
    tied = {own[0]: own for own in names.values()}
    share = sum(whole.values()) / max(1, sum(sizes.values()))
    if share < _WORTH_TELLING:
        return ""
    largest = sorted(whole, key=lambda name: whole[name], reverse=True)
    more = f" and {len(largest) - 2} more" if len(largest) > 2 else ""
    return (
        f"{share:.0%} of the weights are left whole ({', '.join(largest[:2])}{more}): {_why(graph, tied[largest[0]])}"
    )


def _why(graph: Graph, names: Sequence[str]) -> str:
    """Why no group that can be cut has the parameter with these names."""
    why: Mapping[str, str] = dict(graph.whole)
    if known := next((why[name] for name in names if name in why), ""):
        return known
    for group in graph.groups:
        if group.reason and any(slot.parameter in names for slot in (*group.carriers, *group.consumers)):
            return group.reason
    paths = [name.rpartition(".")[0] for name in names]
    near = [
        barrier
        for barrier in graph.barriers
        if any(f"{path!r}" in barrier or (not path and "weight" in barrier) for path in paths)
    ]
    return next(iter(near), "no operation that can be followed uses it as a layer's weight, if it is used at all")
