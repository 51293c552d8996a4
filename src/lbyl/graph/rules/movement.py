"""Operations that only move data: they are applied to the channel ids in the same way as to the values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from lbyl.graph.builder import Builder, ParameterRef, code_of, layer_name, output_shape
from lbyl.graph.program import SIZES, is_spelled_out
from lbyl.graph.rules import rule
from lbyl.graph.rules.elementwise import DRAWN, as_number, merge
from lbyl.graph.rules.experts import is_stacked_weight
from lbyl.graph.rules.mixing import is_turned_weight
from lbyl.graph.union_find import NOBODY, compact, small, varies
from lbyl.graph.written import is_written, writes
from lbyl.runtime.reductions import aten_name


@rule(
    "permute", "transpose", "t", "unsqueeze", "squeeze", "flip", "movedim", "moveaxis", "swapaxes", "swapdims", "roll",
    "numpy_T", "mT", "rot90", "broadcast_to", "pixel_unshuffle", "repeat_interleave", "diagonal",
)  # fmt: skip
def move(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply the operation itself to the shadow."""
    if isinstance(args[0], ParameterRef) and is_stacked_weight(node):
        return ParameterRef(args[0].name, output_shape(node))
    if isinstance(args[0], ParameterRef) and is_turned_weight(node):
        return ParameterRef(args[0].name, output_shape(node), not args[0].turned)
    x = builder.shadow(args[0])
    if x is None:
        return builder.barrier(node, args, f"{node.target} on a value that the trace can't follow")
    assert callable(node.target)
    return compact(node.target(x, *args[1:], **kwargs))


