"""Operations on sampled values along axes without channels: differences, integrals, quantiles, bins, regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from lbyl.graph.builder import Builder, layer_name, output_shape
from lbyl.graph.rules import rule
from lbyl.graph.rules.elementwise import merge, unary
from lbyl.graph.union_find import NOBODY, compact, small, varies
from lbyl.runtime.reductions import aten_name


def _argument(args: Sequence[Any], kwargs: dict[str, Any], place: int, name: str, usual: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, usual)


def _without(builder: Builder, node: fx.Node, x: Any, dims: Sequence[int]) -> Tensor | None:
    """The shadow of a value with size 1 along these axes; None if channels run along them, or it can't be followed."""
    shadow = builder.shadow(x)
    if shadow is None:
        return None
    shadow = compact(builder.ids.find(shadow))
    if any(varies(shadow, d) for d in dims):
        return None
    for d in dims:
        shadow = shadow.narrow(d, 0, 1)
    builder.step(small(shadow).reshape(-1), aten_name(node.target), layer_name(node))
    return shadow


def _over_channels(builder: Builder, node: fx.Node, args: tuple[Any, ...]) -> Any:
    return builder.barrier(node, args, f"{aten_name(node.target)} over channels in {layer_name(node)!r}")


@rule("diff", "gradient", "trapezoid", "trapz", "cumulative_trapezoid")
def along(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Differences, slopes and integrals along an axis. What is put before or after the values has their channels."""
    name, x = aten_name(node.target), args[0]
    dims = _argument(args, kwargs, 2, "dim", -1) if name == "diff" else kwargs.get("dim", -1)
    dims = range(len(x.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    dims = [d % len(x.shape) for d in dims]
    found = _without(builder, node, x, dims)
    others = [*args[3:], *(kwargs.get(key) for key in ("prepend", "append"))] if name == "diff" else args[1:]
    for other in (each for each in others if isinstance(each, Tensor)):
        beside = _without(builder, node, other, dims) if other.dim() == len(x.shape) else other
        if found is None or beside is None or (beside is other and bool((small(other) != NOBODY).any())):
            return _over_channels(builder, node, args)
        if beside is not other and bool((small(beside) != NOBODY).any()):
            found = merge(builder, name, layer_name(node), found, beside, tuple(found.shape))
    if found is None:
        return _over_channels(builder, node, args)
    if name == "gradient":
        return [found.expand(item.shape) for item in node.meta["val"]]
    if name in ("trapezoid", "trapz"):
        found = found.squeeze(dims[0])
    return found.expand(output_shape(node))


@rule("quantile", "nanquantile")
def quantile(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Quantiles along an axis; where several are asked for, they become a first axis."""
    dim, stays = _argument(args, kwargs, 2, "dim", None), _argument(args, kwargs, 3, "keepdim", False)
    found = None if dim is None else _without(builder, node, args[0], [dim % len(args[0].shape)])
    if found is None or dim is None:
        return _over_channels(builder, node, args)
    found, shape = found if stays else found.squeeze(dim), output_shape(node)
    return (found if len(shape) == found.dim() else found.unsqueeze(0)).expand(shape)


@rule("renorm")
def renorm(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each index of an axis is scaled by its own norm over all others, along which there must be no channels."""
    x = args[0]
    dims = [d for d in range(len(x.shape)) if d != args[2] % len(x.shape)]
    found = _without(builder, node, x, dims) if isinstance(x, Tensor) else None
    return _over_channels(builder, node, args) if found is None else found.expand(output_shape(node))


@rule("bucketize", "searchsorted", "isin")
def bins(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The bin that each element is in, where all channels have the same bins."""
    x, edges = (args[1], args[0]) if aten_name(node.target) == "searchsorted" else args[:2]
    shadow = builder.shadow(edges)
    if not isinstance(x, Tensor) or (shadow is not None and bool(builder.ids.issued(small(shadow)).any())):
        why = f"{aten_name(node.target)} in {layer_name(node)!r} takes its bins from channels"
        return builder.barrier(node, args, why)
    if isinstance(edges, Tensor) and edges.dim() > 1 and bool((small(x) != NOBODY).any()):
        return builder.barrier(node, args, f"{aten_name(node.target)} in {layer_name(node)!r} has bins of its own")
    return unary(builder, node, (x,), {})


@rule("one_hot")
def one_hot(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Classes become a last axis."""
    x = builder.shadow(args[0])
    if x is None:
        return builder.barrier(node, args, f"one_hot in {layer_name(node)!r} of a value that can't be followed")
    return x.unsqueeze(-1).expand(output_shape(node))


@rule("roi_align", "roi_pool")
def regions(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Regions of images (torchvision): each channel is sampled by itself, at places that another value gives."""
    x, places = args[:2]
    ids = builder.gather(x, 1) if isinstance(x, Tensor) else None
    if ids is None:
        return builder.barrier(node, args, f"{aten_name(node.target)} in {layer_name(node)!r} on mixed axes")
    if isinstance(places, Tensor):
        builder.pin(places, f"{aten_name(node.target)} in {layer_name(node)!r} uses them as coordinates")
    builder.step(ids, aten_name(node.target), layer_name(node))
    val = node.meta["val"]
    found = [builder.spread(ids, 1, item.shape) for item in (val if isinstance(val, (list, tuple)) else [val])]
    return found if isinstance(val, (list, tuple)) else found[0]
