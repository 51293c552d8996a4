"""Factors that the code computes from a number of channels, as in ``normalize(x, dim=1) * g * x.shape[1] ** 0.5``.

After a cut, the code computes another factor. If a weight is multiplied with the same channels, surgery multiplies that
weight by the quotient of both, as it does where a mean is taken over fewer channels (`lbyl.graph.channel_means`). The
cut network then computes with the factor of the original. So it is for attention with one head, whose scores the code
divides by the root of their width: the layer that makes the queries takes up the quotient. Where there is no such
weight, verification finds the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lbyl.graph.builder import AverageRecord, Builder, ProducerRecord, code_of, layer_name
from lbyl.graph.program import SIZES, is_spelled_out
from lbyl.runtime.reductions import aten_name

_POWERS = (0.5, -0.5, 1.0, -1.0, 0.25, -0.25)
_PRODUCTS = ("mul", "multiply", "div", "divide", "true_divide")
_MOVES = ("permute", "transpose", "flatten", "unflatten", "squeeze", "movedim", "t", "mT")
_SAME = ("to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "view", "reshape", "unsqueeze")


def note(builder: Builder, node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
    """Record the weight that keeps a factor as it is, if a node multiplies channels by a power of their number."""
    name = aten_name(node.target).rstrip("_") if node.op == "call_function" else ""
    if name not in _PRODUCTS or not node.meta.get(SIZES) or not isinstance(env.get(node), Tensor):
        return
    source, number = (*node.args, None, None)[:2]
    if not isinstance(source, fx.Node) or not isinstance(number, float) or number <= 0:
        return
    shadow, sign = env[node], -1 if name.startswith(("div", "true")) else 1
    if _of_scores(builder, node, source, number, sign):
        return
    for dim in range(shadow.dim()):
        power = _power_of(number, shadow.shape[dim])
        ids = builder.channels(shadow, dim) if power is not None else None
        own = builder.parameters.get(source)
        if power is None or ids is None or len(ids.unique()) < 2 or not (own or bool(builder.ids.issued(ids).all())):
            continue
        if _is_kept(builder, node, number, len(ids)):
            return
        alone = own if len(source.users) == 1 and source.meta["val"].numel() == len(ids) else None
        weight = alone or _before(builder, source, len(ids)) or _after(builder, node, len(ids))
        if weight is not None:
            builder.averages.append(AverageRecord(ids, layer_name(node), None, weight, sign * power))
        elif (maker := _maker(builder, source)) is not None:
            _correct(builder, node, maker, sign * power)
        return


def _of_scores(builder: Builder, node: fx.Node, source: Any, number: float, sign: int) -> bool:
    """Whether a factor is a power of the number of channels over which scores of attention with one head are summed.

    The layer that makes the first of both, the queries, then takes up the difference.
    """
    while isinstance(source, fx.Node) and source.op == "call_function" and aten_name(source.target) in _SAME:
        source = source.args[0]
    name = aten_name(source.target) if isinstance(source, fx.Node) and source.op == "call_function" else ""
    if name not in ("matmul", "bmm", "einsum"):
        return False
    factors = source.args[1] if name == "einsum" else source.args
    maker = _maker(builder, factors[0]) if isinstance(factors, (list, tuple)) else None
    power = None if maker is None else _power_of(number, len(maker.ids))
    if maker is None or power is None or _is_kept(builder, node, number, len(maker.ids)):
        return False
    if not any(
        bool(torch.isin(builder.ids.find(maker.ids), builder.ids.find(ids)).all()) for ids, _ in builder.products
    ):
        return False
    _correct(builder, node, maker, sign * power)
    return True


def _maker(builder: Builder, source: Any) -> ProducerRecord | None:
    """The layer that makes a value, if nothing else reads it, and nothing but its axes is changed before."""
    while isinstance(source, fx.Node) and source.op == "call_function" and len(source.users) == 1:
        if source in builder.pure:
            return builder.pure[source] if not builder.pure[source].stages else None
        if aten_name(source.target) not in (*_SAME, *_MOVES):
            return None
        source = source.args[0]
    return None


def _correct(builder: Builder, node: fx.Node, maker: ProducerRecord, power: float) -> None:
    """Let the weight and bias of a layer take up the difference between a factor and that after a cut."""
    for name in (maker.weight, maker.bias):
        if name is not None:
            builder.averages.append(AverageRecord(maker.ids, layer_name(node), None, name, power))


def _power_of(number: float, count: int) -> float | None:
    """The power of a number of channels that a factor is; None if it is none."""
    return next((power for power in _POWERS if count > 1 and math.isclose(number, count**power, rel_tol=1e-9)), None)


def _is_kept(builder: Builder, node: fx.Node, number: float, count: int) -> bool:
    """Whether the module keeps the factor or the number of channels, or its code spells it out."""
    if is_spelled_out(node, count) or is_spelled_out(node, number):
        return True
    widths = builder.numbers.get(code_of(node), frozenset())
    return count in widths or any(math.isclose(number, each, rel_tol=1e-9) for each in builder.factors)


def _before(builder: Builder, source: Any, count: int) -> str | None:
    """The weight that a value was multiplied by, if nothing else reads the product."""
    while isinstance(source, fx.Node) and source.op == "call_function" and len(source.users) == 1:
        name = aten_name(source.target).rstrip("_")
        if name in ("mul", "multiply") and (weight := _weight_in(builder, source, count)) is not None:
            return weight
        if name not in _SAME and name not in _PRODUCTS:
            return None
        source = source.args[0]
    return None


def _after(builder: Builder, node: fx.Node, count: int) -> str | None:
    """The weight that a product is multiplied by, if nothing else reads the product."""
    while len(node.users) == 1:
        given, node = node, next(iter(node.users))
        name = aten_name(node.target).rstrip("_")
        if name in ("mul", "multiply") and (weight := _weight_in(builder, node, count)) is not None:
            return weight
        if name not in _SAME and not (name in _PRODUCTS and node.args[0] is given):
            return None
    return None


def _weight_in(builder: Builder, node: fx.Node, count: int) -> str | None:
    """The parameter with a number for each channel that is one of two factors, if no other operation reads it."""
    for factor in node.args[:2]:
        readers = 1
        while isinstance(factor, fx.Node) and factor.op == "call_function" and aten_name(factor.target) in _SAME:
            readers, factor = max(readers, len(factor.users)), factor.args[0]
        if isinstance(factor, fx.Node) and factor in builder.parameters:
            value = factor.meta.get("val")
            if isinstance(value, Tensor) and value.numel() == count and max(readers, len(factor.users)) == 1:
                return builder.parameters[factor]
    return None
