"""Element-wise operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lbyl.io.onnx.arrays import DTYPES
from lbyl.io.onnx.operators.base import Node, as_floating, number, operator, tensors

_UNARY: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "BitwiseNot": torch.bitwise_not, "Ceil": torch.ceil, "Cos": torch.cos,
    "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "IsNaN": torch.isnan,
    "Log": torch.log, "Mish": functional.mish, "Neg": torch.neg, "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal, "Relu": functional.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": functional.softplus,
    "Softsign": functional.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
    "HardSwish": functional.hardswish,
}  # fmt: skip


@operator(*_UNARY)
def unary(node: Node) -> None:
    """y = f(x)."""
    node.run(_UNARY[node.operator], node.source(0))


def _div(a: Any, b: Any) -> Any:
    whole = all(not (x.is_floating_point() if isinstance(x, Tensor) else isinstance(x, float)) for x in (a, b))
    return torch.div(a, b, rounding_mode="trunc") if whole else torch.div(a, b)


def _mod(a: Any, b: Any, *, fmod: bool) -> Any:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _shift(a: Any, b: Any, *, left: bool) -> Any:
    return torch.bitwise_left_shift(a, b) if left else torch.bitwise_right_shift(a, b)


_BINARY: dict[str, Callable[..., Any]] = {
    "Add": torch.add, "And": torch.logical_and, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor, "Div": _div, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "Less": torch.lt, "LessOrEqual": torch.le, "Mul": torch.mul, "Or": torch.logical_or, "Pow": torch.pow,
    "Sub": torch.sub, "Xor": torch.logical_xor,
}  # fmt: skip


@operator(*_BINARY)
def binary(node: Node) -> None:
    """y = f(a, b), with broadcasting."""
    if node.opset < 7 and "axis" in node.attributes:
        raise node.refuse("it broadcasts as in opset 6 and before; convert the file to a newer opset")
    node.run(partial(_binary, function=_BINARY[node.operator]), node.source(0), node.source(1))


def _binary(a: Any, b: Any, *, function: Callable[..., Any]) -> Any:
    a, b = tensors(a, b)
    if not isinstance(a, Tensor):
        # These functions need a tensor first, so a number first takes another one.
        if function in (torch.add, torch.mul):
            a, b = b, a
        elif function is torch.sub:
            return torch.rsub(b, a)
        else:
            a = torch.full((), a, dtype=b.dtype, device=b.device)
    return function(a, b)


@operator("Mod")
def modulo(node: Node) -> None:
    """The remainder of a division."""
    call = partial(_mod, fmod=bool(node.attributes.get("fmod", 0)))
    node.run(partial(_binary, function=call), node.source(0), node.source(1))


@operator("BitShift")
def shift(node: Node) -> None:
    """Bit shifts."""
    call = partial(_shift, left=node.attributes["direction"] == "LEFT")
    node.run(partial(_binary, function=call), node.source(0), node.source(1))


@operator("Sum", "Max", "Min", "Mean")
def several(node: Node) -> None:
    """The sum, maximum, minimum or mean of several values."""
    function = {"Sum": torch.add, "Mean": torch.add, "Max": torch.maximum, "Min": torch.minimum}[node.operator]
    share = node.operands if node.operator == "Mean" else 1
    node.run(partial(_several, function=function, share=share), *(node.source(i) for i in range(node.operands)))


def _several(*values: Any, function: Callable[..., Any], share: int) -> Any:
    total = reduce(partial(_binary, function=function), tensors(*values))
    return total if share == 1 else total / share


@operator("LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "HardSigmoid", "Gelu", "Shrink", "Swish")
def activation(node: Node) -> None:
    """Activations with parameters."""
    get, name = node.attributes.get, node.operator
    alpha = {"LeakyRelu": 0.01, "HardSigmoid": 0.2, "Selu": 1.67326319217681884765625}.get(name, 1.0)
    alpha = float(get("alpha", alpha))
    if name == "LeakyRelu":
        call = partial(functional.leaky_relu, negative_slope=alpha)
    elif name in ("Elu", "Celu"):
        call = partial(functional.elu if name == "Elu" else functional.celu, alpha=alpha)
    elif name == "Selu":
        call = partial(_selu, alpha=alpha, gamma=float(get("gamma", 1.05070102214813232421875)))
    elif name == "ThresholdedRelu":
        call = partial(functional.threshold, threshold=alpha, value=0.0)
    elif name == "HardSigmoid":
        call = partial(_hard_sigmoid, alpha=alpha, beta=float(get("beta", 0.5)))
    elif name == "Gelu":
        call = partial(functional.gelu, approximate=get("approximate", "none"))
    elif name == "Shrink":
        call = partial(_shrink, bias=float(get("bias", 0.0)), border=float(get("lambd", 0.5)))
    else:
        call = partial(_swish, alpha=alpha)
    node.run(call, node.source(0))


def _selu(x: Tensor, *, alpha: float, gamma: float) -> Tensor:
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


def _hard_sigmoid(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    if beta == 0.5 and math.isclose(alpha, 1 / 6, rel_tol=1e-6):
        return functional.hardsigmoid(x)
    return (x * alpha + beta).clamp(0, 1)


def _shrink(x: Tensor, *, bias: float, border: float) -> Tensor:
    return torch.where(x > border, x - bias, torch.where(x < -border, x + bias, torch.zeros_like(x)))


def _swish(x: Tensor, *, alpha: float) -> Tensor:
    return functional.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("IsInf")
def infinite(node: Node) -> None:
    """Whether elements are infinite."""
    get = node.attributes.get
    node.run(partial(_infinite, low=get("detect_negative", 1), high=get("detect_positive", 1)), node.source(0))


def _infinite(x: Tensor, *, low: int, high: int) -> Tensor:
    found = torch.isinf(x)
    return found if low and high else found & (x > 0) if high else found & (x < 0) if low else torch.zeros_like(found)


@operator("PRelu")
def prelu(node: Node) -> None:
    """PReLU, with the file's slope below zero."""
    node.run(_prelu, node.source(0), node.source(1))


