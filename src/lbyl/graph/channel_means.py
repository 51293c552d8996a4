"""Means over all channels of a group that the model divides by: RMS norm, global response norm.

Suppose K of C channels are kept. If the dropped ones are zero where the mean is taken, the mean over K channels is C/K
times the mean over C channels. The same holds for mean + eps if eps is multiplied by C/K as well. A root or a division
raises the factor C/K to a power. The trace follows this factor to the weight that it is multiplied with, and surgery
multiplies that weight by the inverse. The cut network then computes exactly what the uncut one does with zeros in the
dropped channels.

Some means have no such weight (a pixel norm, a layer norm written by hand), or their eps is not an attribute that could
be changed. Others are taken where dropped channels are not zero: of squared differences to a mean, or behind a sigmoid.
These are taken over the kept channels, as in a layer norm.
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
_FROM_ZERO = frozenset((
    "sigmoid", "hardsigmoid", "log_sigmoid", "softplus", "exp", "exp2", "log", "log2", "log10", "cos", "cosh", "acos",
    "erfc", "logit", "reciprocal", "rsqrt", "softmax", "_softmax", "log_softmax", "fill", "logical_not", "eq", "ge",
    "le", "bucketize", "searchsorted", "isin", "isclose", "lgamma", "digamma", "special_expit", "special_i0",
    "special_i0e", "special_ndtr", "special_log_ndtr", "special_ndtri", "special_erfcx", "logaddexp", "logaddexp2",
    "nextafter", "one_hot",
))  # fmt: skip
"""Operations that do not return zero for zero."""
_SUMS = frozenset(("add", "sub", "rsub", "subtract", "clamp_min", "maximum", "fmax"))
_ELEMENTWISE = frozenset((
    *_SAME, *_SUMS, "mul", "multiply", "div", "divide", "pow", "square", "abs", "neg", "relu", "gelu", "silu", "tanh",
    "sqrt", "leaky_relu", "elu", "clamp", "sign", "softsign", "mish", "hardswish", "where", "masked_fill", "flatten",
))  # fmt: skip


@dataclass(frozen=True)
class Scaled:
    """A value that a cut multiplies by ``(C/K) ** power`` unless a weight corrects this."""

    ids: Tensor
    module: str
    reduction: Reduction
    power: float = 1.0
    eps: float | None = None


def follow(builder: Builder, node: fx.Node) -> None:
    """Follow scaled values through a node. Where no weight can correct the factor, the mean is over kept channels."""
    if node.op == "call_function" and _is_shifted(builder, node):
        builder.shifted.add(node)
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
    """The weight that can correct the factor, or else the scaled value that the node returns."""
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
    """The name of the parameter that a value is, possibly reshaped; None for other values."""
    while isinstance(value, fx.Node) and value.op == "call_function" and _name(value) in _SAME:
        value = value.args[0]
    return builder.parameters.get(value) if isinstance(value, fx.Node) else None


def start(builder: Builder, node: fx.Node, ids: Tensor, dim: int) -> None:
    """Record a mean over the channels along an axis."""
    reduction = builder.reduction(node, dim)
    if any(source in builder.shifted for source in node.all_input_nodes):
        builder.statistics[reduction] = ids
        return
    builder.scaled[node] = Scaled(ids, layer_name(node), reduction)


def _is_shifted(builder: Builder, node: fx.Node) -> bool:
    """Whether a value may not be zero where the channels that it comes from are."""
    name, sources = _name(node), node.all_input_nodes
    if name in _FROM_ZERO:
        return True
    if name not in _ELEMENTWISE:
        return False
    if name in _SUMS:
        added = any(isinstance(value, (int, float)) and value for value in node.args[:2])
        if added or any(source in builder.scaled or _is_spread(builder, source, node) for source in sources):
            return True
        return any(source in builder.shifted for source in sources)
    if name in ("mul", "multiply"):
        # One factor that is zero suffices, as in x * sigmoid(x).
        sources = [each for each in sources if each not in builder.parameters and not _is_spread(builder, each, node)]
        return bool(sources) and all(source in builder.shifted for source in sources)
    return bool(sources) and sources[0] in builder.shifted


def _is_spread(builder: Builder, source: fx.Node, node: fx.Node) -> bool:
    """Whether a value, which is no parameter, is the same along an axis of the result."""
    if source in builder.parameters:
        return False
    given, made = (getattr(each.meta.get("val"), "shape", ()) for each in (source, node))
    return len(given) == len(made) and any(a == 1 != b for a, b in zip(given, made, strict=True))


def settle(builder: Builder, model: nn.Module) -> None:
    """After the walk, keep only the averages that a weight and, where there is an eps, an attribute can correct."""
    for record in builder.averages:
        if record.reduction is not None and record.eps and len(attributes_with(model, record.module, record.eps)) != 1:
            builder.statistics[record.reduction] = record.ids
            if record.power == 1:  # a global response norm divides by it
                builder.relative.add(record.reduction)
    builder.averages = [record for record in builder.averages if record.reduction not in builder.statistics]


def attributes_with(model: nn.Module, module: str, value: float) -> list[str]:
    """The names of a module's attributes that hold this value."""
    own = vars(model.get_submodule(module))
    return [name for name, held in own.items() if type(held) is float and held == value]


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1].rstrip("_") if schema else str(node.target)
