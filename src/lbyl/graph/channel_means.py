"""Means over all channels of a group that the model divides by: RMS norm, global response norm.

Of C channels K stay. If the dropped ones are zero where the mean is taken, the mean over K is C/K times the mean over
C. The same holds for the sum of that mean and a constant eps, if eps is scaled as well. Roots and divisions raise this
factor to a power. It is followed to the weight that it is multiplied with, and this weight takes the inverse. The cut
network then computes exactly what the uncut one does with zeros in the dropped channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from lbyl.graph.builder import AverageRecord, Builder, layer_name

_SAME = (
    "view", "reshape", "to", "_to_copy", "type_as", "clone", "contiguous", "expand", "alias", "detach", "dropout",
    "unsqueeze", "squeeze", "permute", "transpose",
)  # fmt: skip


@dataclass(frozen=True)
class Scaled:
    """A value that a cut multiplies by ``(C/K) ** power`` unless a weight makes up for it."""

    ids: Tensor
    module: str
    power: float = 1.0
    eps: float | None = None


def follow(builder: Builder, node: fx.Node) -> None:
    """Follow scaled values through a node. Where no weight can make up for the factor, the channels can't be cut."""
    for source in dict.fromkeys(node.all_input_nodes):
        scaled = builder.scaled.get(source)
        if scaled is None:
            continue
        weight, passed = _use(builder, node, source, scaled)
        if weight is not None:
            builder.averages.append(AverageRecord(scaled.ids, scaled.module, scaled.eps, weight, -scaled.power))
        elif passed is not None:
            builder.scaled[node] = passed
        else:
            builder.pin(
                scaled.ids,
                f"{_name(node)} uses a mean over channels in {scaled.module!r}; no weight can make up for a cut there",
            )


def _use(builder: Builder, node: fx.Node, source: fx.Node, scaled: Scaled) -> tuple[str | None, Scaled | None]:
    """The weight that makes up for the factor, or the scaled value that comes out."""
    name, args = _name(node), node.args
    if name in _SAME:
        return None, scaled
    if name == "add" and isinstance(args[1], (int, float)) and scaled.power == 1 and scaled.eps is None:
        return None, replace(scaled, eps=float(args[1]))
    if name in ("sqrt", "rsqrt", "reciprocal"):
        return None, replace(scaled, power=scaled.power * {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1}[name])
    if name == "pow" and isinstance(args[1], (int, float)):
        return None, replace(scaled, power=scaled.power * args[1])
    factors = args[1:3] if name == "addcmul" else args[:2] if name in ("mul", "div") else ()
    others = [factor for factor in factors if factor is not source]
    if len(others) != 1 or (isinstance(others[0], fx.Node) and others[0] in builder.scaled):
        return None, None
    weight = _parameter(builder, others[0])
    if name == "div" and args[1] is source:
        return None, replace(scaled, power=-scaled.power)
    if name != "div" and weight is not None:
        return weight, None
    return None, scaled if name != "addcmul" else None


def _parameter(builder: Builder, value: Any) -> str | None:
    """The parameter that a value is, in another shape perhaps."""
    while isinstance(value, fx.Node) and value.op == "call_function" and _name(value) in _SAME:
        value = value.args[0]
    return builder.parameters.get(value) if isinstance(value, fx.Node) else None


def start(builder: Builder, node: fx.Node, ids: Tensor) -> None:
    """A mean over these channels has been taken."""
    builder.scaled[node] = Scaled(ids, layer_name(node))


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1].rstrip("_") if schema else str(node.target)
