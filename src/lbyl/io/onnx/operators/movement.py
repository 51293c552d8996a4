"""Operators that only move data: shapes, axes, slices, copies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lbyl.io.onnx.arrays import DTYPES, as_tensor
from lbyl.io.onnx.operators.base import Node, as_floating, known, number, operator, whole


class Sized(nn.Module):
    """An operator that uses numbers of the file, some of which may be widths.

    Attributes:
        sizes: the numbers; None for a number that is only known when the network runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int | None] = []

    @property
    def size_axes(self) -> list[int]:
        """The axis that each of the numbers refers to."""
        return list(range(-len(self.sizes), 0))

    def numbers(self, *given: Any) -> list[int]:
        """All numbers: the known ones, and ``given`` ones for the rest."""
        now = [item for value in given if value is not None for item in whole(value)]
        if len(self.sizes) != len(now):
            return now
        return [item if size is None else size for size, item in zip(self.sizes, now, strict=True)]


class Reshape(Sized):
    """Another shape, in which 0 may mean that a size is kept."""

    def __init__(self, keep_zero: bool) -> None:
        super().__init__()
        self.keep_zero = keep_zero

    def forward(self, x: Any, shape: Any) -> Tensor:
        """The same elements in another shape."""
        x, sizes = _tensor(x), self.numbers(shape)
        if not self.keep_zero:
            sizes = [x.shape[place] if size == 0 else size for place, size in enumerate(sizes)]
        return x.reshape(sizes)


@operator("Reshape")
def reshape(node: Node) -> None:
    """Another shape."""
    module = Reshape(bool(node.attributes.get("allowzero", 0)))
    if node.operands < 2:
        node.sized(module, node.source(0), sizes=[(-1, "shape")])
    else:
        node.sized(module, node.source(0), node.source(1), sizes=[(1, "")])


def _tensor(x: Any) -> Tensor:
    return as_tensor(x) if isinstance(x, np.ndarray) else x


@operator("Flatten")
def flatten(node: Node) -> None:
    """Reshape to two axes: all axes before a given one, and the rest."""
    node.run(partial(_flatten, axis=node.attributes.get("axis", 1)), node.source(0))


def _flatten(x: Tensor, *, axis: int) -> Tensor:
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("Transpose")
def transpose(node: Node) -> None:
    """Axes in another order; by default in reverse."""
    node.run(partial(_transpose, order=node.attributes.get("perm")), node.source(0))


def _transpose(x: Any, *, order: Sequence[int] | None) -> Tensor:
    x = _tensor(x)
    return x.permute(list(order) if order is not None else list(range(x.dim()))[::-1])


def _axes(node: Node) -> list[int] | None:
    """The axes of a node: an attribute, or since opset 13 an operand."""
    if node.attributes.get("axes") is not None:
        return list(node.attributes["axes"])
    if node.operands < 2 or node.source(1) is None:
        return None
    found = node.constant(1)
    if found is None:
        raise node.refuse("its axes are computed")
    return whole(found)


@operator("Squeeze")
def squeeze(node: Node) -> None:
    """Remove axes of size 1."""
    node.run(partial(_squeeze, axes=_axes(node)), node.source(0))


def _squeeze(x: Tensor, *, axes: list[int] | None) -> Tensor:
    if axes is None:
        return x.squeeze()
    if any(x.shape[axis] != 1 for axis in axes):  # which PyTorch would keep
        raise ValueError(f"axes {axes} are not all of size 1")
    return x.squeeze(axes[0]) if len(axes) == 1 else x.squeeze(tuple(axes))


@operator("Unsqueeze")
def unsqueeze(node: Node) -> None:
    """Add axes of size 1."""
    node.run(partial(_unsqueeze, axes=_axes(node) or []), node.source(0))


def _unsqueeze(x: Any, *, axes: list[int]) -> Tensor:
    x = _tensor(x)
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def concat(node: Node) -> None:
    """Concatenation along an axis."""
    call = partial(_concat, axis=node.attributes["axis"])
    node.run(call, *(node.source(index) for index in range(node.operands)), floating=True)


