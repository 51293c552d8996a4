"""Pooling, resampling, Fourier transforms, and reductions over any axes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from lbyl.graph import channel_means as averages
from lbyl.graph.builder import Builder, ParameterRef, layer_name, nobody_like, output_shape
from lbyl.graph.rules import rule
from lbyl.graph.rules.elementwise import combine, merge
from lbyl.graph.union_find import NOBODY, compact, small, varies

_POOLS = [
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    *(f"fractional_max_pool{n}d" for n in (2, 3)),
]
_RESAMPLE = [
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d")),
    *(f"_upsample_{kind}" for kind in ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d")),
    *(f"_upsample_{kind}" for kind in ("bilinear2d_aa", "bicubic2d_aa", "lanczos2d_aa")),
    "upsample_trilinear3d",
]


@rule(*_POOLS, *_RESAMPLE)
def pool(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pooling and resampling of each channel over the trailing axes."""
    name = str(node.target).split(".")[1]
    match = re.search(r"(\d)d", name)
    assert match is not None
    x = builder.shadow(args[0])
    if not isinstance(x, Tensor):
        return builder.barrier(node, args, f"{name} on a value that the trace can't follow")
    before, after = (tuple(shape)[-int(match[1]) :] for shape in (x.shape, _shape_of(node)))
    same = [old == new for old, new in zip(before, after, strict=True)]
    if name.startswith(("max_pool", "avg_pool")):
        size = args[1] if isinstance(args[1], list | tuple) else [args[1]]
        kernel = size * len(same) if len(size) == 1 else size
        same = [s and taps == 1 for s, taps in zip(same, kernel, strict=True)]
    elif name.startswith("fractional"):
        same = [False] * len(same)
    found, pooled = compact(builder.ids.find(x)), [d - len(same) for d, kept in enumerate(same) if not kept]
    if any(varies(found, d) for d in pooled) and bool((small(found) == NOBODY).any()):
        # Channels between zeros, as local response norms lay them.
        why = f"{name} in {layer_name(node)!r} slides over channels, so that each of them is mixed with its neighbors"
        return builder.barrier(node, [x], why)
    return _each_alone(builder, node, x, pooled)


def _shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's first output."""
    val = node.meta["val"]
    return tuple((val if isinstance(val, Tensor) else val[0]).shape)


def _each_alone(builder: Builder, node: fx.Node, x: Tensor, dims: Iterable[int]) -> Any:
    """The result of an operation that acts on each channel separately along the axes ``dims``."""
    name, x = str(node.target).split(".")[1], compact(builder.ids.find(x))
    dims = {d % x.dim() for d in dims}
    if any(varies(x, d) for d in dims):
        if bool((small(x) == NOBODY).any()):
            return builder.barrier(node, [x], f"{name} in {layer_name(node)!r} on a value of which parts have channels")
        if not any(varies(x, d) for d in range(x.dim()) if d not in dims):
            return builder.barrier(node, [x], f"{name} over channels in {layer_name(node)!r}")
        x = compact(builder.ids.find(builder.join(x, dims)))
    for d in dims:
        x = x.narrow(d, 0, 1)
    builder.step(small(x).reshape(-1), name, layer_name(node))
    return _results(node, x)


def _results(node: fx.Node, x: Tensor) -> Any:
    """The shadows of a node's outputs, from a shadow ``x`` that has size 1 along the axes that were reduced."""
    val = node.meta["val"]
    if isinstance(val, Tensor):
        return x.expand(val.shape) if val.dim() == x.dim() else x.reshape(val.shape)
    return [x.expand(item.shape) if item.dim() == x.dim() else x.reshape(item.shape) for item in val]


