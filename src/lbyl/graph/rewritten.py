"""Weights that the code writes to before it uses them: a mask over them is cut along with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from lbyl.graph.builder import Builder, ParameterRef, layer_name, nobody_like
from lbyl.graph.program import CONSTANT, SETTING, fixed_text
from lbyl.graph.rules import find_rule, rule
from lbyl.graph.rules.elementwise import combine, unary, unchanged
from lbyl.graph.written import writes
from lbyl.runtime.reductions import aten_name

_DEPTH = 16
_WRITES_WHERE = ("index_put", "masked_scatter")
"""Operations that write where a mask of the same shape says."""


def rewrite(builder: Builder, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """The weight that an operation writes to, element by element; None for all other operations.

    An example is ``weight.data *= mask``, in autoregressive convolutions and in networks whose weights are pruned one
    by one. Such an operation is the same for what is left of the weight, if the mask loses the same rows and columns.
    So is ``weight.data = weight.data * mask``, whose result no other operation reads.
    """
    target = args[0] if args else None
    if not isinstance(target, ParameterRef) or len(target.shape) < 2 or target.turned:
        return None
    name, alone = aten_name(node.target).rstrip("_"), all(aten_name(user.target) == SETTING for user in node.users)
    alike = find_rule(name) in (combine, unary) or name in (*_WRITES_WHERE, "copy")
    if not alike or not (writes(node) or alone):
        return None
    masks, shapes = set[str](), _shapes(builder)
    for source in _given(node):
        found = _parameters_behind(builder, source, _DEPTH)
        if found is None:
            return None
        masks |= found
    for mask in sorted(masks - {target.name}):
        builder.alike[target.name, mask] = len(target.shape) - len(shapes[mask])
    return target


@rule(SETTING)
def check_of_setting(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """PyTorch's check before ``weight.data = value``, its only trace. The value may be the weight again."""
    weight, value = args
    if isinstance(weight, ParameterRef) and not (isinstance(value, ParameterRef) and value.name == weight.name):
        made = node.args[1].all_input_nodes if isinstance(node.args[1], fx.Node) else []
        whence = next((f" with {text}" for source in made if (text := fixed_text(source))), "")
        why = f"{weight.name} is set in {layer_name(node)!r} to a value that the code computes{whence}"
        return builder.barrier(node, args, why)
    return nobody_like(node)


def _given(node: fx.Node) -> Iterator[fx.Node]:
    """What an operation takes besides the value that it writes to."""
    for source in (*node.args[1:], *node.kwargs.values()):
        for item in source if isinstance(source, (list, tuple)) else (source,):
            if isinstance(item, fx.Node):
                yield item


def _parameters_behind(builder: Builder, node: fx.Node, depth: int) -> set[str] | None:
    """The parameters and buffers that a value is made of element by element; None if it is made of anything else."""
    if node in builder.parameters:
        return {builder.parameters[node]}
    if node.op == "placeholder":  # a single number that the code spells out
        value = node.meta.get("val")
        return set() if node.meta.get(CONSTANT) and isinstance(value, Tensor) and value.numel() == 1 else None
    name = aten_name(node.target)
    if not depth or find_rule(name) not in (unary, combine, unchanged):
        return None
    behind = [_parameters_behind(builder, source, depth - 1) for source in node.all_input_nodes]
    found = [each for each in behind if each is not None]
    return set[str]().union(*found) if len(found) == len(behind) else None


def _shapes(builder: Builder) -> dict[str, tuple[int, ...]]:
    return {name: tuple(node.meta["val"].shape) for node, name in builder.parameters.items()}


def settle(builder: Builder) -> None:
    """After the walk, let masks lose what the weights lose that they are laid over, along every axis that both have."""
    shapes = _shapes(builder)
    for (weight, mask), behind in builder.alike.items():
        for record in [each for each in builder.slots.values() if each.parameter == weight]:
            dim = record.dim - behind
            if 0 <= dim < len(shapes[mask]) and shapes[mask][dim] == shapes[weight][record.dim] > 1:
                builder.slot(mask, dim, record.ids, "carrier", record.blocks)