def _concat(*values: Any, axis: int, floating: torch.dtype) -> Tensor:
    return torch.cat([as_floating(value, floating) for value in values], axis)


class Split(Sized):
    """Pieces along an axis."""

    @property
    def size_axes(self) -> list[int]:
        """That axis."""
        return [self.axis] * len(self.sizes)

    def __init__(self, axis: int, pieces: int) -> None:
        super().__init__()
        self.axis, self.pieces = axis, pieces

    def forward(self, x: Tensor, sizes: Any = None) -> tuple[Tensor, ...]:
        """The pieces."""
        known = self.numbers(sizes) if sizes is not None else self.sizes
        if not known:
            each = math.ceil(x.shape[self.axis] / self.pieces)
            return torch.split(x, each, self.axis)
        return torch.split(x, known, self.axis)  # pyright: ignore[reportArgumentType]


@operator("Split")
def split(node: Node) -> None:
    """Pieces along an axis, of equal size by default."""
    module = Split(node.attributes.get("axis", 0), node.outputs)
    if node.attributes.get("split") is not None:
        node.sized(module, node.source(0), sizes=[(-1, "split")])
    elif node.operands > 1 and node.source(1) is not None:
        node.sized(module, node.source(0), node.source(1), sizes=[(1, "")])
    else:
        node.sized(module, node.source(0), sizes=[])


@operator("SplitToSequence")
def split_to_sequence(node: Node) -> None:
    """Pieces along an axis, as a sequence."""
    if node.operands > 1 and not node.attributes.get("keepdims", 1):
        raise node.refuse("it drops an axis")
    module = Pieces(node.attributes.get("axis", 0), bool(node.attributes.get("keepdims", 1)))
    if node.operands > 1:
        node.sized(module, node.source(0), node.source(1), sizes=[(1, "")])
    else:
        node.sized(module, node.source(0), sizes=[])


class Pieces(Sized):
    """Pieces along an axis, as one value."""

    @property
    def size_axes(self) -> list[int]:
        """That axis."""
        return [self.axis] * len(self.sizes)

    def __init__(self, axis: int, keep: bool) -> None:
        super().__init__()
        self.axis, self.keep = axis, keep

    def forward(self, x: Tensor, sizes: Any = None) -> tuple[list[Tensor]]:
        """The pieces."""
        if sizes is None:
            pieces = torch.split(x, 1, self.axis)
            return (list(pieces if self.keep else [piece.squeeze(self.axis) for piece in pieces]),)
        known = self.numbers(sizes)
        each = known[0] if np.ndim(sizes) == 0 else known
        return (list(torch.split(x, each, self.axis)),)


@operator("SequenceAt")
def sequence_at(node: Node) -> None:
    """One value of a sequence."""
    node.run(_at, node.source(0), node.source(1))


def _at(values: list[Tensor], index: Any) -> Tensor:
    return values[whole(index)[0]]


@operator("ConcatFromSequence")
def concat_from_sequence(node: Node) -> None:
    """The values of a sequence, joined."""
    function = torch.stack if node.attributes.get("new_axis", 0) else torch.cat
    node.run(partial(function, dim=node.attributes["axis"]), node.source(0))