@rule("max_unpool2d", "max_unpool3d")
def unpool(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The reverse of max pooling: the values of each channel go to the places that the same channel's indices name."""
    name, (x, places) = str(node.target).split(".")[1], map(builder.shadow, args[:2])
    if x is None or places is None:
        return builder.barrier(node, args, f"{name} in {layer_name(node)!r} on a value that the trace can't follow")
    both = merge(builder, name, layer_name(node), x, places, tuple(x.shape))
    return _each_alone(builder, node, both, range(-int(name[-2]), 0))


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def sample(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sampling of each channel at positions that another value gives, as two or three coordinates."""
    x, grid = args[:2]
    if not isinstance(x, Tensor):
        return builder.barrier(
            node, args, f"grid_sampler in {layer_name(node)!r} on a value that the trace can't follow"
        )
    if isinstance(grid, Tensor):
        builder.pin(grid, f"grid_sampler in {layer_name(node)!r} uses them as coordinates")
    return _each_alone(builder, node, x, range(2, x.dim()))


@rule(
    *(f"fft_{way}{kind}" for way in ("", "i") for kind in ("fft", "fft2", "fftn", "rfft", "rfft2", "rfftn", "fftshift"))
)
def fft(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Fourier transforms of each channel along axes without channels."""
    name, x = str(node.target).split(".")[1], args[0]
    if not isinstance(x, Tensor):
        return builder.barrier(node, args, f"{name} in {layer_name(node)!r} on a value that the trace can't follow")
    position = 1 if name.endswith("shift") else 2
    usual = None if name.endswith(("n", "shift")) else (-2, -1) if name.endswith("2") else -1
    dims = args[position] if len(args) > position else kwargs.get("dim", usual)
    dims = range(x.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    return _each_alone(builder, node, x, dims)


@rule("view_as_real", "view_as_complex")
def parts(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Conversion between complex numbers and a last axis of size two with real and imaginary parts."""
    x, name = builder.shadow(args[0]), str(node.target).split(".")[1]
    if x is None:
        return builder.barrier(node, args, f"{name} in {layer_name(node)!r} on a value that the trace can't follow")
    if name == "view_as_real":
        return x.unsqueeze(-1).expand(output_shape(node))
    return builder.join(x, [-1])[..., 0]


_OF_THOSE_THAT_STAY = (
    "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
    "logsumexp", "prod", "median", "aminmax",
)  # fmt: skip
"""Reductions over channels that can be taken over the kept channels after a cut."""


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "norm", "logsumexp", "linalg_vector_norm", "max", "min", "softmax",
    "_softmax", "log_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "prod", "sort", "argsort",
    "msort",
    "median", "nanmedian", "mode", "kthvalue", "topk", "argmax", "argmin", "any", "all", "count_nonzero", "nansum",
    "nanmean", "aminmax", "var_mean", "std_mean",
)  # fmt: skip
def reduce(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Reductions: channels along other axes than the reduced ones stay separate.

    Where ids change along both reduced and other axes (radix splits, heads), the ids along reduced axes are merged.
    """
    name, x = str(node.target).split(".")[1], args[0]
    if isinstance(x, ParameterRef):
        x = builder.shadow(x)
    if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor | ParameterRef):
        return combine(builder, node, args, kwargs)
    position = 2 if name in ("linalg_vector_norm", "norm", "kthvalue", "topk") else 1
    usual = -1 if name in ("sort", "argsort", "kthvalue", "topk", "mode") else 0 if name == "msort" else None
    dims = args[position] if len(args) > position else kwargs.get("dim", usual)
    dims = usual if isinstance(dims, bool) else dims
    if not isinstance(x, Tensor) or dims is None or isinstance(dims, Tensor):
        return builder.barrier(node, args, f"{name} over all axes in {layer_name(node)!r}")
    x = compact(builder.ids.find(x))
    dims = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
    if any(varies(x, d) for d in dims):
        if not any(varies(x, d) for d in range(x.dim()) if d not in dims):
            along = [d for d in dims if varies(x, d)]
            if builder.pairs.among(x):
                return nobody_like(node)  # a sum, to which products of channels that are zero add nothing
            if not bool(builder.ids.issued(small(x)).any()):
                # The weights of a sum, say, that are a parameter.
                builder.pin(x, f"{name} in {layer_name(node)!r} is taken over a parameter")
                return nobody_like(node)
            if name == "mean" and len(along) == 1:
                averages.start(builder, node, small(x).reshape(-1), along[0])
                return nobody_like(node)
            if name in _OF_THOSE_THAT_STAY and len(along) == 1:
                builder.statistics[builder.reduction(node, along[0])] = small(x).reshape(-1)
                return nobody_like(node)
            return builder.barrier(node, args, f"{name} over channels in {layer_name(node)!r}")
        x = compact(builder.ids.find(builder.join(x, dims)))
    builder.step(small(x).reshape(-1), name, layer_name(node))
    for d in dims:
        x = x.narrow(d, 0, 1)
    return _results(node, x)
