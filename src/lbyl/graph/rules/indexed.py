"""Writing at indices: messages of graph networks that are summed at their nodes, tokens put back in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lbyl.graph.builder import Builder, layer_name, output_shape
from lbyl.graph.rules import rule
from lbyl.graph.rules.elementwise import merge
from lbyl.graph.rules.recurrent import made_by
from lbyl.graph.union_find import NOBODY, compact, small, varies


@rule(
    *(f"index_{what}" for what in ("add", "copy", "fill", "reduce")),
    *(f"scatter{what}" for what in ("", "_add", "_reduce")),
)
def write(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Values written or added at indices of one axis. Channels along other axes stay separate."""
    name, layer = str(node.target).split(".")[1].rstrip("_"), layer_name(node)
    x, dim, index, new = (*args, *kwargs.values())[:4]
    old, source = builder.shadow(x), builder.shadow(new)
    if old is None or (source is None and not isinstance(new, (int, float, bool))):
        return builder.barrier(node, args, f"{name} in {layer!r} on a value that the trace can't follow")
    old, dim = compact(builder.ids.find(old)), dim % old.dim()
    source = None if source is None or not source.dim() else compact(builder.ids.find(source))
    shapes = [old.shape] if source is None else [old.shape, source.shape]
    # A scatter only fills as much of the other axes as its index has.
    part = name.startswith("scatter") and isinstance(index, Tensor)
    cropped = [d for d in range(old.dim()) if d != dim and part and any(s[d] != index.shape[d] for s in shapes)]
    if any(varies(side, d) for side in (old, source) if side is not None for d in (dim, *cropped)):
        return builder.barrier(node, args, f"{name} along channels in {layer!r}")
    if source is None:
        return old
    return _over(builder, node, old, source.narrow(dim, 0, 1), "add" if name.endswith("add") else name)


@rule("index_put")
def put(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Values written or added at indices of the first axes."""
    layer, indices = layer_name(node), args[1]
    old, new = builder.shadow(args[0]), builder.shadow(args[2])
    picked = [d for d, item in enumerate(indices) if item is not None]
    if old is None or new is None or any(isinstance(indices[d], Tensor) and indices[d].dim() > 1 for d in picked):
        return builder.barrier(node, args, f"index_put in {layer!r} on a value that the trace can't follow")
    old, new = compact(builder.ids.find(old)), compact(builder.ids.find(new))
    if bool((small(new) == NOBODY).all()) and not any(varies(old, d) for d in picked):
        return old
    rest = old.dim() - len(picked)
    if picked != list(range(len(picked))) or any(varies(old, d) for d in picked) or new.dim() > rest + 1:
        return builder.barrier(node, args, f"index_put along channels in {layer!r}")
    if new.dim() == rest + 1:
        if varies(new, 0):
            return builder.barrier(node, args, f"index_put along channels in {layer!r}")
        new = new.narrow(0, 0, 1).squeeze(0)
    added = len(args) > 3 and args[3]
    return _over(builder, node, old, new, "add" if added else "index_put")


def _over(builder: Builder, node: fx.Node, old: Tensor, new: Tensor, name: str) -> Tensor:
    """The shadow of a value in which channels ``new`` were written, which have size 1 along axes of indices."""
    shape = output_shape(node)
    made = made_by(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if made is None or not bool((small(old) == NOBODY).all()):
        return merge(builder, name, layer_name(node), new, old, shape)
    found = compact(new.expand(shape))
    builder.shaped(found, made)  # zeros, whose width the code may spell out
    builder.step(torch.unique(small(found)), name, layer_name(node))
    return found
