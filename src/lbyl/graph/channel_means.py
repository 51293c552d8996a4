"""Means over all channels of a group that the model divides by: RMS norm, global response norm.

Of C channels K stay. If the dropped ones are zero where the mean is taken, the mean over K is C/K times the mean over
C. The same holds for the sum of that mean and a constant eps, if eps is scaled as well. Roots and divisions raise this
factor to a power. It is followed to the weight that it is multiplied with, and this weight takes the inverse. The cut
network then computes exactly what the uncut one does with zeros in the dropped channels.

Where there is no such weight (a pixel norm, a layer norm written by hand), or the constant is no attribute that could
be scaled, the mean is taken over the channels that stay, as a layer norm's is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from lbyl.graph.builder import AverageRecord, Builder, layer_name
from lbyl.runtime.reductions import Reduction

_SAME = (
    "view", "reshape", "to", "_to_copy", "type_as", "clone", "contiguous", "expand", "alias", "detach", "dropout",
    "unsqueeze", "squeeze", "permute", "transpose",
)  # fmt: skip


@dataclass(frozen=True)
class Scaled:
    """A value that a cut multiplies by ``(C/K) ** power`` unless a weight makes up for it."""

    ids: Tensor
    module: str
    reduction: Reduction
    power: float = 1.0
    eps: float | None = None


def follow(builder: Builder, node: fx.Node) -> None:
    """Follow scaled values through a node. Where no weight makes up for the factor, it is a mean of those that stay."""
    for source in dict.fromkeys(node.all_input_nodes):
        scaled = builder.scaled.get(source)
        if scaled is None:
            continue
        weight, passed = _use(builder, node, source, scaled)
        if weight is not None:
            builder.averages.append(
                AverageRecord(scaled.ids, scaled.module, scaled.eps, weight, -scaled.power, scaled.reduction)
            )
        elif passed is not None:
            builder.scaled[node] = passed
        else:
            builder.statistics[scaled.reduction] = scaled.ids


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


def start(builder: Builder, node: fx.Node, ids: Tensor, dim: int) -> None:
    """A mean over the channels along an axis has been taken."""
    builder.scaled[node] = Scaled(ids, layer_name(node), builder.reduction(node, dim))


def settle(builder: Builder, model: nn.Module) -> None:
    """Once all is walked through: keep those averages that weights and attributes make up for, all of them."""
    for record in builder.averages:
        if record.reduction is not None and record.eps and len(attributes_with(model, record.module, record.eps)) != 1:
            builder.statistics[record.reduction] = record.ids
    builder.averages = [record for record in builder.averages if record.reduction not in builder.statistics]


def attributes_with(model: nn.Module, module: str, value: float) -> list[str]:
    """The names of a module's attributes that hold a constant."""
    own = vars(model.get_submodule(module))
    return [name for name, held in own.items() if type(held) is float and held == value]


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1].rstrip("_") if schema else str(node.target)
