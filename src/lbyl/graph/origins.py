"""Follows which of the network's inputs each value comes from, to tell residual connections from other sums."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from lbyl.runtime.reductions import aten_name

Origins = Mapping[fx.Node, frozenset[str]]
"""The names of the inputs that values come from; none for parameters and constants."""

_PRODUCTS = ("mul", "multiply", "div", "divide", "true_divide")


def origins_of(node: fx.Node, known: Origins) -> frozenset[str]:
    """The inputs that the value of an operation comes from, given those of earlier values.

    A factor that is broadcast (a gate, a scale for each channel) does not count.
    """
    given = [each for each in node.all_input_nodes if known.get(each)]
    if aten_name(node.target) in _PRODUCTS and len(given) == 2:
        factor, value = sorted(given, key=_size)
        given = [value] if _size(factor) < _size(value) else given
    return frozenset().union(*(known[each] for each in given))


def are_apart(nodes: tuple[fx.Node, ...], known: Origins) -> bool:
    """Whether values come from inputs that are all different, so that no sum of them passes anything by a layer.

    An example is an image with a number for each channel that follows from the time step of a diffusion. Later in the
    network, where the image has passed such sums, it comes from both inputs, and the number only from one of them.
    """
    seen = [known.get(node, frozenset()) for node in nodes]
    if not all(seen):
        return False
    apart = len(frozenset().union(*seen)) == sum(map(len, seen))
    return apart or (len(seen) == 2 and seen[0] != seen[1] and _size(nodes[0]) != _size(nodes[1]))


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0