@rule(
    "view", "reshape", "_unsafe_view", "flatten", "view_as", "reshape_as", "unflatten", "channel_shuffle",
    "native_channel_shuffle",
)  # fmt: skip
def reshape(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new shape. The layer that reads the result finds the order of its input channels in the shadow."""
    x = builder.shadow(args[0])
    if x is None:
        return builder.barrier(node, args, f"{node.target} on a value that the trace can't follow")
    result = compact(x.reshape(output_shape(node)))
    if "channel_shuffle" in str(node.target):
        result = compact(torch.channel_shuffle(x, args[1]))
        builder.shaped(x.reshape(x.shape[0], args[1], -1, *x.shape[2:]), node, free=2)
    builder.shaped(result, node, _left_open(node, args))
    return result


def _left_open(node: fx.Node, args: tuple[Any, ...]) -> int | None:
    """The dimension of a view whose size the code leaves open; None if it spells out all of them."""
    name = aten_name(node.target)
    first, sizes = (args[1], args[2]) if name == "unflatten" else (0, args[1] if len(args) > 1 else None)
    return first + list(sizes).index(-1) if isinstance(sizes, list | tuple) and -1 in sizes else None


@rule("copy")
def copy(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A value written over another one, whose channels it takes the place of."""
    old, new = builder.shadow(args[0]), builder.shadow(args[1])
    if old is None or new is None:
        return builder.barrier(node, args, f"copy in {layer_name(node)!r} on a value that the trace can't follow")
    if bool((small(old) == NOBODY).all()):
        return compact(new.expand(output_shape(node)))
    return merge(builder, "copy", layer_name(node), new, old, output_shape(node))


@rule("expand_as")
def expand_as(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Copies along the axes of another value; after a cut there are as many as that value then has."""
    x, other = builder.shadow(args[0]), builder.shadow(args[1])
    if x is None or other is None:
        return builder.barrier(node, args, f"{node.target} on a value that the trace can't follow")
    if bool((small(x) != NOBODY).any()):
        return compact(x.expand(other.shape))
    x = x.reshape([1] * (other.dim() - x.dim()) + list(x.shape))
    for d in range(other.dim()):
        if x.shape[d] == other.shape[d]:
            other = other.narrow(d, 0, 1)
    return compact(other.expand(output_shape(node)))


@rule("expand", "repeat", "tile")
def repeat(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Copies. The code may spell out the sizes of the result."""
    x = builder.shadow(args[0])
    if x is None:
        return builder.barrier(node, args, f"{node.target} on a value that the trace can't follow")
    assert callable(node.target)
    result = compact(node.target(x, *args[1:], **kwargs))
    builder.shaped(result, node)
    return result


@rule(
    "chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "hsplit", "vsplit", "dsplit"
)
def split(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pieces along one axis. Pieces of equal size must keep equal sizes."""
    x = builder.shadow(args[0])
    if x is None:
        return builder.barrier(node, args, f"{node.target} on a value that the trace can't follow")
    assert callable(node.target)
    pieces = [compact(piece) for piece in node.target(x, *args[1:], **kwargs)]
    usual = {"hsplit": int(x.dim() > 1), "dsplit": 2}.get(aten_name(node.target), 0)
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", usual)) % x.dim()
    if varies(compact(builder.ids.find(x)), dim):
        if len({piece.shape[dim] for piece in pieces}) == 1:
            _keep_equal(builder, x, dim, len(pieces))
        # Also the whole value: the code may ask for half of a width that the module stores.
        for piece in (x, *pieces):
            builder.shaped(piece, node)
    return pieces


@rule("glu")
def glu(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """a * sigmoid(b), where a and b are the halves of one axis."""
    x, dim = builder.shadow(args[0]), args[1] if len(args) > 1 else kwargs.get("dim", -1)
    if x is None:
        return builder.barrier(node, args, "glu on a value that the trace can't follow")
    _keep_equal(builder, x, dim % x.dim(), 2)
    a, b = x.chunk(2, dim)
    builder.step(small(compact(a)).reshape(-1), "glu", layer_name(node))
    return merge(builder, "glu", layer_name(node), compact(a), compact(b), output_shape(node))


@rule("slice", "narrow")
def part(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A range of one axis. Halves must keep equal sizes. Other bounds may be attributes of the module.

    With a step, as where gates and their partners alternate, neighbors are cut together, so that others stay in place.
    """
    x = builder.shadow(args[0])
    if x is None:
        return builder.barrier(node, args, f"{node.target} on a value that the trace can't follow")
    assert callable(node.target)
    result = compact(node.target(x, *args[1:], **kwargs))
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % x.dim()
    if is_written(node):
        return result
    if result.shape != x.shape and varies(compact(builder.ids.find(x)), dim):
        size, start = x.shape[dim], (args[2] if len(args) > 2 else kwargs.get("start")) or 0
        start = max(start + size, 0) if start < 0 else min(start, size)
        step = args[4] if len(args) > 4 else 1
        if step > 1 and size % step == 0:
            pairs = builder.join(x.unflatten(dim, (-1, step)), [dim + 1])
            builder.shaped(x, node)
            builder.shaped(result, node)
            return compact(node.target(builder.ids.find(pairs.flatten(dim, dim + 1)), *args[1:], **kwargs))
        if 2 * result.shape[dim] == size and start in (0, size // 2):
            _keep_equal(builder, x, dim, 2)
        elif pieces := _pieces_by_size(builder, node, size, (start, start + result.shape[dim])):
            _keep_equal(builder, x, dim, pieces)
        builder.shaped(x, node)
        builder.shaped(result, node)
        for bound in (start, start + result.shape[dim]):
            if 0 < bound < size:
                builder.shaped(x.narrow(dim, 0, bound), node)
    return result


def _pieces_by_size(builder: Builder, node: fx.Node, size: int, bounds: tuple[int, int]) -> int:
    """Into how many equal pieces of an axis the code divides its size, to take some of them; 0 if it does not.

    An example is a shift of ``x.shape[1] // 8`` channels in time. Bounds that the module keeps are no parts of the
    size; one of them may be among its numbers by chance. A cut can't follow bounds that the code spells out anyway.
    """
    piece = math.gcd(size, *bounds)
    inner = [bound for bound in bounds if 0 < bound < size]
    if not node.meta.get(SIZES) or piece == 1 or not inner:
        return 0
    kept = builder.numbers.get(code_of(node), frozenset())
    return 0 if all(bound in kept for bound in inner) else size // piece


def _keep_equal(builder: Builder, x: Tensor, dim: int, pieces: int) -> None:
    ids = builder.channels(x, dim)
    if ids is not None:
        builder.equal.append((ids, pieces))


@rule("select", "unbind")
def pick(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One index of an axis. The axis must keep its size."""
    x = builder.shadow(args[0])
    if x is None:
        return builder.barrier(node, args, f"{node.target} on a value that the trace can't follow")
    assert callable(node.target)
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    where = args[2] if len(args) > 2 and isinstance(args[2], int) else None
    stay = x if where is None else _up_to(x, dim, [where])
    picked = node.target(x, *args[1:], **kwargs)
    # A place that is still empty is filled: of results that are collected one by one, say.
    if not (is_written(node) and isinstance(picked, Tensor) and bool((small(picked) == NOBODY).all())):
        builder.fix(x, [dim], f"one of them is selected by its index in {layer_name(node)!r}", stay)
    return [compact(item) for item in picked] if isinstance(picked, (list, tuple)) else compact(picked)


def _up_to(x: Tensor, dim: int, indices: Sequence[int]) -> Tensor:
    """The part of a shadow that has to stay so that indices along ``dim`` point to the same elements.

    Indices from 0 on are counted from the front, and negative ones from the end.
    """
    size, front, back = x.shape[dim], max(indices) + 1, -min(indices)
    if min(indices) < 0 <= max(indices):
        return x
    return x.narrow(dim, 0, front) if front > 0 else x.narrow(dim, size - back, back)


@rule("pixel_shuffle")
def pixel_shuffle(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Channels become space: the channels that make one output channel are merged."""
    x, factor = args[0], args[1]
    ids = builder.gather(x, -3) if isinstance(x, Tensor) else None
    if ids is None:
        return builder.barrier(node, args, f"pixel_shuffle in {layer_name(node)!r} on mixed axes")
    joined = builder.join(ids.reshape(-1, factor**2), [1])[:, 0]
    shape = output_shape(node)
    return builder.spread(joined, len(shape) - 3, shape)


@rule("cat", "concat", "concatenate", "stack")
def cat(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Concatenation: channels stay separate along its axis and are merged along every other one."""
    shadows = [shadow for item in args[0] if (shadow := builder.shadow(item)) is not None]
    if len(shadows) < len(args[0]):
        return builder.barrier(node, args, f"{node.target} on a value that the trace can't follow")
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if aten_name(node.target) == "stack":
        dim %= shadows[0].dim() + 1
        shadows = [shadow.unsqueeze(dim) for shadow in shadows]
    listed = node.args[0] if isinstance(node.args[0], list | tuple) else ()
    sources = [source if isinstance(source, fx.Node) else node for source in listed]
    pieces = [(compact(builder.ids.find(s)), source) for s, source in zip(shadows, sources, strict=True)]
    pieces = [piece for piece in pieces if piece[0].shape != (0,)]
    dim %= pieces[0][0].dim()
    pieces = [piece for piece in pieces if piece[0].shape[dim]] or pieces[:1]
    shadows = [shadow for shadow, _ in pieces]
    if any(varies(shadow, d) for shadow in shadows for d in range(shadow.dim()) if d != dim):
        shadows = _aligned(builder, pieces, dim, layer_name(node))
    result = compact(torch.cat(shadows, dim))
    if aten_name(node.target) == "stack":
        builder.shaped(result, node)
    return result


@rule("hstack", "vstack", "dstack", "column_stack", "row_stack")
def cat_by_name(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Concatenations along a fixed axis of values that have it."""
    dim = {"hstack": 1, "column_stack": 1, "dstack": 2}.get(aten_name(node.target), 0)
    if any(len(output_shape(item)) <= max(dim, 1) for item in node.all_input_nodes):
        return builder.barrier(node, args, f"{node.target} of values with few dimensions in {layer_name(node)!r}")
    return cat(builder, node, (args[0], dim), {})


def _aligned(builder: Builder, pieces: Sequence[tuple[Tensor, fx.Node]], dim: int, layer: str) -> list[Tensor]:
    """Merge the channels of the pieces along all axes except ``dim``."""
    # A parameter (class token, position embedding) has an id for each element until it meets channels.
    shadows = [s if bool(builder.ids.issued(small(s)).any()) else builder.join(s, [dim]) for s, _ in pieces]
    if any(varies(shadow, dim) for shadow in shadows):
        return shadows
    slices = [as_number(source, s.narrow(dim, 0, 1)) for s, (_, source) in zip(shadows, pieces, strict=True)]
    shape, shared = tuple(shadows[0].narrow(dim, 0, 1).shape), slices[0]
    for other in slices[1:]:
        shared = merge(builder, "cat", layer, shared, other, shape)
    return [compact(builder.ids.find(shared)).expand(shadow.shape) for shadow in shadows]


@rule("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def pad(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Padding. Channels that a constant adds belong to no layer, and stay, with all that meets them."""
    x = args[0]
    if not isinstance(x, Tensor):
        return builder.barrier(node, args, f"{node.target} on a value that the trace can't follow")
    x, shape = compact(builder.ids.find(x)), output_shape(node)
    changed = [d for d in range(x.dim()) if shape[d] != x.shape[d]]
    along = [d for d in changed if varies(x, d)]
    if along and not _with_constant(node, args, kwargs):
        return builder.barrier(node, args, f"pad along channels in {layer_name(node)!r}")
    amounts: Any = kwargs["pad"] if "pad" in kwargs else args[1]
    for d in changed:
        last = 2 * (x.dim() - 1 - d)  # amounts begin with the last axis
        x = functional.pad(x, [0] * last + list(amounts[last : last + 2]), value=NOBODY) if d in along else x
        x = x if d in along else x.narrow(d, 0, 1)
    return compact(x).expand(shape)


def _with_constant(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether padding adds a constant, and not values of its neighbors."""
    name = aten_name(node.target)
    mode = args[2] if name == "pad" and len(args) > 2 else kwargs.get("mode", "constant")
    return name == "constant_pad_nd" or (name == "pad" and mode == "constant")


@rule("index_select", "index", "gather", "take_along_dim")
def index(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Selection by indices: along axes without channels, or by one list of indices that the code or a buffer holds."""
    name, x = str(node.target).split(".")[1], builder.shadow(args[0])
    if x is None:
        return builder.barrier(node, args, f"{name} on a value that the trace can't follow")
    given: list[Any] = [*node.args]
    if name == "take_along_dim":  # whose axis comes last
        value, places, dim = (*args, kwargs.get("dim"))[:3]
        if dim is None:
            return builder.barrier(node, args, f"{name} over all axes in {layer_name(node)!r}")
        args, given = (value, dim, places), [given[0], dim, given[1]]
    indices = args[1] if name == "index" else [*([None] * (args[1] % x.dim())), args[2]]
    picked = [d for d, item in enumerate(indices) if item is not None]
    x = compact(builder.ids.find(x))
    if not bool(builder.ids.issued(small(x)).any()):
        x = builder.join(x, picked)
    if any(varies(x, d) for d in picked):
        known = _known(given[1][picked[0]] if name == "index" else given[2])
        if len(picked) > 1 or known is None or known.dim() != 1 or name not in ("index", "index_select"):
            return builder.barrier(node, args, f"{name} along channels in {layer_name(node)!r}")
        stay = _up_to(x, picked[0], known.tolist()) if known.numel() else x
        builder.fix(x, picked, f"they are selected by their indices in {layer_name(node)!r}", stay)
        return compact(x.index_select(picked[0], known % x.shape[picked[0]]))
    if name != "index":
        for d in picked:
            x = x.narrow(d, 0, 1)
        return compact(x.expand(output_shape(node)))
    places = tuple(
        slice(None) if item is None else torch.zeros(tuple(item.shape), dtype=torch.int64) for item in indices
    )
    return compact(x[places])


def _known(source: Any) -> Tensor | None:
    """The whole numbers in a constant of the code or in a buffer; None for other values."""
    while isinstance(source, fx.Node) and source.op == "call_function" and aten_name(source.target) in _MOVES:
        source = source.args[0]
    return source.meta.get("whole numbers") if isinstance(source, fx.Node) else None


_MOVES = ("lift_fresh", "lift_fresh_copy", "detach", "detach_", "alias", "clone", "to", "_to_copy", "contiguous")


@rule("im2col")
def unfold(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Patches become channels: each channel is repeated once for every position in the kernel."""
    x, kernel = args[0], args[1]
    ids = builder.gather(x, -3) if isinstance(x, Tensor) else None
    if ids is None:
        return builder.barrier(node, args, f"unfold in {layer_name(node)!r} on mixed axes")
    return builder.spread(ids.repeat_interleave(kernel[0] * kernel[1]), -2, output_shape(node))


@rule("col2im")
def fold(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Channels become patches: the channels that make one output channel are merged."""
    x, kernel = args[0], args[2]
    ids = builder.gather(x, -2) if isinstance(x, Tensor) else None
    if ids is None:
        return builder.barrier(node, args, f"fold in {layer_name(node)!r} on mixed axes")
    joined = builder.join(ids.reshape(-1, kernel[0] * kernel[1]), [1])[:, 0]
    return builder.spread(joined, -3, output_shape(node))


@rule("unfold")
def windows(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Windows along an axis without channels. The positions inside a window become a new last axis."""
    x = builder.shadow(args[0])
    if x is None:
        return builder.barrier(node, args, "unfold on a value that the trace can't follow")
    dim, x = args[1] % x.dim(), compact(builder.ids.find(x))
    if varies(x, dim):
        return builder.barrier(node, args, f"unfold along channels in {layer_name(node)!r}")
    return x.narrow(dim, 0, 1).unsqueeze(-1).expand(output_shape(node))


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "bernoulli")
def like(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new value of the shape of another one, also after that one is cut. Fewer random numbers are other ones."""
    x = builder.shadow(args[0])
    if x is not None and ("rand" in str(node.target) or "bernoulli" in str(node.target)):
        builder.pin(x, f"{DRAWN} in {layer_name(node)!r}")
    return constant(builder, node, args, kwargs) if x is None else x


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def new(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new value. Where parts of it are written later, code usually takes its shape from the value that has the same.

    Others are filled with values of their own width, such as sums over the neighbors in a graph.
    """
    x = builder.shadow(args[0])
    same = x is not None and x.shape == output_shape(node) and any(is_written(user) for user in node.users)
    return x if same else constant(builder, node, args, kwargs)


@rule("zeros", "ones", "full", "arange", "empty", "rand", "randn")
def constant(builder: Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A value made from a shape alone.

    If an axis has a size that the module keeps as a number, it may be the width of a layer, as in a state that starts
    as zeros. Of several, the foremost is more likely to be one. So may the first axis after the rows, see
    :func:`_is_derived`. Whoever meets it later then shares its channels.
    """
    shape, own = output_shape(node), builder.numbers.get(code_of(node), ())
    # A state has a row for each input, in front of its channels; masks and grids have none.
    rows = shape.index(builder.batch) if builder.batch in shape else len(shape)
    after = [d for d in range(rows + 1, len(shape)) if shape[d] > 1]
    found = [d for d in after if shape[d] in own]
    if not found and rows + 1 in after and _is_derived(builder, node, shape[rows + 1]):
        found = [rows + 1]
    made_of = [value for each in (node, *node.users) if isinstance(value := each.meta.get("val"), Tensor)]
    counts = aten_name(node.target) == "arange" or not all(value.is_floating_point() for value in made_of)
    # Sums are written to the whole of a value, which is no reason against channels in it.
    in_parts = any(is_written(user) and not writes(user) for user in node.users)
    if counts or not found or in_parts:
        return torch.full((), NOBODY, dtype=torch.int64).expand(shape)
    made = builder.spread(builder.ids.fresh(shape[found[0]]), found[0], shape)
    builder.starts.append((made, node))
    return made


def _is_derived(builder: Builder, node: fx.Node, size: int) -> bool:
    """Whether the code seems to take the width of a constant from a parameter or another value.

    This is so if an axis of a parameter is as long, and the code does not spell it out. Zeros that are set beside other
    channels fill up what is missing.
    """
    derived = size in builder.widths and not is_spelled_out(node, size)
    return derived and all(aten_name(user.target) != "cat" for user in node.users)