class Slice(Sized):
    """A range of some axes."""

    @property
    def size_axes(self) -> list[int]:
        """The axes of the starts, followed by those of the ends."""
        return [*(self.axes or range(len(self.sizes) // 2))] * 2

    def __init__(self, axes: list[int] | None, steps: list[int] | None) -> None:
        super().__init__()
        self.axes, self.steps = axes, steps

    def forward(self, x: Any, starts: Any = None, ends: Any = None) -> Tensor:
        """The elements in the ranges."""
        x = _tensor(x)
        bounds = self.numbers(starts, ends) if starts is not None else [int(size or 0) for size in self.sizes]
        count = len(bounds) // 2
        for place, axis in enumerate(self.axes or range(count)):
            step = self.steps[place] if self.steps else 1
            x = _range(x, axis, bounds[place], bounds[count + place], step)
        return x


def _range(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    axis, size = axis % x.dim(), x.shape[axis]
    place = (slice(None),) * axis
    if step > 0:
        return x[(*place, slice(start, end, step))]
    taken = list(range(size))[slice(start, end if end >= -size else None, step)]
    if taken == list(range(size))[::-1]:
        return x.flip(axis)
    return x.index_select(axis, torch.tensor(taken, dtype=torch.int64, device=x.device))


@operator("Slice")
def part(node: Node) -> None:
    """Ranges of some axes."""
    if node.operands < 2:
        axes = node.attributes.get("axes")
        module = Slice(None if axes is None else list(axes), None)
        node.sized(module, node.source(0), sizes=[(-1, "starts"), (-1, "ends")])
        return
    options = [None if node.source(index) is None else node.constant(index) for index in (3, 4)]
    if any(found is None and node.source(index) is not None for found, index in zip(options, (3, 4), strict=True)):
        raise node.refuse("its axes or steps are computed")
    axes, steps = (None if found is None else whole(found) for found in options)
    node.sized(Slice(axes, steps), *(node.source(index) for index in range(3)), sizes=[(1, ""), (2, "")])


@operator("Gather")
def gather(node: Node) -> None:
    """Rows of a table, or indices of an axis."""
    axis, table = node.attributes.get("axis", 0), node.constant(0)
    if table is not None and table.ndim == 2 and axis == 0 and table.dtype.kind == "f" and not node.is_constant(1):
        module = Table(len(table), table.shape[1], device="meta")
        node.layer(module, {"weight": (0, "same", 1.0)}, node.source(1))
        return
    node.run(partial(_gather, axis=axis), node.source(0), node.source(1))


class Table(nn.Embedding):
    """Rows of a table; negative indices count from its end."""

    def forward(self, input: Any) -> Tensor:
        """The rows."""
        index = _tensor(input).long()
        return super().forward(index.to(self.weight.device))


def _gather(x: Any, index: Any, *, axis: int) -> Tensor:
    x = _tensor(x)
    if isinstance(index, np.ndarray) and index.ndim == 0:
        return x.select(axis, int(index))
    axis %= x.dim()
    if isinstance(index, np.ndarray):
        index = np.where(index < 0, index + x.shape[axis], index)
    index = _tensor(index).long().to(x.device)
    flat = index.reshape(-1)
    taken = x.index_select(axis, flat)
    return taken if index.dim() == 1 else taken.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@operator("GatherElements")
def gather_elements(node: Node) -> None:
    """One element for each index along an axis."""
    node.run(partial(_gather_elements, axis=node.attributes.get("axis", 0)), node.source(0), node.source(1))


def _gather_elements(x: Any, index: Any, *, axis: int) -> Tensor:
    x, index = _tensor(x), _tensor(index).long()
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


@operator("GatherND")
def gather_nd(node: Node) -> None:
    """Slices at positions that are given as rows of indices."""
    if node.attributes.get("batch_dims", 0):
        raise node.refuse("it gathers with batch_dims")
    node.run(_gather_nd, node.source(0), node.source(1))


def _gather_nd(x: Any, index: Any) -> Tensor:
    x, index = _tensor(x), _tensor(index).long()
    return x[tuple(index.unbind(-1))]


@operator("ScatterND")
def scatter_nd(node: Node) -> None:
    """Values written to positions that are given as rows of indices."""
    if node.attributes.get("reduction", "none") != "none":
        raise node.refuse("it adds or multiplies the values that it writes")
    node.run(_scatter_nd, *(node.source(index) for index in range(3)), floating=True)


def _scatter_nd(x: Any, index: Any, values: Any, *, floating: torch.dtype) -> Tensor:
    x, values, index = as_floating(x, floating), as_floating(values, floating), _tensor(index).long()
    return x.index_put(tuple(index.unbind(-1)), values.to(x.dtype))


@operator("ScatterElements")
def scatter_elements(node: Node) -> None:
    """Values written to one index each along an axis."""
    if node.attributes.get("reduction", "none") != "none":
        raise node.refuse("it adds or multiplies the values that it writes")
    call = partial(_scatter_elements, axis=node.attributes.get("axis", 0))
    node.run(call, *(node.source(index) for index in range(3)), floating=True)


def _scatter_elements(x: Any, index: Any, values: Any, *, axis: int, floating: torch.dtype) -> Tensor:
    x, values, index = as_floating(x, floating), as_floating(values, floating), _tensor(index).long()
    return torch.scatter(x, axis, torch.where(index < 0, index + x.shape[axis], index), values.to(x.dtype))


class Expand(Sized):
    """Copies along axes of size 1."""

    def forward(self, x: Any, shape: Any, floating: Any = None) -> Tensor:
        """The value in the larger shape."""
        x, sizes = _tensor(x), self.numbers(shape)
        lead = [1] * (len(sizes) - x.dim()) + list(x.shape)
        sizes = [1] * (x.dim() - len(sizes)) + sizes
        return x.expand([max(a, b) if 1 in (a, b) else b for a, b in zip(lead, sizes, strict=True)])


@operator("Expand")
def expand(node: Node) -> None:
    """Copies along axes of size 1."""
    node.sized(Expand(), node.source(0), node.source(1), sizes=[(1, "")])


class Tile(Sized):
    """Repeated copies along each axis."""

    def forward(self, x: Any, repeats: Any) -> Tensor:
        """The copies."""
        return _tensor(x).repeat(self.numbers(repeats))


@operator("Tile")
def tile(node: Node) -> None:
    """Repeated copies along each axis."""
    node.sized(Tile(), node.source(0), node.source(1), sizes=[(1, "")])


@operator("Pad")
def pad(node: Node) -> None:
    """Padding at the edges."""
    mode, value = node.attributes.get("mode", "constant"), float(node.attributes.get("value", 0.0))
    pads = node.attributes.get("pads", node.constant(1))
    if node.operands > 2 and node.source(2) is not None:
        value = number(node, 2)
        if value is None:
            raise node.refuse("its padding value is computed")
    axes = None
    if node.operands > 3 and node.source(3) is not None:
        found = node.constant(3)
        if found is None:
            raise node.refuse("its axes are computed")
        axes = whole(found)
    if mode not in _PADDING:
        raise node.refuse(f"it pads in mode {mode}")
    run = partial(_pad, axes=axes, mode=_PADDING[mode], value=value)
    if pads is None:
        # Computed from shapes, as where windows have to fill an image, and known each time the network runs.
        node.run(run, node.source(0), node.source(1))
    else:
        node.run(partial(run, pads=whole(pads)), node.source(0))


_PADDING = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _pad(x: Any, pads: Any, *, axes: list[int] | None, mode: str, value: float) -> Tensor:
    x, pads = _tensor(x), whole(pads)
    count = len(pads) // 2
    sides = {
        axis % x.dim(): (pads[place], pads[count + place])
        for place, axis in enumerate(list(range(x.dim())) if axes is None else axes)
    }
    sides = {axis: pair for axis, pair in sides.items() if any(pair)}
    if not sides:
        return x
    if mode != "constant" and not _is_in_torch(x, sides, mode):
        for axis, pair in sides.items():
            taken = _padded(x.shape[axis], pair, mode)
            x = x.index_select(axis, torch.from_numpy(taken).to(x.device))
        return x
    # PyTorch takes all of the last axes that a mode can pad, or none of them.
    first = min(sides) if mode == "constant" else x.dim() - _PADDED_AXES[x.dim()]
    flat = [side for axis in reversed(range(first, x.dim())) for side in sides.get(axis, (0, 0))]
    return functional.pad(x, flat, mode, value if mode == "constant" else None)


_PADDED_AXES = {2: 1, 3: 1, 4: 2, 5: 3}
"""How many of the last axes PyTorch pads in the modes that copy numbers, by the number of all axes."""


def _is_in_torch(x: Tensor, sides: Mapping[int, tuple[int, int]], mode: str) -> bool:
    """Whether PyTorch's own function can pad these sides in a mode that copies numbers."""
    if x.dim() not in _PADDED_AXES or not x.is_floating_point() or min(sides) < x.dim() - _PADDED_AXES[x.dim()]:
        return False
    limits = {axis: x.shape[axis] - 1 if mode == "reflect" else x.shape[axis] for axis in sides}
    return all(0 <= side <= limits[axis] for axis, pair in sides.items() for side in pair)


def _padded(size: int, pair: tuple[int, int], mode: str) -> np.ndarray:
    """The index of the old element for each element of an axis that was padded."""
    # A negative side crops, and what is left is padded, so no element that was cropped comes back.
    start, end = max(0, -pair[0]), size - max(0, -pair[1])
    left = max(end - start, 0)
    if not left:
        raise ValueError(f"padding {pair} leaves nothing of an axis of size {size} that could be copied")
    at = np.arange(-max(0, pair[0]), left + max(0, pair[1]))
    if mode == "replicate":
        taken = np.clip(at, 0, left - 1)
    elif mode == "circular" or left == 1:
        taken = at % left
    else:
        taken = at % (2 * left - 2)
        taken = np.minimum(taken, 2 * left - 2 - taken)
    return (start + taken).astype(np.int64)


@operator("DepthToSpace")
def depth_to_space(node: Node) -> None:
    """Channels become space."""
    size = node.attributes["blocksize"]
    if node.attributes.get("mode", "DCR") == "CRD":
        node.run(partial(functional.pixel_shuffle, upscale_factor=size), node.source(0))
    else:
        node.run(partial(_depth_to_space, size=size), node.source(0))


def _depth_to_space(x: Tensor, *, size: int) -> Tensor:
    count, channels, height, width = x.shape
    x = x.reshape(count, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(count, channels // size**2, height * size, width * size)


@operator("SpaceToDepth")
def space_to_depth(node: Node) -> None:
    """Space becomes channels."""
    node.run(partial(_space_to_depth, size=node.attributes["blocksize"]), node.source(0))


def _space_to_depth(x: Tensor, *, size: int) -> Tensor:
    count, channels, height, width = x.shape
    x = x.reshape(count, channels, height // size, size, width // size, size).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(count, channels * size**2, height // size, width // size)


@operator("Identity")
def identity(node: Node) -> None:
    """The value itself."""
    node.run(_same, node.source(0))


def _same(x: Any) -> Any:
    return x


@operator("Shape")
def shape(node: Node) -> None:
    """The shape, as numbers."""
    get = node.attributes.get
    node.numbers(partial(_shape, start=get("start", 0), end=get("end")), node.source(0))


def _shape(x: Any, *, start: int, end: int | None) -> np.ndarray:
    return np.array(tuple(x.shape)[start:end], dtype=np.int64)


@operator("Size")
def size(node: Node) -> None:
    """The number of elements, as a number."""
    node.numbers(_size, node.source(0))


def _size(x: Any) -> np.ndarray:
    return np.array(math.prod(x.shape), dtype=np.int64)


@operator("ConstantOfShape")
def constant_of_shape(node: Node) -> None:
    """A tensor filled with one number."""
    value = node.attributes.get("value")
    filled = np.zeros(1, dtype=np.float32) if value is None else np.asarray(value)
    node.run(partial(_filled, value=filled), node.source(0), floating=True)


def _filled(shape: Any, *, value: np.ndarray, floating: torch.dtype) -> Tensor:
    return as_floating(value.reshape(()), floating).expand(whole(shape)).clone()


@operator("Range")
def numbers_in_a_row(node: Node) -> None:
    """A range of numbers with equal steps."""
    node.run(_arange, *(node.source(index) for index in range(3)))


def _arange(start: Any, end: Any, step: Any) -> Tensor:
    first, last, by = (value.item() for value in (start, end, step))
    return torch.arange(first, last, by, dtype=_tensor(start).dtype)


@operator("Trilu")
def triangle(node: Node) -> None:
    """The upper or lower triangle."""
    offset = number(node, 1, 0)
    function = torch.triu if node.attributes.get("upper", 1) else torch.tril
    node.run(partial(_triangle, function=function, offset=offset), node.source(0))


def _triangle(x: Any, *, function: Any, offset: int) -> Tensor:
    return function(_tensor(x), offset)


@operator("OneHot")
def one_hot(node: Node) -> None:
    """One-hot encoding of indices."""
    call = partial(_one_hot, axis=node.attributes.get("axis", -1))
    node.run(call, *(node.source(index) for index in range(3)))


def _one_hot(index: Any, depth: Any, values: Any, *, axis: int) -> Tensor:
    count, values = whole(depth)[0], _tensor(values)
    index = _tensor(index).long()
    hot = functional.one_hot(torch.where(index < 0, index + count, index), count).movedim(-1, axis)
    return torch.where(hot.bool(), values[1], values[0])


@operator("NonZero")
def nonzero(node: Node) -> None:
    """The indices of elements that are not zero."""
    node.run(_nonzero, node.source(0))


def _nonzero(x: Any) -> Tensor:
    return torch.nonzero(_tensor(x)).t()


@operator("EyeLike")
def eye(node: Node) -> None:
    """Ones on a diagonal."""
    call = partial(_eye, offset=node.attributes.get("k", 0), dtype=DTYPES.get(node.attributes.get("dtype") or 0))
    node.run(call, node.source(0))


def _eye(x: Any, *, offset: int, dtype: torch.dtype | None) -> Tensor:
    x = _tensor(x)
    ones = torch.ones(x.shape, dtype=dtype or x.dtype, device=x.device)
    return torch.triu(torch.tril(ones, offset), offset)


class Resize(Sized):
    """Images of another size, which the file states.

    The sizes of batch and channels, which the file states as well, are those of the input: the file may have been
    exported for another batch, and channels may have been cut.
    """

    def __init__(self, axes: list[int] | None, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.axes, self.settings = axes, dict(settings)

    @property
    def size_axes(self) -> list[int]:
        """The axis that each of the numbers refers to."""
        return super().size_axes if self.axes is None else self.axes

    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        """The images in the size of the file."""
        wanted, targets = self.numbers(sizes), list(x.shape)
        for axis, size in zip(range(x.dim()) if self.axes is None else self.axes, wanted, strict=True):
            targets[axis] = size
        if self.axes is not None:
            return _resize(x, scales=None, sizes=targets, **self.settings)
        channels = 1 if x.dim() < 3 or targets[1] == x.shape[1] or targets[-1] != x.shape[-1] else x.dim() - 1
        targets[0], targets[channels] = x.shape[0], x.shape[channels]
        out = _resize(x, scales=None, sizes=targets, **self.settings)
        # No other size, but told: the number of channels in the file then follows when channels are cut.
        return out.expand(targets)


@operator("Resize", "Upsample")
def resize(node: Node) -> None:
    """Images of another size."""
    get, old = node.attributes.get, node.operator == "Upsample" or node.opset < 11
    mode = get("mode", "nearest")
    places = "asymmetric" if old else get("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if old else get("nearest_mode", "round_prefer_floor")
    if get("exclude_outside", 0) or places == "tf_crop_and_resize":
        raise node.refuse("it crops, or leaves out what is outside of the image (exclude_outside)")
    if get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.refuse("it keeps the images' aspect ratio")
    if mode in ("linear", "cubic") and places not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise node.refuse(f"it resizes in mode {mode} with coordinate_transformation_mode {places}")
    if mode == "cubic" and get("cubic_coeff_a", -0.75) != -0.75:
        raise node.refuse("its cubic_coeff_a is not -0.75")
    settings = {"mode": mode, "places": places, "rounding": rounding, "smooth": bool(get("antialias", 0))}
    axes = get("axes")
    axes = None if axes is None else whole(axes)
    call = partial(_resize, **settings)
    if get("scales") is not None:
        node.run(partial(call, sizes=None, scales=np.asarray(get("scales"))), node.source(0))
    elif old or node.operands < 4 or node.source(3) is None:
        place = 1 if old else 2
        scales = node.constant(place)
        # Constants are numbers here, and no parameters.
        source = node.source(place) if scales is None else known(scales)
        node.run(partial(_resize_by, axes=axes, call=call), node.source(0), source)
    else:
        node.sized(Resize(axes, settings), node.source(0), node.source(3), sizes=[(3, "")])


def _resize_by(x: Tensor, scales: Any, *, axes: list[int] | None, call: Any) -> Tensor:
    factors = np.asarray(scales).reshape(-1)
    if axes is not None:
        some, factors = factors, np.ones(x.dim(), dtype=factors.dtype)
        factors[axes] = some
    return call(x, scales=factors, sizes=None)


def _resize(x: Tensor, *, scales: Any, sizes: Any, mode: str, places: str, rounding: str, smooth: bool) -> Tensor:
    if scales is not None:
        factors = [float(item) for item in np.asarray(scales).reshape(-1)]
        targets = [math.floor(size * factor) for size, factor in zip(x.shape, factors, strict=True)]
    else:
        targets = whole(sizes)
        factors = [target / size for target, size in zip(targets, x.shape, strict=True)]
    axes = [axis for axis in range(x.dim()) if targets[axis] != x.shape[axis]]
    if not axes:
        return x
    if mode == "nearest":
        return _nearest(x, axes, targets, factors, places, rounding)
    last = len([axis for axis in range(x.dim())][2:])
    if min(axes) < 2:  # channels last
        if max(axes) == x.dim() - 1:
            raise ValueError("images are resized along all of their axes")
        moved = x.movedim(-1, 1)
        out = _smooth(moved, targets[1:-1], factors[1:-1], mode, places, smooth)
        return out.movedim(1, -1)
    return _smooth(x, targets[-last:], factors[-last:], mode, places, smooth)


def _smooth(x: Tensor, targets: list[int], factors: list[float], mode: str, places: str, smooth: bool) -> Tensor:
    kinds = {"linear": {1: "linear", 2: "bilinear", 3: "trilinear"}, "cubic": {2: "bicubic"}}[mode]
    aligned = places == "align_corners"
    exact = all(math.floor(size * factor) == target and abs(size * factor - target) < 1e-6
                for size, factor, target in zip(x.shape[2:], factors, targets, strict=True))  # fmt: skip
    given: dict[str, Any] = {"size": targets} if exact or aligned else {"scale_factor": factors}
    return functional.interpolate(
        x, mode=kinds[x.dim() - 2], align_corners=aligned, antialias=smooth and x.dim() == 4, **given
    )


def _nearest(
    x: Tensor, axes: list[int], targets: list[int], factors: list[float], places: str, rounding: str
) -> Tensor:
    spatial = list(range(2, x.dim()))
    multiple = all(targets[axis] % x.shape[axis] == 0 for axis in axes)
    usual = (places == "asymmetric" and rounding == "floor") or (
        places in ("half_pixel", "pytorch_half_pixel") and rounding in ("round_prefer_floor", "round_prefer_ceil")
    )
    if set(axes) <= set(spatial) and multiple and usual:
        return functional.interpolate(x, size=[targets[axis] for axis in spatial], mode="nearest")
    for axis in axes:
        taken = _taken(x.shape[axis], targets[axis], factors[axis], places, rounding)
        x = x.index_select(axis, torch.from_numpy(taken).to(x.device))
    return x


def _taken(size: int, target: int, factor: float, places: str, rounding: str) -> np.ndarray:
    """The index of the old pixel for each new one."""
    new = np.arange(target, dtype=np.float64)
    if places == "align_corners":
        at = new * (size - 1) / (target - 1) if target > 1 else new * 0
    elif places == "asymmetric":
        at = new / factor
    elif places == "pytorch_half_pixel" and target == 1:
        at = new * 0
    else:
        at = (new + 0.5) / factor - 0.5
    rounded = {
        "floor": np.floor(at),
        "ceil": np.ceil(at),
        "round_prefer_floor": np.ceil(at - 0.5),
        "round_prefer_ceil": np.floor(at + 0.5),
    }[rounding]
    return np.clip(rounded, 0, size - 1).astype(np.int64)


@operator("GridSample")
def grid_sample(node: Node) -> None:
    """Sampling at positions that another value gives."""
    get = node.attributes.get
    mode = str(get("mode", "linear"))
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    call = partial(
        functional.grid_sample,
        mode=mode,
        padding_mode=get("padding_mode", "zeros"),
        align_corners=bool(get("align_corners", 0)),
    )
    node.run(call, node.source(0), node.source(1))