def _prelu(x: Tensor, slope: Any) -> Tensor:
    x, slope = tensors(x, slope)
    return torch.where(x < 0, x * slope, x)


@operator("Clip")
def clip(node: Node) -> None:
    """Values limited to a range."""
    low, high = node.attributes.get("min"), node.attributes.get("max")
    if node.operands > 1 and (node.source(1) is not None or node.source(2) is not None):
        constant = all(node.source(index) is None or node.is_constant(index) for index in (1, 2))
        if not constant:
            node.run(_clip, *(node.source(index) for index in range(3)))
            return
        low, high = number(node, 1), number(node, 2)
    call = functional.relu6 if (low, high) == (0, 6) else partial(torch.clamp, min=low, max=high)
    node.run(torch.clone if low is high is None else call, node.source(0))


def _clip(x: Tensor, low: Any, high: Any) -> Tensor:
    x, low, high = tensors(x, low, high)
    for bound, function in ((low, torch.clamp_min), (high, torch.clamp_max)):
        x = x if bound is None else function(x, bound)
    return x


@operator("Where")
def where(node: Node) -> None:
    """One of two values for each element, by a condition."""
    node.run(_where, *(node.source(index) for index in range(3)), floating=True)


def _where(condition: Any, a: Any, b: Any, *, floating: torch.dtype) -> Tensor:
    condition, a, b = (as_floating(value, floating) for value in (condition, a, b))
    return torch.where(condition.bool(), a, b)


@operator("Cast", "CastLike")
def cast(node: Node) -> None:
    """Conversion to another dtype; floating-point numbers keep the network's own."""
    if node.operator == "CastLike":
        node.run(_cast_like, node.source(0), node.source(1), floating=True)
        return
    kind = int(node.attributes["to"])
    if kind not in DTYPES:
        raise node.refuse(f"it casts to data type {kind}")
    node.run(partial(_cast, dtype=DTYPES[kind]), node.source(0), floating=True)


def _cast(x: Any, *, dtype: torch.dtype, floating: torch.dtype) -> Tensor:
    x = as_floating(x, floating)
    if not dtype.is_floating_point:
        return x.to(dtype)
    return x if x.dtype == torch.float64 == floating else x.to(floating if dtype == torch.float32 else dtype)


def _cast_like(x: Any, other: Any, *, floating: torch.dtype) -> Tensor:
    return as_floating(x, floating).to(as_floating(other, floating).dtype)
