"""Products of two traced values: matrix multiplication, einsum, attention."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lbyl.graph.builder import Builder, ParameterRef, layer_name, nobody_like, output_shape
from lbyl.graph.rules import rule
from lbyl.graph.rules.elementwise import merge
from lbyl.graph.rules.mixing import mix
from lbyl.graph.union_find import NOBODY, compact, small, varies
from lbyl.runtime.contractions import dotted, linear_axes, spelled_out
from lbyl.runtime.reductions import aten_name

_Labeled = tuple[Tensor, str]


def contract(
    builder: Builder, node: fx.Node, operands: Sequence[_Labeled], out: str, shape: Sequence[int] | None = None
) -> Tensor:
    """The shadow of a sum of products.

    Factors of one product are merged into one channel, and so are the terms of one sum. In attention this makes one
    channel of every head, because queries and keys are multiplied and summed over the head's inner axis. A single head
    is an exception: each of its channels is a term of its own, and the term vanishes if its factors are zero. Another
    one are factors that all channels of the other one share, such as the keys of multi-query attention: they stay.

    Args:
        builder: the state of the trace.
        node: the operation.
        operands: the factors' shadows with their einsum labels.
        out: the einsum labels of the result.
        shape: the shape of the result; by default that of the node's output.
    """
    whole_shape = output_shape(node) if shape is None else tuple(shape)
    layer = layer_name(node)
    if not any(bool(builder.ids.issued(small(shadow)).any()) for shadow, _ in operands):
        return torch.full((), NOBODY).expand(whole_shape)
    operands = [(compact(builder.ids.find(shadow)), labels) for shadow, labels in operands]
    operands = [(_of_layers(builder, operands, number, out), labels) for number, (_, labels) in enumerate(operands)]
    sizes = {x: n for shadow, labels in operands for x, n in zip(labels, shadow.shape, strict=True) if n > 1}
    moving = {x for shadow, labels in operands for d, x in enumerate(labels) if varies(shadow, d)}
    space = [x for x in sizes if x in moving]
    extent = tuple(sizes[x] for x in space)
    result = torch.zeros([1] * len(space), dtype=torch.int64)
    for shadow, labels in operands:
        own = [x for x in space if x in labels]
        for d, x in enumerate(labels):
            if x not in own:
                shadow = shadow.narrow(d, 0, 1)
        places = [labels.index(x) for x in own]
        rest = [d for d in range(len(labels)) if d not in places]
        flat = shadow.permute(*places, *rest).reshape([shadow.shape[d] for d in places])
        view = flat.reshape([flat.shape[own.index(x)] if x in own else 1 for x in space])
        whole = tuple(max(a, b) for a, b in zip(result.shape, view.shape, strict=True))
        if bool((small(result) == NOBODY).all()) and not any(varies(result, d) for d in range(result.dim())):
            result = merge(builder, "matmul", layer, view, result, whole) if view.numel() > 1 else view
        else:
            kept = [x in out for x in space]
            batch = [x in out and all(x in other for _, other in operands) for x in space]
            result, view = _unshared(builder, result, view, kept, layer)
            pairs = _pairs(builder, result, view, kept, layer) if len(operands) == 2 else None
            if pairs is not None:
                result = pairs
                continue
            result, view = _outer(builder, result, view, kept, batch, layer)
            result = _together(builder, result, view, whole)
    result = compact(builder.ids.find(result.expand(extent)))
    summed = [d for d, x in enumerate(space) if x not in out]
    moved = [d for d in range(len(space)) if varies(result, d)]
    if len(moved) == 1 and moved[0] in summed and _everywhere(operands, space[moved[0]]):
        builder.products.append((small(result).reshape(-1), layer))
        builder.step(small(result).reshape(-1), str(node.target).split(".")[1], layer, parametric=True)
        return torch.full((), NOBODY).expand(whole_shape)
    for shadow, _ in operands if not builder.pairs.among(result) else ():
        builder.joins.append((small(shadow).reshape(-1), f"they are multiplied with each other in {layer!r}"))
    result = builder.join(result, summed)
    for d in summed:
        result = result.narrow(d, 0, 1)
    kept = [x for x in space if x in out]
    result = result.reshape([sizes[x] for x in kept])
    places = [kept.index(x) for x in out if x in kept]
    result = result.permute(places)
    view = [sizes[x] if x in kept else 1 for x in out]
    found = compact(builder.ids.find(result.reshape(view)).expand(whole_shape))
    builder.step(small(found).reshape(-1), str(node.target).split(".")[1], layer, parametric=True)
    return found


def _of_layers(builder: Builder, operands: Sequence[_Labeled], number: int, out: str) -> Tensor:
    """A factor's shadow, in which what comes from parameters only has ids where the result has channels of a layer.

    The code computes such a factor from parameters alone: a learned graph, or distances of positions. An axis of it
    with channels of another factor, such as heads, is cut with these.
    """
    own, labels = operands[number]
    if bool((small(own) == NOBODY).any()) or bool(builder.ids.issued(small(own)).any()):
        return own
    layers = [(shadow, names) for shadow, names in operands if bool(builder.ids.issued(small(shadow)).any())]
    tied = {x for shadow, names in layers for d, x in enumerate(names) if x in out and varies(shadow, d)}
    own = builder.join(own, [d for d, x in enumerate(labels) if x not in tied])
    return (
        own if any(varies(own, d) for d in range(own.dim())) else torch.full_like(small(own), NOBODY).expand(own.shape)
    )


def _unshared(builder: Builder, a: Tensor, b: Tensor, kept: Sequence[bool], layer: str) -> tuple[Tensor, Tensor]:
    """Two factors, each without the channels that all channels of the other one share, which then stay.

    These are terms of a sum that are the same along an axis of the result, such as the key that all heads use in
    multi-query attention, or the part of a key that they share. ``kept`` are the axes that the result has.
    """
    sides = [compact(builder.ids.find(x)) for x in (a, b)]
    for mine, other in ((0, 1), (1, 0)):
        x, y = sides[mine], sides[other]
        if _is_lone(builder, y) and any(varies(x, d) for d in range(x.dim())) and not bool((small(x) == y.min()).any()):
            # Additive attention: a layer with a single output weighs positions, the same for all channels.
            builder.keep(small(y), _SHARED.format(layer))
            sides[other] = torch.full_like(small(y), NOBODY).expand(y.shape)
            continue
        for axis in (d for d in range(x.dim()) if kept[d] and varies(x, d)):
            inner = [d for d in range(y.dim()) if d != axis and varies(y, d)]
            if not inner or any(kept[d] for d in inner):
                continue
            same = (y == y.narrow(axis, 0, 1)).all(axis, keepdim=True) & builder.ids.issued(y.narrow(axis, 0, 1))
            apart = (x != x.narrow(axis, 0, 1)).any(axis, keepdim=True) & builder.ids.issued(x.narrow(axis, 0, 1))
            if not bool((same & apart).any()) or bool(torch.isin(small(y), small(x)).any()):
                continue
            shared = same & apart
            builder.keep(y.narrow(axis, 0, 1)[shared], _SHARED.format(layer))
            sides[other] = y = compact(torch.where(shared, NOBODY, y))
    return sides[0], sides[1]


def _is_lone(builder: Builder, factor: Tensor) -> bool:
    """Whether a factor carries one channel alone, which a layer makes."""
    return small(factor).numel() == 1 and bool(builder.ids.issued(small(factor)).all())


_SHARED = "each of them is multiplied with all channels of another layer in {!r}"


def _outer(
    builder: Builder, a: Tensor, b: Tensor, kept: Sequence[bool], batch: Sequence[bool], layer: str
) -> tuple[Tensor, Tensor]:
    """Two factors; if each channel of one is multiplied with each channel of the other, one of them has no channels.

    Its channels stay. ``batch`` are the axes of the result that all factors have. Heads of attention go before channels
    inside of them, and the wider factor before the other one.
    """
    sides = [compact(builder.ids.find(x)) for x in (a, b)]
    axes = [{d for d in range(x.dim()) if varies(x, d)} for x in sides]
    issued = all(bool(builder.ids.issued(small(x)).all()) for x in sides)
    if not issued or not all(axes) or axes[0] & axes[1] or not all(kept[d] for d in axes[0] | axes[1]):
        return a, b
    if bool(torch.isin(small(sides[0]), small(sides[1])).any()):
        return a, b
    free = max((0, 1), key=lambda i: (any(batch[d] for d in axes[i]), sides[i].unique().numel()))
    builder.keep(sides[1 - free], _SHARED.format(layer))
    sides[1 - free] = torch.full_like(small(sides[1 - free]), NOBODY).expand(sides[1 - free].shape)
    return sides[0], sides[1]


def _pairs(builder: Builder, a: Tensor, b: Tensor, kept: Sequence[bool], layer: str) -> Tensor | None:
    """The products of a layer's channels with each other (bilinear pooling of one layer); None for other factors."""
    sides = [compact(builder.ids.find(x)) for x in (a, b)]
    axes = [[d for d in range(x.dim()) if varies(x, d)] for x in sides]
    if [len(each) for each in axes] != [1, 1] or axes[0] == axes[1] or not all(kept[each[0]] for each in axes):
        return None
    rows, columns = (small(x).reshape(-1) for x in sides)
    every = torch.unique(rows)
    if not torch.equal(every, torch.unique(columns)) or not bool(builder.ids.issued(every).all()):
        return None
    pairs = builder.pairs.make(small(sides[0]), small(sides[1]))
    if pairs is not None:
        builder.products.append((every, layer))
    return pairs


