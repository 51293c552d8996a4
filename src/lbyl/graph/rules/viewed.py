"""Linear layers whose weight is a view of a parameter with more axes, as where splines expand each input (KAN)."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, fx

from lbyl.graph.builder import Builder, layer_name, output_shape
from lbyl.runtime.reductions import aten_name

_PRODUCTS = ("mul", "multiply")
_VIEWS = ("view", "_unsafe_view", "reshape", "flatten", "contiguous")


def read_through_view(builder: Builder, node: fx.Node, x: Tensor) -> Any:
    """The output of a linear layer whose weight ``[out, in x n]`` is a view of ``[out, in, n]``; None for others.

    Each of the channels that it reads stands for n neighbors. The parameter may be multiplied by another one with a
    number for each pair of channels.
    """
    view = node.args[1]
    source, factor = _behind(builder, view)
    if source is None or not isinstance(view, fx.Node):
        return None
    rows, inputs, *rest = source.meta["val"].shape
    ids = builder.gather(x, -1) if tuple(view.meta["val"].shape) == (rows, inputs * prod(rest)) else None
    if ids is None:
        return None
    name = builder.parameters[source]
    layer = name.rpartition(".")[0] or layer_name(node)
    builder.tie(name, 1, builder.join(ids.reshape(inputs, -1), [1])[:, 0])
    out = builder.produce(node, layer, name, None, rows, 0)
    beside = (each for each in builder.producers.values() if each.layer == layer and each.weight != name)
    for other in (each for each in beside if len(each.ids) == rows):
        builder.ids.ascribe(out, other.ids)  # the sum of a module's own terms is no residual connection
    builder.pure.pop(node, None)  # nothing that follows describes it as a plain layer's output
    builder.step(out, "linear", layer, parametric=True)
    if factor is not None:
        builder.alike[name, builder.parameters[factor]] = 0
    builder.shaped(builder.spread(out, 0, tuple(view.meta["val"].shape)), view, free=1)
    return builder.spread(out, -1, output_shape(node))


def _behind(builder: Builder, value: Any) -> tuple[fx.Node | None, fx.Node | None]:
    """The parameter with more than two axes that a weight is a view of, and the one that it is multiplied by."""
    viewed = False
    while isinstance(value, fx.Node) and value.op == "call_function" and (_is_view(value) or _is_scaled(value)):
        value, viewed = value.args[0], viewed or _is_view(value)
    if not viewed or not isinstance(value, fx.Node) or value.meta["val"].dim() < 3:
        return None, None
    if value in builder.parameters:
        return value, None
    shape, factors = value.meta["val"].shape, value.args[:2] if aten_name(value.target) in _PRODUCTS else ()
    known = [_expanded(each) for each in factors]
    known = [each for each in known if each is not None and each in builder.parameters]
    if len(known) != 2 or known[0].meta["val"].shape == known[1].meta["val"].shape:
        return None, None
    whole, factor = sorted(known, key=lambda each: each.meta["val"].dim(), reverse=True)
    return (whole, factor) if whole.meta["val"].shape == shape else (None, None)


def _is_view(node: fx.Node) -> bool:
    return aten_name(node.target) in _VIEWS


def _is_scaled(node: fx.Node) -> bool:
    """Whether a value is only multiplied by a number."""
    return aten_name(node.target) in _PRODUCTS and isinstance(node.args[1], (int, float))


def _expanded(value: Any) -> fx.Node | None:
    """The value to which axes were added at the end."""
    while isinstance(value, fx.Node) and value.op == "call_function" and aten_name(value.target) == "unsqueeze":
        if value.args[1] not in (-1, value.meta["val"].dim() - 1):
            return None
        source = value.args[0]
        value = source if isinstance(source, fx.Node) else None
    return value if isinstance(value, fx.Node) else None
