"""Operations that treat every element by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lbyl.graph.builder import Builder, ParameterRef, layer_name, output_shape
from lbyl.graph.origins import are_apart
from lbyl.graph.program import fixed_text
from lbyl.graph.rules import find_rule, rule
from lbyl.graph.union_find import NOBODY, compact, small, varies
from lbyl.graph.written import is_written
from lbyl.runtime.reductions import aten_name

DRAWN = "random numbers are drawn for them"
"""Why channels can't be cut: fewer random numbers are other ones."""
_SILENT = (
    "alias",
    "clone",
    "contiguous",
    "detach",
    "to",
    "type_as",
    "lift_fresh",
    "lift_fresh_copy",
    "_to_copy",
    "identity",
)


@rule(*_SILENT)
def unchanged(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operations that return their first argument."""
    return args[0]


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dropout, which returns its first argument in evaluation mode, unless the code drops values in any mode."""
    x = builder.shadow(args[0])
    share_and_mode = args[1:3]
    if x is not None and len(share_and_mode) == 2 and all(share_and_mode):
        builder.pin(x, f"{DRAWN} in {layer_name(node)!r}")
    return args[0]


@rule(
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh",
    "hardswish", "hardsigmoid", "log_sigmoid", "softplus", "softsign", "clamp", "clamp_min", "clamp_max", "abs",
    "neg", "exp", "log", "sqrt", "rsqrt", "square", "reciprocal", "sin", "cos", "erf", "sign", "hardshrink",
    "softshrink", "threshold", "nan_to_num", "zero", "fill", "exp2", "expm1", "log1p", "floor", "ceil", "round",
    "isnan", "isinf", "isfinite", "logical_not", "bitwise_not", "tril", "triu", "rrelu", "clip", "absolute", "negative",
    "positive", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erfc", "logit", "trunc",
    "frac", "sgn", "log2", "log10", "real", "imag", "angle", "conj", "conj_physical", "resolve_conj", "resolve_neg",
    "sinc", "_conj", "_neg_view", "erfinv", "lgamma", "digamma", "deg2rad", "rad2deg", "signbit", "isposinf",
    "isneginf",
    *(f"special_{name}" for name in ("expit", "i0", "i0e", "i1", "i1e", "entr", "ndtr", "ndtri", "log_ndtr", "erfcx")),
)  # fmt: skip
def unary(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """y = f(x), element by element. Bounds, as of a clamp, may be tensors."""
    if len(_operands(args, kwargs)) > 1:
        return combine(builder, node, args, kwargs)
    x = builder.shadow(args[0])
    if x is None:
        return builder.barrier(node, args, f"{node.target} on a value that the trace can't follow")
    builder.step(small(x).reshape(-1), str(node.target).split(".")[1].rstrip("_"), layer_name(node))
    return x


@rule(
    "add", "sub", "rsub", "mul", "div", "maximum", "minimum", "pow", "prelu", "where", "lerp", "addcmul", "addcdiv",
    "masked_fill", "eq", "ne", "gt", "lt", "ge", "le", "logical_and", "logical_or", "bitwise_and", "bitwise_or",
    "remainder", "floor_divide", "fmod", "atan2", "multiply", "divide", "true_divide", "subtract", "fmax", "fmin",
    "logaddexp", "xlogy", "heaviside", "copysign", "hypot", "float_power", "logical_xor", "bitwise_xor", "complex",
    "polar", "__and__", "__or__", "__xor__", "ldexp", "arctan2", "nextafter", "isclose", "logaddexp2",
    "special_xlog1py",
)  # fmt: skip
def combine(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """y = f(a, b, ...), element by element: channels that meet at one element are merged."""
    name = str(node.target).split(".")[1].rstrip("_")
    operands = _operands(args, kwargs)
    shadows = [shadow for operand in operands if (shadow := builder.shadow(operand)) is not None]
    if not shadows or len(shadows) < len(operands):
        return builder.barrier(node, args, f"{name} in {layer_name(node)!r} on a value that the trace can't follow")
    sources = [each for each in (*node.args, *node.kwargs.values()) if isinstance(each, fx.Node)]
    if len(sources) == len(shadows):
        shadows = [as_number(source, shadow) for source, shadow in zip(sources, shadows, strict=True)]
    shape = output_shape(node)
    if name == "prelu" and isinstance(operands[1], ParameterRef):
        shadows[1] = shadows[1].reshape([1, -1] + [1] * (len(shape) - 2))
    result = shadows[0]
    apart = are_apart(tuple(node.all_input_nodes), builder.origins)
    fixed = _fixed_operand(shadows, sources) if len(sources) == len(shadows) else ""
    for other in shadows[1:]:
        result = merge(builder, name, layer_name(node), result, other, shape, apart, fixed)
    issued = small(result).reshape(-1)
    builder.step(issued, name, layer_name(node), any(isinstance(o, ParameterRef) for o in operands))
    return result


def _fixed_operand(shadows: Sequence[Tensor], sources: Sequence[fx.Node]) -> str:
    """What to say of the first operand without channels."""
    alone = (source for shadow, source in zip(shadows, sources, strict=True) if bool((small(shadow) == NOBODY).all()))
    return next((text for source in alone if (text := fixed_text(source))), "")


@rule("broadcast_tensors")
def broadcast_tensors(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Copies of several values, so that all have one shape: as for a product, their channels meet."""
    shadows = [builder.shadow(value) for value in args[0]]
    if any(shadow is None for shadow in shadows):
        return builder.barrier(node, args, f"broadcast_tensors in {layer_name(node)!r} on what can't be followed")
    known = [shadow for shadow in shadows if shadow is not None]
    shape, result = tuple(node.meta["val"][0].shape), known[0]
    for other in known[1:]:
        result = merge(builder, "broadcast_tensors", layer_name(node), result, other, shape)
    return [compact(shadow.expand(shape)) for shadow in known]


_UNIFORM = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")


def as_number(node: fx.Node, shadow: Tensor) -> Tensor:
    """The shadow of a single number for a value without channels that is the same everywhere, such as zeros.

    Code usually takes the width of such a value from another one, so it follows a cut; verification finds out if not.
    """
    if bool((small(compact(shadow)) != NOBODY).any()):
        return shadow
    return shadow.new_full([1] * shadow.dim(), NOBODY) if _is_uniform(node) else shadow


def _is_uniform(node: fx.Node, depth: int = 8) -> bool:
    """Whether a value is made by zeros or the like, and changed element by element at most."""
    value, name = node.meta.get("val"), aten_name(node.target)
    if node.op != "call_function" or not depth or not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if name.rstrip("_") in ("tril", "triu") or any(is_written(user) for user in node.users):
        return False
    alike = find_rule(name) in (unary, combine, unchanged)
    return name in _UNIFORM or (alike and all(_is_uniform(each, depth - 1) for each in node.all_input_nodes))


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor | ParameterRef]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor | ParameterRef)]


def merge(
    builder: Builder,
    name: str,
    layer: str,
    a: Tensor,
    b: Tensor,
    shape: tuple[int, ...],
    apart: bool = False,
    fixed: str = "",
) -> Tensor:
    """Merge the channels that meet at each element of two values, which broadcast to ``shape``.

    Values that are ``apart`` come from different inputs of the network: their sum is no residual connection. ``fixed``
    is what is known of a value without channels.
    """
    a, b = _without_pairs(builder, a, b, len(shape), layer)
    a, b = (_lift(builder, *each, len(shape), layer, fixed) for each in ((a, b), (b, a)))
    a, b = a.expand(shape), b.expand(shape)
    # Dimensions along which neither value changes need not be compared.
    for dim in range(len(shape)):
        if shape[dim] > 1 and not varies(a, dim) and not varies(b, dim):
            a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
    # Each pair is encoded as one number, because finding distinct rows takes ten times as long.
    count = len(builder.ids)
    numbers = torch.unique(a.reshape(-1) * count + b.reshape(-1))
    pairs = torch.stack([numbers // count, numbers % count], 1)
    left, right = builder.ids.find(pairs).unbind(1)
    if name in ("add", "sub", "subtract", "rsub", "lerp", "addcmul") and not apart:
        # A sum of one layer's own channels (as in rotary positions) is not a residual stream.
        summed = builder.ids.different_makers(left, right)
        builder.sums.append(pairs[summed].reshape(-1))
    builder.ids.union(left, right)
    return torch.where(a == NOBODY, b, a).expand(shape)


def _without_pairs(builder: Builder, a: Tensor, b: Tensor, rank: int, layer: str) -> tuple[Tensor, Tensor]:
    """Two values; if all channels of one meet all of the other, the fewer are pinned, and count as none afterwards."""
    both = [compact(value.reshape([1] * (rank - value.dim()) + list(value.shape))) for value in (a, b)]
    along = [[d for d in range(rank) if varies(value, d)] for value in both]
    one, other = along
    apart = one and other and all(both[1].shape[d] == 1 for d in one) and all(both[0].shape[d] == 1 for d in other)
    if not apart or not all(bool(builder.ids.issued(small(value)).all()) for value in both):
        return a, b
    few = min((0, 1), key=lambda number: small(both[number]).numel())
    builder.pin(both[few], f"they are broadcast over other channels in {layer!r}")
    both[few] = torch.full_like(small(both[few]), NOBODY).expand(both[few].shape)
    return both[0], both[1]


def _lift(builder: Builder, shadow: Tensor, other: Tensor, rank: int, layer: str, fixed: str) -> Tensor:
    """Give a shadow the rank ``rank``, and pin channels that are broadcast over channels of ``other``."""
    shadow = compact(shadow.reshape([1] * (rank - shadow.dim()) + list(shadow.shape)))
    other = compact(other.reshape([1] * (rank - other.dim()) + list(other.shape)))
    mine = [d for d in range(rank) if varies(shadow, d)]
    theirs = [d for d in range(rank) if varies(other, d)]
    stretched = [d for d in theirs if shadow.shape[d] == 1]
    if stretched and not set(mine) & set(theirs):
        # It has one value for all of the other's channels, at each position or altogether.
        if not bool((small(shadow) == NOBODY).all()) and (not mine or bool(builder.ids.issued(small(shadow)).any())):
            builder.pin(shadow, f"they are broadcast over other channels in {layer!r}")
        return torch.full_like(small(shadow), NOBODY).expand(shadow.shape)
    # An operand of full size without channels can't be cut, so neither can the channels that meet it.
    if bool((small(shadow) == NOBODY).all()):
        full = [d for d in theirs if shadow.shape[d] > 1]
        if full:
            what = fixed or "a value of fixed size"
            builder.fix(other, full, f"they are combined in {layer!r} with {what}")
    elif bool((small(shadow) == NOBODY).any()):
        mask = (shadow == NOBODY).expand(torch.broadcast_shapes(shadow.shape, other.shape))
        builder.keep(other.expand(mask.shape)[mask], f"they are combined with a padded value in {layer!r}")
    return shadow
