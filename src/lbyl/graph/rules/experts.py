"""Experts of a mixture: matrices that are stacked in one parameter, each of which multiplies its own rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from lbyl.graph.builder import Builder, ParameterRef, layer_name, output_shape
from lbyl.graph.rules import rule
from lbyl.runtime.reductions import aten_name

GROUPED = ("_grouped_mm", "grouped_mm_fallback")
"""Names of the operation: PyTorch's own, and the one that transformers registers for where that is missing."""


def is_stacked_weight(node: fx.Node) -> bool:
    """Whether grouped products alone read a value, which is then the transposed weight of experts."""
    return bool(node.users) and all(aten_name(user.target) in GROUPED for user in node.users)


@rule(*GROUPED)
def grouped(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of x, sorted by expert, times the matrix of their expert.

    All experts read the same channels here and make the same ones: the trace does not know which expert a row belongs
    to. `lbyl.graph.experts` gives every expert its own channels where all that they pass through is stacked as well.
    """
    x, weight = args[:2]
    if not isinstance(x, Tensor) or not isinstance(weight, ParameterRef) or len(weight.shape) != 3:
        return builder.barrier(node, args, f"experts in {layer_name(node)!r} with a weight that the model computes")
    ids = builder.gather(x, -1)
    if ids is None:
        return builder.barrier(node, args, f"experts in {layer_name(node)!r} on mixed axes")
    source = node.args[1]
    dim = 1 if isinstance(source, fx.Node) and source.op == "placeholder" else 2  # where it was transposed
    layer, experts = weight.name.rpartition(".")[0] or layer_name(node), weight.shape[0]
    builder.experts[weight.name] = experts
    builder.read(layer, weight.name, None, "linear", ids, dim=dim, experts=experts)
    out = builder.produce(node, layer, weight.name, None, weight.shape[2], 3 - dim)
    return builder.spread(out, -1, output_shape(node))
