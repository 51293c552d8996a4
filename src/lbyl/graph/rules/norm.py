"""Normalizations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from lbyl.graph.builder import AverageRecord, Builder, ParameterRef, code_of, layer_name
from lbyl.graph.program import LITERALS, is_spelled_out
from lbyl.graph.rules import rule
from lbyl.graph.types import LayerNorm, Norm
from lbyl.graph.union_find import small
from lbyl.runtime.reductions import aten_name


@rule("batch_norm")
def batch_norm(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """y = gamma (x - mean) / sqrt(var + eps) + beta, a linear map of each single channel."""
    x, *tensors = args[:5]
    axis = 1
    ids = builder.gather(x, axis) if isinstance(x, Tensor) else None
    if ids is None or not all(isinstance(t, ParameterRef | None) for t in tensors):
        what = "on mixed axes" if ids is None else "with computed tensors"
        return builder.barrier(node, args, f"batch_norm in {layer_name(node)!r} {what}")
    for tensor in tensors:
        if tensor is not None:
            builder.slot(tensor.name, 0, ids, "carrier")
    x = builder.spread(ids, axis, x.shape)
    if tensors[2] is None:  # statistics of the batch, each channel by itself
        _remembered(builder, node, x, tensors)
        builder.step(ids, "batch_norm", layer_name(node), parametric=True)
        return x
    gamma, beta, mean, var = (tensor.name if tensor else None for tensor in tensors)
    layer = (mean or "").rpartition(".")[0]
    producer = builder.follow(node)
    if producer is not None:
        assert mean is not None
        assert var is not None
        producer.stages.append(Norm(layer, gamma, beta, mean, var, float(args[7])))
        builder.pure[node] = producer
    else:
        builder.step(ids, "batch_norm", layer, parametric=True)
    return x


def _remembered(builder: Builder, node: fx.Node, x: Tensor, tensors: list[Any]) -> None:
    """Record the width of a norm without parameters, because its module may keep the number in an attribute."""
    if not any(tensors):
        builder.shaped(x, node)


@rule("layer_norm")
def layer_norm(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Layer norm. Over channels alone, its statistics are those of kept channels; see `lbyl.runtime.layer_norms`."""
    x = _learned(builder, args[0])
    weight, bias = (args[i] if len(args) > i else kwargs.get(key) for i, key in ((2, "weight"), (3, "bias")))
    ids = builder.channels(x, -1) if isinstance(x, Tensor) and len(args[1]) == 1 else None
    if ids is not None and weight is None and bias is None and _keeps_width(builder, node, len(ids)):
        return _without_weight(builder, node, x, ids)
    if ids is None or not isinstance(weight, ParameterRef) or not isinstance(bias, ParameterRef | None):
        return _fixed(builder, node, args)
    for tensor in (weight, bias):
        if tensor is not None:
            builder.slot(tensor.name, 0, ids, "carrier")
    builder.layer_norms.append((ids, LayerNorm(layer_name(node), weight.name)))
    builder.shaped(x, node)
    builder.step(ids, "layer_norm", layer_name(node), parametric=True)
    return x


