"""Operations that only move data: they act on the ids just as they act on the values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lbyl.graph.builder import Builder, layer_name, output_shape
from lbyl.graph.ids import NOBODY, compact, varies
from lbyl.graph.rules import rule


@rule(
    "permute", "transpose", "t", "unsqueeze", "squeeze", "select", "slice", "expand", "expand_as", "repeat", "flip",
    "chunk", "split", "split_with_sizes", "unbind", "movedim", "swapaxes", "narrow", "unflatten", "tile", "roll",
    "numpy_T", "broadcast_to", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "tensor_split",
)  # fmt: skip
def move(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply the operation itself to the ids."""
    x = builder.shadow(args[0])
    if x is None:
        return builder.barrier(node, args, f"{node.target} on an unknown value")
    assert callable(node.target)
    moved = node.target(x, *args[1:], **kwargs)
    return [compact(m) for m in moved] if isinstance(moved, (list, tuple)) else compact(moved)


@rule("view", "reshape", "_unsafe_view", "flatten", "view_as", "reshape_as")
def reshape(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new shape; ids that end up along one axis in some pattern are the index map of what reads them."""
    x = builder.shadow(args[0])
    if x is None:
        return builder.barrier(node, args, f"{node.target} on an unknown value")
    return compact(x.reshape(output_shape(node)))


@rule("cat", "concat", "concatenate", "stack")
def cat(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Concatenation: groups stay apart."""
    shadows = [builder.shadow(item) for item in args[0]]
    if any(shadow is None for shadow in shadows):
        return builder.barrier(node, args, f"{node.target} on an unknown value")
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    join = torch.stack if "stack" in str(node.target) else torch.cat
    return compact(join([s for s in shadows if s is not None], dim))


@rule("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def pad(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Padding along axes that carry no channels; a padded channel axis has a hard-coded width."""
    x = args[0]
    if not isinstance(x, Tensor):
        return builder.barrier(node, args, f"{node.target} on an unknown value")
    x, shape = compact(builder.ids.find(x)), output_shape(node)
    changed = [d for d in range(x.dim()) if shape[d] != x.shape[d]]
    if any(varies(x, d) for d in changed):
        return builder.barrier(node, args, f"pad along channels in {layer_name(node)!r}")
    for d in changed:
        x = x.narrow(d, 0, 1)
    return x.expand(shape)


@rule("index_select")
def index_select(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Picking along an axis by indices that the trace does not know."""
    x = args[0]
    if not isinstance(x, Tensor) or varies(compact(builder.ids.find(x)), args[1]):
        return builder.barrier(node, args, f"index_select along channels in {layer_name(node)!r}")
    return x.narrow(args[1], 0, 1).expand(output_shape(node))


@rule(
    "zeros_like",
    "ones_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "zeros",
    "ones",
    "full",
    "arange",
    "empty",
)
def constant(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A value made from a shape alone."""
    return torch.full((), NOBODY, dtype=torch.int64).expand(output_shape(node))
