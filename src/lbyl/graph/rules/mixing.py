"""Layers that read channels and issue new ones: convolution and linear."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from lbyl.graph.builder import Builder, ParameterRef, layer_name, output_shape
from lbyl.graph.rules import rule
from lbyl.graph.types import Depthwise


def _layer(node: fx.Node, weight: ParameterRef) -> str:
    return weight.name.rpartition(".")[0] or layer_name(node)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str, default: Any = None) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


@rule("linear")
def linear(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """y = x W^T + b, over the last axis."""
    x, weight, bias = args[0], args[1], _argument(args, kwargs, 2, "bias")
    ids = builder.channels(x, -1) if isinstance(x, Tensor) else None
    if ids is None or not isinstance(weight, ParameterRef) or not isinstance(bias, ParameterRef | None):
        return builder.barrier(node, args, f"linear in {layer_name(node)!r} on mixed axes")
    layer, bias_name = _layer(node, weight), bias.name if bias else None
    builder.read(layer, weight.name, bias_name, "linear", ids)
    out = builder.produce(node, layer, weight.name, bias_name, weight.shape[0])
    return builder.spread(out, -1, output_shape(node))


@rule("conv1d", "conv2d", "conv3d")
def conv(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Convolution: dense, grouped (equally many channels a block) or depthwise (channels pass through)."""
    x, weight, bias = args[0], args[1], _argument(args, kwargs, 2, "bias")
    blocks = _argument(args, kwargs, 6, "groups", 1)
    op = str(node.target).split(".")[1]
    if not isinstance(x, Tensor) or not isinstance(weight, ParameterRef) or not isinstance(bias, ParameterRef | None):
        return builder.barrier(node, args, f"{op} in {layer_name(node)!r} with a computed weight")
    axis = x.dim() - len(weight.shape) + 1
    ids = builder.channels(x, axis)
    if ids is None:
        return builder.barrier(node, args, f"{op} in {layer_name(node)!r} on mixed axes")
    layer, bias_name, shape = _layer(node, weight), bias.name if bias else None, output_shape(node)
    if blocks > 1 and weight.shape[1] == 1:
        ids = ids.repeat_interleave(weight.shape[0] // blocks)
        producer = builder.follow(node)
        if producer is not None and weight.shape[0] == blocks:
            producer.stages.append(Depthwise(layer, weight.name, bias_name))
            builder.pure[node] = producer
        else:
            builder.step(ids, f"depthwise {op}", layer, parametric=True)
        ids = builder.slot(weight.name, 0, ids, "carrier")
        if bias_name:
            builder.slot(bias_name, 0, ids, "carrier")
        return builder.spread(ids, axis, shape)
    builder.read(layer, weight.name, bias_name, op, ids, blocks)
    out = builder.produce(node, layer, weight.name, bias_name, weight.shape[0])
    if blocks > 1:
        builder.equal += [(ids, blocks), (out, blocks)]
    return builder.spread(out, axis, shape)