@rule("rms_norm")
def rms_norm(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """RMS norm. Over channels alone, its weight corrects the mean square; see `lbyl.graph.channel_means`.

    Without ``eps`` it adds the machine epsilon of its input's dtype, which is too small to need a correction.
    """
    x, (weight, eps) = _learned(builder, args[0]), (args[i] if len(args) > i else None for i in (2, 3))
    ids = builder.channels(x, -1) if isinstance(x, Tensor) and len(args[1]) == 1 else None
    if ids is not None and weight is None and _keeps_width(builder, node, len(ids)):
        return _without_weight(builder, node, x, ids)
    if ids is None or not isinstance(weight, ParameterRef):
        return _fixed(builder, node, args)
    builder.slot(weight.name, 0, ids, "carrier")
    builder.averages.append(AverageRecord(ids, layer_name(node), eps if eps is None else float(eps), weight.name, 0.5))
    builder.shaped(x, node)
    builder.step(ids, "rms_norm", layer_name(node), parametric=True)
    return x


def _keeps_width(builder: Builder, node: fx.Node, width: int) -> bool:
    """Whether a norm's width follows a cut: the module keeps it, or the code seems to take it from the value.

    Code that spells it out does not follow.
    """
    if LITERALS in node.meta and not is_spelled_out(node, width):
        return True
    kinds = [str(kind) for _, kind in node.meta.get("nn_module_stack", {}).values()]
    own = bool(kinds) and any(name in kinds[-1] for name in ("LayerNorm", "RMSNorm"))
    return own or width in builder.numbers.get(code_of(node), ())


def _without_weight(builder: Builder, node: fx.Node, x: Tensor, ids: Tensor) -> Tensor:
    """A norm without a weight, by whose name it could be known: see `lbyl.runtime.reductions`."""
    builder.statistics[builder.reduction(node, x.dim() - 1)] = ids
    builder.shaped(x, node)
    builder.step(ids, aten_name(node.target), layer_name(node), parametric=True)
    return x


def _learned(builder: Builder, x: Any) -> Any:
    """The value that a norm over its last axis takes.

    A parameter (learned queries, latents) has an id for each element until it meets channels; here these get to be
    along the last axis.
    """
    shadow = builder.shadow(x)
    if shadow is None or shadow.dim() < 2 or bool(builder.ids.issued(small(shadow)).any()):
        return x
    return builder.join(shadow, range(shadow.dim() - 1))


def _fixed(builder: Builder, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Forbid cutting the channels that the statistics are taken over."""
    x, name = args[0], str(node.target).split(".")[1]
    if not isinstance(x, Tensor):
        return builder.barrier(node, args, f"{name} on a value that the trace can't follow")
    over = range(x.dim() - len(args[1]), x.dim())
    builder.fix(x, over, f"{name} {layer_name(node)!r} takes statistics over them")
    builder.step(small(x).reshape(-1), name, layer_name(node), parametric=True)
    return x


@rule("group_norm")
def group_norm(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Group norm: each block of channels is merged into one, because its statistics are taken over the block.

    A group norm with a single block is a layer norm; see `lbyl.runtime.layer_norms`.
    """
    x, blocks = args[0], args[1]
    tensors = [args[i] if len(args) > i else kwargs.get(key) for i, key in ((2, "weight"), (3, "bias"))]
    ids = builder.gather(x, 1) if isinstance(x, Tensor) else None
    if ids is None or not all(isinstance(t, ParameterRef | None) for t in tensors):
        return builder.barrier(node, args, f"group_norm in {layer_name(node)!r} on mixed axes")
    weight = tensors[0]
    if blocks == 1 and not isinstance(weight, ParameterRef):
        builder.fix(x, [1], f"group_norm {layer_name(node)!r} takes statistics over them")
        return x
    for tensor in tensors:
        if tensor is not None:
            builder.slot(tensor.name, 0, ids, "carrier")
    if blocks == 1 and isinstance(weight, ParameterRef):
        builder.layer_norms.append((ids, LayerNorm(layer_name(node), weight.name)))
        builder.step(ids, "group_norm", layer_name(node), parametric=True)
        return builder.spread(ids, 1, x.shape)
    _remembered(builder, node, x.unflatten(1, (blocks, -1)), tensors)
    _remembered(builder, node, x, tensors)
    rows = builder.join(ids.reshape(blocks, -1), [1], f"group_norm {layer_name(node)!r} takes statistics over them")
    builder.step(rows.reshape(-1), "group_norm", layer_name(node), parametric=True)
    return builder.spread(builder.ids.find(ids), 1, x.shape)


@rule("instance_norm")
def instance_norm(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Instance norm: each channel has its own statistics."""
    x, *tensors = args[:5]
    ids = builder.gather(x, 1) if isinstance(x, Tensor) else None
    if ids is None or not all(isinstance(t, ParameterRef | None) for t in tensors):
        return builder.barrier(node, args, f"instance_norm in {layer_name(node)!r} on mixed axes")
    for tensor in tensors:
        if tensor is not None:
            builder.slot(tensor.name, 0, ids, "carrier")
    _remembered(builder, node, builder.spread(ids, 1, x.shape), tensors)
    builder.step(ids, "instance_norm", layer_name(node), parametric=True)
    return builder.spread(ids, 1, x.shape)
