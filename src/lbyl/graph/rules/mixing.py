"""Layers that read channels and make new ones: convolutions, linear layers, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lbyl.graph.builder import Builder, ParameterRef, layer_name, nobody_like, output_shape
from lbyl.graph.program import CONSTANT
from lbyl.graph.rules import rule
from lbyl.graph.rules.elementwise import merge
from lbyl.graph.rules.viewed import read_through_view
from lbyl.graph.types import Depthwise
from lbyl.graph.union_find import NOBODY, compact, small, varies
from lbyl.runtime.reductions import aten_name


def _layer(node: fx.Node, weight: ParameterRef) -> str:
    return weight.name.rpartition(".")[0] or layer_name(node)


def _first_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's first output."""
    val = node.meta["val"]
    return tuple((val if isinstance(val, Tensor) else val[0]).shape)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str, default: Any = None) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


_PRODUCTS = {"matmul": 1, "mm": 1, "linear": 1, "addmm": 2}
"""Operations that multiply a value by a matrix, and where the matrix is among their arguments."""


def is_turned_weight(node: fx.Node) -> bool:
    """Whether a node transposes a matrix that linear layers alone read, as in ``x @ weight.T``."""
    before = node.args[0].meta["val"].shape if isinstance(node.args[0], fx.Node) else ()
    readers = [(user, _PRODUCTS.get(aten_name(user.target), 0)) for user in node.users]
    return (
        len(before) == 2
        and tuple(before[::-1]) == output_shape(node)
        and aten_name(node.target) in ("t", "numpy_T", "mT", "transpose", "permute", "swapaxes", "swapdims")
        and all(place and len(user.args) > place and user.args[place] is node for user, place in readers)
        and all(sum(argument is node for argument in user.args) == 1 for user, _ in readers)
    )


def mix(
    builder: Builder, node: fx.Node, x: Tensor, weight: ParameterRef, bias: ParameterRef | None, dim: int = 1
) -> Any:
    """A linear layer over the last axis; ``dim`` is the input dimension of its weight."""
    x = compact(builder.ids.find(x))
    if weight.turned:
        weight, dim = ParameterRef(weight.name, weight.shape[::-1]), 1 - dim
    if x.shape[-1] > 1 and not varies(x, -1) and any(varies(x, d) for d in range(x.dim() - 1)):
        # It mixes positions, and every channel in the same way (the token mixing of MLP-Mixer).
        builder.step(small(x).reshape(-1), "linear over positions", _layer(node, weight))
        builder.whole.setdefault(weight.name, f"linear in {layer_name(node)!r} mixes positions, and no channels")
        return x.narrow(-1, 0, 1).expand(output_shape(node))
    ids = builder.gather(x, -1)
    if ids is None:
        return builder.barrier(node, [x, weight], f"linear in {layer_name(node)!r} on mixed axes")
    layer, bias_name = _layer(node, weight), bias.name if bias else None
    builder.read(layer, weight.name, bias_name, "linear", ids, dim=dim)
    out = builder.produce(node, layer, weight.name, bias_name, weight.shape[1 - dim], 1 - dim)
    return builder.spread(out, -1, output_shape(node))


