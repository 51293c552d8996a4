"""Pooling, resampling and reductions over axes that carry no channels."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, fx

from lbyl.graph import channel_means as averages
from lbyl.graph.builder import Builder, layer_name, nobody_like, output_shape
from lbyl.graph.rules import rule
from lbyl.graph.union_find import compact, small, varies

_POOLS = [f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)]
_RESAMPLE = [f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "bilinear2d", "bicubic2d", "trilinear3d")]


@rule(*_POOLS, *_RESAMPLE)
def pool(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pooling over the trailing axes: each channel by itself."""
    name = str(node.target).split(".")[1]
    match = re.search(r"(\d)d", name)
    assert match is not None
    x = args[0]
    if not isinstance(x, Tensor):
        return builder.barrier(node, args, f"{name} on a value that the trace can't follow")
    x, shape = compact(builder.ids.find(x)), output_shape(node)
    spatial = range(x.dim() - int(match[1]), x.dim())
    if any(varies(x, d) for d in spatial):
        return builder.barrier(node, args, f"{name} over channels in {layer_name(node)!r}")
    for d in spatial:
        x = x.narrow(d, 0, 1)
    builder.step(x.reshape(-1), name, layer_name(node))
    return x.expand(shape)


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "norm", "logsumexp", "linalg_vector_norm", "max", "min", "softmax",
    "_softmax", "log_softmax", "cumsum",
)  # fmt: skip
def reduce(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What takes several elements along some axes together keeps channels apart that run along other axes.

    Where channels run along both (radix splits, heads), those that are taken together go together.
    """
    name, x = str(node.target).split(".")[1], args[0]
    position = 2 if name in ("linalg_vector_norm", "norm") else 1
    dims = args[position] if len(args) > position else kwargs.get("dim")
    if not isinstance(x, Tensor) or dims is None or isinstance(dims, Tensor):
        return builder.barrier(node, args, f"{name} over all axes in {layer_name(node)!r}")
    x = compact(builder.ids.find(x))
    dims = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
    if any(varies(x, d) for d in dims):
        if not any(varies(x, d) for d in range(x.dim()) if d not in dims):
            if name == "mean" and sum(varies(x, d) for d in dims) == 1:
                averages.start(builder, node, small(x).reshape(-1))
                return nobody_like(node)
            return builder.barrier(node, args, f"{name} over channels in {layer_name(node)!r}")
        x = compact(builder.ids.find(builder.join(x, dims)))
    builder.step(small(x).reshape(-1), name, layer_name(node))
    result = node.meta["val"]
    if not isinstance(result, Tensor):
        for d in dims:
            x = x.narrow(d, 0, 1)
        return [x.reshape(tuple(item.shape)) for item in result]
    if tuple(result.shape) == tuple(x.shape):
        return x
    for d in dims:
        x = x.narrow(d, 0, 1)
    return x.reshape(output_shape(node))