def _everywhere(operands: Sequence[_Labeled], label: str) -> bool:
    """Whether all factors that have this axis carry channels along it."""
    return all(varies(shadow, labels.index(label)) for shadow, labels in operands if label in labels)


def _together(builder: Builder, a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Merge every pair of factors into one channel, also where one of them is broadcast."""
    a, b = a.expand(shape), b.expand(shape)
    builder.ids.union(a, b)
    return torch.where(a == NOBODY, b, a)


def _operand(builder: Builder, value: Any, other: Any) -> Tensor | None:
    """A factor's shadow. A parameter carries no channels when the other factor is a computed value."""
    if isinstance(value, ParameterRef) and isinstance(other, Tensor):
        return torch.zeros((), dtype=torch.int64).expand(value.shape)
    return builder.shadow(value)


@rule("matmul", "bmm", "mm", "mv")
def matmul(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """C = A B. With a parameter as the right factor it is a linear layer whose weight is stored input first."""
    a, b = args[:2]
    if isinstance(a, Tensor) and isinstance(b, ParameterRef) and len(b.shape) == 2:
        return mix(builder, node, a, b, None, dim=0)
    if isinstance(a, Tensor) and isinstance(b, ParameterRef) and len(b.shape) == 1:
        return _weighed(builder, node, a, b, -1)
    if (
        isinstance(a, ParameterRef)
        and isinstance(b, Tensor)
        and (made := _mixed_from_left(builder, node, a, b)) is not None
    ):
        return made
    if isinstance(a, Tensor) and isinstance(b, Tensor) and (read := _read_by_part(builder, node, a, b)) is not None:
        return read
    left, right = _operand(builder, a, b), _operand(builder, b, a)
    if left is None or right is None or left.dim() < 2 or right.dim() < 2:
        return builder.barrier(node, args, f"matmul in {layer_name(node)!r} on a value that the trace can't follow")
    rank = max(left.dim(), right.dim())
    lead = string.ascii_lowercase[: rank - 2]
    first, second = lead[rank - left.dim() :] + "XY", lead[rank - right.dim() :] + "YZ"
    return contract(builder, node, [(left, first), (right, second)], lead + "XZ")


def _weighed(builder: Builder, node: fx.Node, x: Tensor, weight: ParameterRef, axis: int) -> Any:
    """The sum of channels times the entries of a vector, as where attention pools positions: one value for each."""
    ids = builder.gather(x, axis)
    if ids is None:
        return builder.barrier(
            node, [x, weight], f"{str(node.target).split('.')[1]} in {layer_name(node)!r} on mixed axes"
        )
    builder.tie(weight.name, 0, ids)
    return nobody_like(node)


_PARTS = ("slice", "narrow", "select", "alias", "detach", "to", "_to_copy", "contiguous", "clone")


def _read_by_part(builder: Builder, node: fx.Node, x: Tensor, part: Tensor) -> Any:
    """The product with a part of a parameter, whose rows are cut with the channels; None for other factors.

    An example is ``x @ a[:n] + y @ a[n:]``, which is ``cat([x, y]) @ a``. What such a product makes is not cut.
    """
    source: Any = node.args[1]
    while isinstance(source, fx.Node) and source.op == "call_function" and aten_name(source.target) in _PARTS:
        source = source.args[0]
    known = source is not node.args[1] and source in builder.parameters and part.dim() in (1, 2)
    if not known or bool((small(part) == NOBODY).any()) or bool(builder.ids.issued(small(part)).any()):
        return None
    ids = builder.channels(x, -1)
    if ids is None or not bool(builder.ids.issued(ids).all()):
        return None
    rows = part if part.dim() == 1 else builder.join(part, [1])[:, 0]
    builder.ids.union(ids, rows)
    builder.read_in_parts[builder.parameters[source]] = layer_name(node)
    return nobody_like(node)


def _mixed_from_left(builder: Builder, node: fx.Node, weight: ParameterRef, x: Tensor) -> Tensor | None:
    """W x for channels along the last axis but one, which is a linear layer; None if they are along another one."""
    ids = builder.channels(x, -2) if len(weight.shape) == 2 and x.dim() > 1 else None
    if ids is None or not bool(builder.ids.issued(ids).any()):
        return None
    dim, layer = int(not weight.turned), weight.name.rpartition(".")[0] or layer_name(node)
    builder.read(layer, weight.name, None, "linear", ids, dim=dim)
    made = builder.produce(node, layer, weight.name, None, weight.shape[0], 1 - dim)
    return builder.spread(made, x.dim() - 2, output_shape(node))


@rule("cdist", "_cdist_forward", "pairwise_distance", "cosine_similarity")
def compare(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Distances and similarities: sums over pairs of channels. A pair of zeros adds nothing to them."""
    name, layer = str(node.target).split(".")[1], layer_name(node)
    sides = [builder.shadow(value) for value in args[:2]]
    if any(side is None or not side.dim() for side in sides):
        return builder.barrier(node, args, f"{name} in {layer!r} on a value that the trace can't follow")
    a, b = (side for side in sides if side is not None)
    if not name.endswith("cdist") and name != "_cdist_forward":
        rank = max(a.dim(), b.dim())
        axis = (args[2] if len(args) > 2 else kwargs.get("dim", 1)) if name == "cosine_similarity" else -1
        a, b = (compact(side.reshape([1] * (rank - side.dim()) + list(side.shape))) for side in (a, b))
        first = second = string.ascii_lowercase[:rank]
        inner = first[axis % rank]
        out = first.replace(inner, "")
        shape = [max(*pair) for d, pair in enumerate(zip(a.shape, b.shape, strict=True)) if d != axis % rank]
    else:
        rank = max(a.dim(), b.dim())
        lead, inner = string.ascii_lowercase[: rank - 2], "M"
        first, second, out = lead[rank - a.dim() :] + "XM", lead[rank - b.dim() :] + "YM", lead + "XY"
        shape = list(output_shape(node))
    for one, other, labels in ((a, b, first), (b, a, second)):
        if bool((small(other) == NOBODY).all()):
            builder.fix(one, [labels.index(inner)], f"{name} in {layer!r} compares them with a value of fixed size")
    found = contract(builder, node, [(a, first), (b, second)], out, shape)
    builder.distances += [(small(side).reshape(-1), f"{name} in {layer!r}") for side in (a, b)]
    return found if tuple(found.shape) == output_shape(node) else found.reshape(output_shape(node))


@rule("addmm", "baddbmm")
def addmm(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """C = bias + A B, the linear layer of GPT-2. With computed factors, it is a product and a sum."""
    bias, a, b = args[:3]
    if (
        isinstance(a, Tensor)
        and isinstance(b, ParameterRef)
        and isinstance(bias, ParameterRef)
        and len(bias.shape) == 1
        and not kwargs
    ):
        return mix(builder, node, a, b, bias, dim=0)
    product, added = matmul(builder, node, (a, b), {}), builder.shadow(bias)
    if added is None:
        return builder.barrier(node, args, f"addmm in {layer_name(node)!r} on a value that the trace can't follow")
    return merge(builder, "add", layer_name(node), product, added, output_shape(node))


@rule("einsum")
def einsum(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A sum of products, given by its labels."""
    values = list(args[1])
    if not all(isinstance(value, (Tensor, ParameterRef)) for value in values):
        return builder.barrier(node, args, f"einsum in {layer_name(node)!r}")
    names, out = spelled_out(str(args[0]), [len(value.shape) for value in values])
    if any(len(set(each)) < len(each) for each in names):
        return builder.barrier(node, args, f"einsum in {layer_name(node)!r}")
    return _product(builder, node, args, values, names, out)


def _product(
    builder: Builder, node: fx.Node, args: tuple[Any, ...], values: Sequence[Any], names: Sequence[str], out: str
) -> Any:
    """The sum of products of values: a layer, if one of two is a parameter that mixes the other one's channels."""
    for x, weight in ((0, 1), (1, 0)) if len(values) == 2 else ():
        if isinstance(values[x], Tensor) and isinstance(values[weight], ParameterRef):
            mixed = _mixed(builder, node, values[x], values[weight], [names[x], names[weight]], out)
            if mixed is not None:
                return mixed
    shadows = [_operand(builder, v, next((o for o in values if o is not v), None)) for v in values]
    if any(shadow is None for shadow in shadows):
        return builder.barrier(node, args, f"{str(node.target).split('.')[1]} in {layer_name(node)!r}")
    return contract(builder, node, [(s, n) for s, n in zip(shadows, names, strict=True) if s is not None], out)


@rule("tensordot", "inner")
def tensordot(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A sum of products over some axes of two factors; ``inner`` sums over the last axis of each."""
    name, (a, b) = str(node.target).split(".")[1], args[:2]
    if not all(isinstance(value, (Tensor, ParameterRef)) for value in (a, b)):
        return builder.barrier(node, args, f"{name} in {layer_name(node)!r} on a value that the trace can't follow")
    summed = (args[2], args[3]) if name == "tensordot" else ([-1], [-1])
    names, out = dotted((len(a.shape), len(b.shape)), summed)
    return _product(builder, node, args, (a, b), names, out)


def _mixed(
    builder: Builder, node: fx.Node, x: Tensor, weight: ParameterRef, names: Sequence[str], out: str
) -> Tensor | None:
    """The result if the right factor mixes the left one's channels, else None.

    It is a matrix, or one for each index of axes that both factors and the result have (the frequencies of a Fourier
    neural operator).
    """
    read = [label for label in names[1] if label in names[0] and label not in out]
    made = [label for label in names[1] if label in out and label not in names[0]]
    if len(read) == 1 and names[1] == read[0] and out == names[0].replace(read[0], ""):
        return _weighed(builder, node, x, weight, names[0].index(read[0]))
    each = [label for label in names[1] if label in names[0] and label in out]
    if len(set(names[1])) != len(read) + len(made) + len(each) or len(read) != 1 or len(made) != 1:
        return None
    if weight.shape[names[1].index(read[0])] != x.shape[names[0].index(read[0])]:
        return None  # one of both is broadcast along this axis
    ids = builder.channels(x, names[0].index(read[0]))
    if ids is None or not bool(builder.ids.issued(ids).any()):
        return None
    dim, layer = names[1].index(made[0]), weight.name.rpartition(".")[0] or layer_name(node)
    if linear := linear_axes(names[0], names[1], out):
        builder.read(layer, weight.name, None, "linear", ids, dim=linear.dim)
    else:
        builder.tie(weight.name, names[1].index(read[0]), ids)
    issued = builder.produce(node, layer, weight.name, None, weight.shape[dim], dim)
    return builder.spread(issued, out.index(made[0]), output_shape(node))


@rule("scaled_dot_product_attention")
def attention(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """softmax(Q K^T + mask) V: heads are cut as a whole; with grouped queries, all heads that share a key together."""
    names = ("query", "key", "value", "attn_mask")
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    parts = [builder.shadow(given[name]) for name in names[:3]]
    if any(part is None for part in parts):
        return builder.barrier(node, args, f"attention in {layer_name(node)!r} on a value that the trace can't follow")
    q, k, v = (part for part in parts if part is not None)
    if kwargs.get("enable_gqa") and q.dim() > 2:
        k, v = (part.repeat_interleave(q.shape[-3] // part.shape[-3], -3) for part in (k, v))
    lead = string.ascii_lowercase[: q.dim() - 2]
    factors: list[_Labeled] = [(q, lead + "LE"), (k, lead + "SE")]
    if kwargs.get("scale") is None:
        for part in (q, k):
            builder.fix(part, [-1], f"attention in {layer_name(node)!r} divides by the square root of their number")
    mask = builder.shadow(given.get("attn_mask"))
    if mask is not None and mask.dim() <= q.dim():
        mask = mask.reshape([1] * (q.dim() - mask.dim()) + list(mask.shape))
        factors.append((mask, lead + "LS"))
    scores = contract(builder, node, factors, lead + "LS", (*q.shape[:-1], k.shape[-2]))
    return contract(builder, node, [(scores, lead + "LS"), (v, lead + "SF")], lead + "LF")
