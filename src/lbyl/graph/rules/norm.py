"""Normalizations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from lbyl.graph.builder import Builder, ParameterRef, layer_name
from lbyl.graph.rules import rule
from lbyl.graph.types import Norm


@rule("batch_norm")
def batch_norm(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """y = gamma (x - mean) / sqrt(var + eps) + beta, a map of each channel by itself."""
    x, *tensors = args[:5]
    axis = 1
    ids = builder.channels(x, axis) if isinstance(x, Tensor) else None
    if ids is None or not all(isinstance(t, ParameterRef | None) for t in tensors) or tensors[2] is None:
        return builder.barrier(node, args, f"batch_norm in {layer_name(node)!r} without running statistics")
    for tensor in tensors:
        if tensor is not None:
            builder.slot(tensor.name, 0, ids, "carrier")
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
