"""A traced program: the operations of one forward pass, and the names of the parameters that they use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

_LONGEST = 2**14
_MOST_BEHIND = 64
CONSTANT = "constant"
"""Marks in ``node.meta`` a tensor that is neither an input nor a parameter or buffer, and turns up during the run."""
ORIGIN = "origin"
"""In ``node.meta`` of a tensor that is no parameter: what it is, and how it could be cut, if it has a name."""
LINE = "line"
"""In ``node.meta``: the line of the code that made the call, such as ``net.py:12``."""
CODE = "code"
"""In ``node.meta``: the path of the module whose code made the call, if Python knows."""
SETTING = "_has_compatible_shallow_copy_type"
"""The only operation that PyTorch calls for ``tensor.data = value``: it asks whether both are of one kind."""
LITERALS = "literals"
"""In ``node.meta``: numbers and tuples among that code's constants, free variables and globals."""
SIZES = "sizes"
"""In ``node.meta``: whether that code asks a value for its size."""


def is_spelled_out(node: fx.Node, number: float) -> bool:
    """Whether the code that made a call has this number in it, as one of the same type."""
    return _holds(node.meta.get(LITERALS, ()), number)


def _holds(values: tuple[object, ...], number: float) -> bool:
    """Whether a number is among values, or in tuples among them."""
    return any(
        _holds(value, number) if isinstance(value, tuple) else type(value) is type(number) and value == number
        for value in values
    )


def attribute_text(path: str, name: str) -> str:
    """What to say of a tensor that is an attribute of a module, and neither a parameter nor a buffer."""
    where = f" of {path!r}" if path else ""
    return f"the attribute {name!r}{where}, a tensor of fixed size; as a buffer (register_buffer) it would be cut too"


def unsaved_text(name: str) -> str:
    """What to say of a buffer that is not saved with the model."""
    return f"the buffer {name!r}, of fixed size as it is not saved; with persistent=True it would be cut too"


def fixed_text(node: fx.Node) -> str:
    """What to say of a value of fixed size: which attribute or buffer it is made of, or else which line makes it."""
    seen, ahead, made = {node}, [node], ""
    while ahead and len(seen) < _MOST_BEHIND:
        each = ahead.pop(0)
        if ORIGIN in each.meta:
            return str(each.meta[ORIGIN])
        if each.op == "placeholder" and not each.meta.get(CONSTANT):
            return ""  # an input, or a parameter
        made = each.meta.get(LINE) or made
        ahead += [source for source in each.all_input_nodes if source not in seen]
        seen.update(each.all_input_nodes)
    return f"a value of fixed size ({made})" if made else ""


def remember(node: fx.Node, tensor: Tensor) -> None:
    """Keep the whole numbers of a constant or a buffer in ``node.meta``."""
    if tensor.dtype in (torch.int64, torch.int32) and tensor.dim() == 1 and tensor.numel() <= _LONGEST:
        node.meta["whole numbers"] = tensor.detach().to("cpu", torch.int64, copy=True)


def loses_channels(node: fx.Node) -> bool:
    """Whether a buffer that is not saved with the model loses channels with the layers before it.

    This is so if it is used for nothing but to filter each channel by itself, as in blurred pooling, or to be added, as
    a table of positions is, or to mask a weight in place. It need not be saved, because nothing else in it changes: a
    new model makes the same.
    """
    return bool(node.users) and all(
        _filters_each(user, node) or _adds(user, node) or _masks(user, node) for user in node.users
    )


def _masks(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operation multiplies a weight, or another value that no operation made, by a mask of its shape."""
    value, target = node.meta.get("val"), user.args[0] if user.args else None
    if str(user.target) != "aten.mul_.Tensor" or not isinstance(target, fx.Node) or not isinstance(value, Tensor):
        return False
    while target.op == "call_function" and str(target.target).startswith("aten.detach.") and target.args:
        target = target.args[0]  # weight.data
        assert isinstance(target, fx.Node)
    known = target.meta.get("val")
    return (
        target is not node and target.op == "placeholder" and isinstance(known, Tensor) and known.shape == value.shape
    )


def _filters_each(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operation filters each channel with its own part of a buffer."""
    weight, groups = user.args[1:2], user.args[6:7] or (user.kwargs.get("groups"),)
    shape = getattr(node.meta.get("val"), "shape", ())
    filters = str(user.target).startswith("aten.conv") and not user.kwargs.get("weight")
    return filters and weight == (node,) and len(shape) > 2 and shape[1] == 1 and groups == (shape[0],)


_RESTATED = tuple(
    f"aten.{name}."
    for name in (
        *(
            "slice",
            "select",
            "narrow",
            "index",
            "index_select",
            "unsqueeze",
            "squeeze",
            "expand",
            "transpose",
            "permute",
        ),
        *("_to_copy", "to", "clone", "detach", "alias"),
    )
)
"""Operations that take a part of a table, or give it another type or another order of its axes."""


def _adds(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operation adds a table of numbers to something, perhaps after taking a part of it."""
    value, name = node.meta.get("val"), str(user.target)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if name.startswith(_RESTATED):
        return user.args[0] is node and bool(user.users) and all(_adds(after, user) for after in user.users)
    return name == "aten.add.Tensor" or (name == "aten.add_.Tensor" and user.args[0] is not node)


@dataclass(frozen=True)
class Program:
    """The ATen operations of one forward pass, before composite ones are decomposed.

    Attributes:
        graph: one node for each operation; ``node.meta`` holds the outputs as tensors without data (``val``) and the
            modules that the operation ran in (``nn_module_stack``).
        parameters: the parameter or buffer that each placeholder stands for. Placeholders that are not listed are
            inputs, constants, and buffers that are not saved with the model (masks, rotary frequencies), but for
            those of :func:`loses_channels`.
            Their ``node.meta`` also holds the ``whole numbers`` in short constants and buffers, which may be indices.
        macs: multiply-accumulates of the pass; None where it was not run with real tensors.
        notes: what the user should know about the pass.
    """

    graph: fx.Graph
    parameters: Mapping[fx.Node, str]
    macs: int | None = None
    notes: tuple[str, ...] = ()
