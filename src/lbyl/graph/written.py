"""Operations in place on a part of a value: what they write is found in the whole value afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lbyl.graph.builder import Builder, layer_name
from lbyl.graph.union_find import compact, small
from lbyl.runtime.reductions import aten_name

_VIEWS = (
    *("slice", "narrow", "select", "view", "unflatten", "transpose", "permute", "movedim", "moveaxis", "swapaxes"),
    *("swapdims", "t", "mT"),
    *("unsqueeze", "squeeze", "alias", "detach", "expand_as"),
)
_LARGEST = 2**24


def write_back(builder: Builder, env: dict[fx.Node, Any], node: fx.Node) -> None:
    """Let the values that an operation has written to through a view carry the channels that it has written.

    Args:
        builder: the state of the trace.
        env: the shadows of all values that are used later, which are changed.
        node: an operation, whose own result is in ``env``. Nothing happens if it does not write to its first argument.
    """
    if not writes(node) or not isinstance(env.get(node), Tensor):
        return
    target, views = node.args[0], list[fx.Node]()
    while isinstance(target, fx.Node) and target.op == "call_function" and aten_name(target.target) in _VIEWS:
        views.append(target)
        target = target.args[0]
    if not views or not isinstance(target, fx.Node) or not isinstance(env.get(target), Tensor):
        return  # nothing reads the whole value later, or it is a parameter
    before = builder.shadow(env[target])
    assert before is not None
    if before.numel() > _LARGEST:
        why = f"a part of a large value is written in place in {layer_name(node)!r}"
        env[target] = builder.barrier(target, [before, env[node]], why)
        return
    whole = before.clone(memory_format=torch.contiguous_format)
    part, parts = whole, dict[fx.Node, Tensor]()
    for view in reversed(views):
        assert callable(view.target)
        part = view.target(part, *view.args[1:], **view.kwargs)
        parts[view] = part
    part.copy_(small(env[node]).expand(part.shape))
    env[target] = compact(whole)
    env.update({view: compact(found) for view, found in parts.items() if view in env})
    builder.written[target] = env[target]
    builder.pieces += [(target, views)]


def settle(builder: Builder) -> None:
    """Record the shapes of values that were written part by part, and of these parts, once all of them are written."""
    for node, shadow in builder.written.items():
        builder.shaped(shadow, node)
    for node, views in builder.pieces:
        part = builder.written[node]
        for view in reversed(views):
            assert callable(view.target)
            if aten_name(view.target) in ("slice", "narrow"):
                dim, start = (item if isinstance(item, int) else 0 for item in (*view.args[1:3], 0, 0)[:2])
                front = range(part.shape[dim])[:start]
                if front:
                    builder.shaped(part.narrow(dim, 0, len(front)), view)
            part = compact(view.target(part, *view.args[1:], **view.kwargs))
            builder.shaped(part, view)


def is_written(node: fx.Node) -> bool:
    """Whether a part of a value is only taken to write to it."""
    return bool(node.users) and all(writes(user) and user.args[0] is node for user in node.users)


def writes(node: fx.Node) -> bool:
    """Whether an operation writes to its first argument."""
    schema = getattr(node.target, "_schema", None)
    told = schema.arguments[0].alias_info if schema is not None and schema.arguments else None
    return told is not None and told.is_write and bool(node.args)
