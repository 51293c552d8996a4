"""Matrix products, which are linear layers if the second factor is a constant of the file."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lbyl.io.onnx.operators.base import Node, operator, tensor, tensors


@operator("MatMul")
def product(node: Node) -> None:
    """A matrix product; a linear layer, with a bias that the next node may add, if the second factor is a constant."""
    weight = node.constant(1)
    if weight is None or weight.ndim != 2 or node.is_constant(0):
        node.run(_product, node.source(0), node.source(1))
        return
    bias = node.bias(weight.shape[1], 0)
    held = {"weight": (1, "transposed", 1.0)}
    if bias is not None:
        held["bias"] = (bias, "flat", 1.0)
    node.layer(_linear(weight.shape[1], weight.shape[0], bias is not None), held, node.source(0))


def _linear(outputs: int, inputs: int, bias: bool) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, device="meta")


def _product(a: Any, b: Any) -> Tensor:
    a, b = tensors(a, b)
    return torch.matmul(a, b)


@operator("Gemm")
def gemm(node: Node) -> None:
    """alpha A B + beta C; a linear layer if B and C are constants of the file, and the factors can be undone."""
    get = node.attributes.get
    alpha, beta = float(get("alpha", 1.0)), float(get("beta", 1.0))
    first, second = bool(get("transA", 0)), bool(get("transB", 0))
    weight, bias = node.constant(1), node.constant(2)
    last = 2 if beta == 0 else 3  # a bias that is multiplied by zero is none
    if last == 2:
        bias = None
    plain = (
        weight is not None and weight.ndim == 2 and not first and (bias is not None or node.operands < 3 or last < 3)
    )
    plain = plain and _can_be_undone(alpha) and (bias is None or _can_be_undone(beta))
    outputs = 0 if weight is None else weight.shape[0 if second else -1]
    if bias is not None and (bias.size != outputs or bias.shape[-1:] != (outputs,)):
        plain = False
    if not plain or weight is None or node.is_constant(0):
        call = partial(_gemm, alpha=alpha, beta=beta, first=first, second=second)
        node.run(call, *(node.source(index) for index in range(last)))
        return
    inputs = weight.shape[1 if second else 0]
    held = {"weight": (1, "same" if second else "transposed", alpha)}
    if bias is not None:
        held["bias"] = (2, "flat", beta)
    node.layer(_linear(outputs, inputs, bias is not None), held, node.source(0))


def _can_be_undone(factor: float) -> bool:
    """Whether a weight that was multiplied by a factor can be written again, divided by it."""
    return math.isfinite(factor) and _SMALLEST_FACTOR <= abs(factor) <= 1 / _SMALLEST_FACTOR


_SMALLEST_FACTOR = 1e-4
"""The smallest factor whose product with a weight in half precision still has most of the weight's digits."""


def _gemm(a: Any, b: Any, c: Any = None, *, alpha: float, beta: float, first: bool, second: bool) -> Tensor:
    a, b = tensors(a, b)
    out = torch.matmul(a.t() if first else a, b.t() if second else b)
    out = out if alpha == 1 else out * alpha
    if c is None:
        return out
    c = tensor(c, out)
    return out + (c if beta == 1 else c * beta)


@operator("Einsum")
def einsum(node: Node) -> None:
    """Sums of products given by an einsum formula."""
    formula = node.attributes["equation"]
    node.run(partial(_einsum, formula=formula), *(node.source(index) for index in range(node.operands)))


def _einsum(*operands: Any, formula: str) -> Tensor:
    return torch.einsum(formula, *tensors(*operands))