@rule("linear")
def linear(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """y = x W^T + b, over the last axis."""
    x, weight, bias = args[0], args[1], _argument(args, kwargs, 2, "bias")
    if isinstance(x, ParameterRef) and (own := builder.shadow(x)) is not None:
        # A parameter used as an input (positions, learned queries) is treated like an input: it keeps its columns.
        builder.pin(small(own).reshape(-1), f"{x.name} is a parameter that {layer_name(node)!r} takes as its input")
        x = torch.full((), NOBODY).expand(x.shape)
    if isinstance(x, Tensor) and isinstance(weight, Tensor) and bias is None:
        read = read_through_view(builder, node, x)
        if read is not None:
            return read
    if not isinstance(x, Tensor) or not isinstance(weight, ParameterRef):
        return _with_computed_weight(builder, node, args, -1)
    if isinstance(bias, Tensor):
        # A bias computed from parameters (Swin V2 zeroes a part of it) is treated as a value added to the output.
        out = mix(builder, node, x, weight, None)
        return merge(builder, "bias", layer_name(node), out, bias, output_shape(node))
    return mix(builder, node, x, weight, bias)


@rule("embedding")
def embedding(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """y = W[i]: rows of a table, whose columns are the channels."""
    weight = args[0]
    if not isinstance(weight, ParameterRef):
        return builder.barrier(node, args, f"embedding in {layer_name(node)!r} with a computed table")
    # Named after the module that runs it, because a tied table may be named after the output layer.
    layer = layer_name(node) or _layer(node, weight)
    out = builder.produce(node, layer, weight.name, None, weight.shape[1], 1)
    return builder.spread(out, -1, _first_shape(node))


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sums, means or maxima of rows of a table, whose columns are the channels."""
    out = embedding(builder, node, args, kwargs)
    return [out, *nobody_like(node)[1:]] if isinstance(out, Tensor) else out


@rule("bilinear")
def bilinear(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """y_o = a^T W_o b + bias_o, over the last axes. Its weight is [out, first, second]."""
    first, second, weight, bias = args[0], args[1], args[2], _argument(args, kwargs, 3, "bias")
    if not isinstance(weight, ParameterRef) or not isinstance(bias, ParameterRef | None):
        return builder.barrier(node, args, f"bilinear in {layer_name(node)!r} with a weight that the model computes")
    sides = [builder.gather(x, -1) if isinstance(x, Tensor) else None for x in (first, second)]
    if any(ids is None for ids in sides):
        return builder.barrier(node, args, f"bilinear in {layer_name(node)!r} on mixed axes")
    for dim, ids in enumerate(sides, 1):
        assert ids is not None
        builder.tie(weight.name, dim, ids)
    out = builder.produce(node, _layer(node, weight), weight.name, bias.name if bias else None, weight.shape[0])
    return builder.spread(out, -1, output_shape(node))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Transposed convolution, whose weight is stored input first."""
    x, weight, bias = args[0], args[1], _argument(args, kwargs, 2, "bias")
    blocks = _argument(args, kwargs, 6, "groups", 1)
    op = str(node.target).split(".")[1]
    if not isinstance(x, Tensor) or not isinstance(weight, ParameterRef) or not isinstance(bias, ParameterRef | None):
        return _with_computed_weight(builder, node, args, 1 - len(weight.shape), dim=1, blocks=blocks)
    ids = builder.gather(x, x.dim() - len(weight.shape) + 1)
    if ids is None:
        return builder.barrier(node, args, f"{op} in {layer_name(node)!r} on mixed axes")
    axis, layer, bias_name = x.dim() - len(weight.shape) + 1, _layer(node, weight), bias.name if bias else None
    if blocks > 1 and weight.shape[0] == blocks:
        builder.step(ids, f"depthwise {op}", layer, parametric=True)
        out = builder.slot(weight.name, 0, ids, "carrier").repeat_interleave(weight.shape[1])
        if bias_name:
            builder.slot(bias_name, 0, out, "carrier")
    elif blocks > 1:
        builder.tie(weight.name, 0, ids)
        out = builder.produce(node, layer, weight.name, bias_name, weight.shape[1] * blocks, 1, blocks)
        builder.equal += [(ids, blocks), (out, blocks)]
    else:
        builder.read(layer, weight.name, bias_name, op, ids, dim=0)
        out = builder.produce(node, layer, weight.name, bias_name, weight.shape[1], 1)
    return builder.spread(out, axis, output_shape(node))


@rule("deform_conv2d")
def deformed(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Deformable convolution (torchvision): other values give the positions at which it reads."""
    x, weight, offset, mask, bias = args[:5]
    blocks, parts = args[11:13]
    if not isinstance(x, Tensor) or not isinstance(weight, ParameterRef):
        return builder.barrier(node, args, f"deform_conv2d in {layer_name(node)!r} with a computed weight")
    ids = builder.gather(x, 1)
    if ids is None or blocks > 1 or parts > 1:
        what = "on mixed axes" if ids is None else "with groups"
        return builder.barrier(node, args, f"deform_conv2d in {layer_name(node)!r} {what}")
    for places in (offset, mask):
        if isinstance(places, Tensor):
            builder.pin(places, f"deform_conv2d in {layer_name(node)!r} uses them as offsets or as a mask")
    bias_name = bias.name if isinstance(bias, ParameterRef) else None
    builder.tie(weight.name, 1, ids)
    out = builder.produce(node, _layer(node, weight), weight.name, bias_name, weight.shape[0])
    return builder.spread(out, 1, output_shape(node))


def _takes_each_alone(weight: ParameterRef, strides_and_pads: Sequence[Any], axes: Sequence[int]) -> bool:
    """Whether a convolution takes each index of these spatial axes by itself, and has a kernel of one pixel.

    Then channels along them stay separate, as under the token mixing of gMLP. A longer kernel along another axis would
    make channels of its own beside these.
    """
    strides, pads = (*strides_and_pads, *([1], [0])[len(strides_and_pads) :])
    strides, pads = ([item] if isinstance(item, (int, str)) else list(item) for item in (strides, pads))
    stepping = any(strides[d if len(strides) > 1 else 0] != 1 for d in axes)
    padded = any(pads[d if len(pads) > 1 else 0] not in (0, "valid", "same") for d in axes)
    return all(size == 1 for size in weight.shape[2:]) and not stepping and not padded


@rule("conv1d", "conv2d", "conv3d")
def conv(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Convolution: dense, grouped (every block keeps equally many channels) or depthwise (channels pass through)."""
    x, weight, bias = args[0], args[1], _argument(args, kwargs, 2, "bias")
    blocks = _argument(args, kwargs, 6, "groups", 1)
    op = str(node.target).split(".")[1]
    if isinstance(x, Tensor) and isinstance(weight, Tensor) and 1 < blocks == weight.shape[0] and bias is None:
        return _computed_depthwise(builder, node, x, weight)
    if not isinstance(x, Tensor) or not isinstance(weight, ParameterRef) or not isinstance(bias, ParameterRef | None):
        return _with_computed_weight(builder, node, args, 1 - len(weight.shape))
    axis = x.dim() - len(weight.shape) + 1
    layer, bias_name, shape = _layer(node, weight), bias.name if bias else None, output_shape(node)
    ids = builder.gather(x, axis)
    if ids is None:
        x = compact(builder.ids.find(x))
        along = [d for d in range(axis + 1, x.dim()) if varies(x, d)]
        if along and not varies(x, axis) and _takes_each_alone(weight, args[3:5], [d - axis - 1 for d in along]):
            builder.step(small(x).reshape(-1), f"{op} over positions", layer)
            builder.whole.setdefault(weight.name, f"{op} in {layer_name(node)!r} mixes positions, and no channels")
            return x.narrow(axis, 0, 1).expand(shape)
        what = "slides over them, so that each output mixes neighbors" if along else "is called on mixed axes"
        why = f"{op} in {layer_name(node)!r} {what}"
        if blocks > 1 or weight.shape[0] == 1:
            return builder.barrier(node, args, why)
        builder.barrier(node, [x], why)
        ids = torch.full((x.shape[axis],), NOBODY)  # what it makes is its own, as if it read an input
    if blocks > 1 and weight.shape[1] == 1:
        ids = ids.repeat_interleave(weight.shape[0] // blocks)
        producer = builder.follow(node)
        if producer is not None and weight.shape[0] == blocks:
            producer.stages.append(Depthwise(layer, weight.name, bias_name))
            builder.pure[node] = producer
        else:
            builder.step(ids, f"depthwise {op}", layer, parametric=True)
        ids = builder.slot(weight.name, 0, ids, "carrier")
        if bias_name:
            builder.slot(bias_name, 0, ids, "carrier")
        out = builder.spread(ids, axis, shape)
        builder.shaped(out, node)  # code that calls a function may spell out the number of channels
        return out
    builder.read(layer, weight.name, bias_name, op, ids, blocks)
    out = builder.produce(node, layer, weight.name, bias_name, weight.shape[0])
    if blocks > 1:
        builder.equal += [(ids, blocks), (out, blocks)]
    return builder.spread(out, axis, shape)


def _with_computed_weight(
    builder: Builder, node: fx.Node, args: tuple[Any, ...], axis: int, dim: int = 0, blocks: int = 1
) -> Any:
    """A layer whose weight the model computes: what it makes can't be cut, and is named after that layer.

    ``axis`` is the axis of its channels, and ``dim`` the dimension of the weight that holds them.
    """
    where, op, weight = layer_name(node), str(node.target).split(".")[1], args[1]
    sources = _sources(node.args[1])
    held = [source for source in sources if source.op == "placeholder"]
    foreign = bool(held) and all(CONSTANT in source.meta for source in held)
    why = f"{op} in {where!r} with a weight that " + (
        "is no parameter of the network (of a layer in a plain list? use nn.ModuleList; "
        "of one that forward makes? make it in __init__)"
        if foreign
        else "the model computes"
    )
    builder.computed.append(where)
    nobody = builder.barrier(node, args, why)
    name = weight.name if isinstance(weight, ParameterRef) else _computed_from(builder, sources)
    if name is None or len(weight.shape) < 2 or (name, dim) in builder.slots:
        return nobody
    out = builder.produce(node, where, name, None, weight.shape[dim] * blocks, dim, blocks)
    builder.pure.pop(node, None)  # its filters are not what is stored
    builder.pin(out, why)
    return builder.spread(out, axis, output_shape(node))


def _computed_from(builder: Builder, sources: Sequence[fx.Node]) -> str | None:
    """The parameter of a weight's own shape that it is computed from, and from no input of the network.

    ``sources`` holds the weight and all that it is computed from.
    """
    if not sources or builder.origins.get(sources[0]):
        return None
    shape = sources[0].meta["val"].shape
    found = (node for node in sources if node in builder.parameters and node.meta["val"].shape == shape)
    return next((builder.parameters[node] for node in found), None)


def _sources(value: Any) -> list[fx.Node]:
    """A value, and all that it is computed from, the nearest first."""
    queue = [value] if isinstance(value, fx.Node) else []
    known = set(queue)
    for node in queue:
        queue += [source for source in node.all_input_nodes if source not in known]
        known.update(node.all_input_nodes)
    return queue


def _computed_depthwise(builder: Builder, node: fx.Node, x: Tensor, weight: Tensor) -> Any:
    """A depthwise convolution with a kernel that forward makes, such as a blur: as wide as its input after a cut, too.

    Code that spells out the number of channels does not run after a cut, and verification leaves such groups whole.
    """
    layer, axis = layer_name(node), x.dim() - weight.dim() + 1
    ids = builder.gather(x, axis)
    kernel = builder.join(builder.ids.find(weight), range(1, weight.dim()))
    own = builder.gather(kernel, 0) if varies(compact(kernel), 0) else None
    if ids is None:
        return builder.barrier(node, [x, weight], f"convolution in {layer!r} on mixed axes")
    if own is not None:
        builder.ids.union(own, ids)
    builder.step(ids, "depthwise convolution", layer, parametric=True)
    out = builder.spread(ids, axis, output_shape(node))
    builder.shaped(out, node)
    return out
