"""Makes synthetic inputs: images with statistics of natural images, and random tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lbyl.moments.scale import InputScales
from lbyl.runtime.batches import channels_last
from lbyl.runtime.inputs import ExampleInputs, outputs_if_taken

Maker = Callable[[Sequence[int], torch.Generator], Tensor]
"""A function that makes a floating-point input of a given shape, whose first axis is the batch axis."""


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal values in float32, whatever the default dtype is, because random values depend on the dtype."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def pink(shape: Sequence[int], generator: torch.Generator, spectrum: float = 1.0) -> Float[Tensor, "..."]:
    """Noise with an amplitude of 1 / frequency ** spectrum over the spatial axes, as in natural images.

    The shape is ``[images, channels, *positions]``. Every channel of every image has zero mean and unit variance. The
    shape ``[N, features]`` has no spatial axes and gives white noise.
    """
    white = _normal(generator, *shape)
    if len(shape) < 3:
        return white
    axes = list(range(2, len(shape)))
    radius = torch.zeros([1] * len(axes), dtype=torch.float32)
    for position, axis in enumerate(axes):
        frequency = torch.fft.fftfreq(shape[axis], dtype=torch.float32) * shape[axis]
        view = [1] * len(axes)
        view[position] = -1
        radius = radius + frequency.reshape(view).square()
    gain = radius.sqrt().clamp_min(1.0).pow(-spectrum)
    gain[(0,) * len(axes)] = 0
    image = torch.fft.ifftn(torch.fft.fftn(white, dim=axes) * gain, dim=axes).real
    return image / image.std(axes, keepdim=True, unbiased=False).clamp_min(1e-12)


def varied_pink(shape: Sequence[int], generator: torch.Generator, spectrum: float = 1.0) -> Float[Tensor, "..."]:
    """Pink noise with a different exponent (``spectrum`` plus or minus 1) and contrast for each image.

    Half of the images are clipped at one deviation, which gives them flat regions and edges: real inputs are bounded.
    """
    count = shape[0]
    images = torch.empty(tuple(shape), dtype=torch.float32)
    classes = min(8, count)
    for number in range(classes):
        exponent = max(0.0, spectrum - 1 + 2 * (number + 0.5) / classes)
        rows = torch.arange(number, count, classes)
        images[rows] = pink((len(rows), *shape[1:]), generator, exponent)
    view = [count] + [1] * (len(shape) - 1)
    images = images * torch.exp(0.5 * _normal(generator, *view))
    order = torch.randperm(count, generator=generator)
    images[order[::2]] = images[order[::2]].clamp(-1, 1)
    return images


def dead_leaves(shape: Sequence[int], generator: torch.Generator) -> Float[Tensor, "..."]:
    """Images of opaque shapes that hide each other, with sizes r of density 1 / r^3: a model of natural scenes.

    See Lee, Mumford, Huang: "Occlusion Models for Natural Images", IJCV 2001. The shapes are ellipses and rectangles,
    each with a color (mostly gray), a gradient and a texture of pink noise. Each channel has zero mean and unit
    variance. If ``shape`` is not that of images, the result is that of :func:`pink`.
    """
    if len(shape) != 4 or min(shape[2:]) < 8:
        return pink(shape, generator)
    count, channels, height, width = shape
    grain = [pink(shape, generator, exponent) for exponent in (1.0, 0.6)]

    def color(leaves: int) -> Tensor:
        shared = _normal(generator, count, leaves, 1)
        return shared + 0.4 * _normal(generator, count, leaves, channels)

    def uniform(leaves: int) -> Tensor:
        return torch.rand(count, leaves, generator=generator, dtype=torch.float32)

    images = color(1).reshape(count, channels, 1, 1) + 0.5 * grain[0]
    side, leaves = float(max(height, width)), 400
    largest, smallest = 0.5, 0.015
    radius = side * (smallest**-2 + uniform(leaves) * (largest**-2 - smallest**-2)).rsqrt()
    center_x, center_y = (uniform(leaves) * 1.2 - 0.1) * width, (uniform(leaves) * 1.2 - 0.1) * height
    angle, square = uniform(leaves) * math.pi, uniform(leaves) < 0.3
    aspect = torch.exp(0.4 * _normal(generator, count, leaves))
    gradient = 0.5 * _normal(generator, count, leaves, 2)
    strength = 0.25 * torch.exp(0.7 * _normal(generator, count, leaves))
    tone = color(leaves)
    numbers = torch.stack([radius, center_x, center_y, angle.cos(), angle.sin(), aspect, *gradient.unbind(2), strength])
    reach = (1.5 * radius * torch.maximum(aspect, 1 / aspect)).ceil().long() + 1
    paint = _paint_whole if height * width <= _SMALL else _paint_boxes
    paint(images, _Leaves(numbers, square, tone, reach), grain)
    images = images - images.mean((0, 2, 3), keepdim=True)
    return images / images.std((0, 2, 3), keepdim=True).clamp_min(1e-6)


_WASTE = 4000
"""Leaves are painted in boxes of one size if at most this many pixels are wasted."""
_BY_ITSELF = 1600
"""Boxes with more pixels are painted one by one, because the number of pixels determines their time."""


_SMALL = 400
"""In images of at most this many pixels, leaves are painted in whole images and not in boxes."""
_AT_ONCE = 2**17
"""Numbers of pixels of all images that are computed at once for several leaves; as much as a cache holds."""


@dataclass(frozen=True)
class _Leaves:
    """The leaves of all images, in the order in which they are painted.

    Attributes:
        numbers: radius, center (x, y), cosine and sine of the angle, aspect, gradient (u, v), strength of the texture.
        square: whether a leaf is a rectangle, and not an ellipse.
        tone: its color.
        reach: how many pixels it may extend from its center.
    """

    numbers: Float[Tensor, "9 images leaves"]
    square: Bool[Tensor, "images leaves"]
    tone: Float[Tensor, "images leaves channels"]
    reach: Int[Tensor, "images leaves"]

    def alike_in_size(self, leaf: int, height: int, width: int) -> Sequence[Int[Tensor, " leaves"]]:
        """The images in parts, in which one leaf is painted in boxes of the size of the first one's."""
        order = self.reach[:, leaf].argsort(descending=True)
        return order.split(_alike_in_size(self.reach[order, leaf].tolist(), height, width))


def _alike_in_size(falling: Sequence[int], height: int, width: int) -> list[int]:
    """Split leaves, sorted by falling size, into runs that are painted together in boxes of the first one's size."""
    if height * width <= min(_BY_ITSELF, _WASTE // len(falling)):
        return [len(falling)]
    counts, largest, wasted = list[int](), 0, 0
    for reach in falling:
        area = min(height, 2 * reach + 1) * min(width, 2 * reach + 1)
        if counts and largest <= _BY_ITSELF and wasted + largest - area <= _WASTE:
            counts[-1] += 1
            wasted += largest - area
        else:
            counts.append(1)
            largest, wasted = area, 0
    return counts


def _cover(
    numbers: Sequence[Float[Tensor, "..."]],
    square: Bool[Tensor, "..."],
    dx: Float[Tensor, "..."],
    dy: Float[Tensor, "..."],
) -> tuple[Float[Tensor, "... height width"], Float[Tensor, "... height width"]]:
    """How much of each pixel leaves cover, from 0 to 1, and their gradient, at offsets from their centers."""
    r, _, _, cos, sin, stretch, slope_u, slope_v, _ = numbers
    u = (dx * cos + dy * sin) / (r * stretch)
    v = (dy * cos - dx * sin) / (r / stretch)
    far = torch.where(square, torch.maximum(u.abs(), v.abs()), (u * u + v * v).sqrt())
    return ((1 - far) * r + 0.5).clamp(0, 1), (slope_u * u + slope_v * v).clamp(-2, 2)


def _starts(center: Float[Tensor, "..."], reach: Int[Tensor, "..."], side: int) -> Int[Tensor, "..."]:
    """The first row or column of boxes that extend ``reach`` pixels from their centers, as far as the image goes."""
    return torch.minimum((center.long() - reach).clamp_min(0), side - (2 * reach + 1).clamp_max(side))


def _paint_boxes(
    images: Float[Tensor, "images channels height width"],
    leaves: _Leaves,
    grain: Sequence[Float[Tensor, "images channels height width"]],
) -> None:
    """Paint leaf after leaf, because each hides earlier ones, and each in boxes of all images at once."""
    for leaf in range(leaves.square.shape[1]):
        for rows in leaves.alike_in_size(leaf, *images.shape[2:]):
            numbers, square = leaves.numbers[:, rows, leaf], leaves.square[rows, leaf]
            _paint(
                images,
                rows,
                int(leaves.reach[rows[0], leaf]),
                numbers,
                square,
                leaves.tone[rows, leaf],
                grain[leaf % 2],
            )


def _paint(
    images: Float[Tensor, "images channels height width"],
    rows: Int[Tensor, " leaves"],
    reach: int,
    numbers: Float[Tensor, "9 leaves"],
    square: Bool[Tensor, " leaves"],
    tone: Float[Tensor, "leaves channels"],
    grain: Float[Tensor, "images channels height width"],
) -> None:
    """Paint one leaf into each of the images ``rows``, in boxes of the same size."""
    spread = numbers[:, :, None, None].unbind()
    height, width = images.shape[2:]

    def places(center: Tensor, side: int) -> Tensor:
        wide = min(side, 2 * reach + 1)
        return (center.flatten().long() - reach).clamp(0, side - wide)[:, None] + torch.arange(wide)

    xs, ys = places(spread[1], width), places(spread[2], height)
    mask, shade = _cover(spread, square[:, None, None], xs[:, None, :] - spread[1], ys[:, :, None] - spread[2])
    mask, shade = mask[:, None], shade[:, None]
    if len(rows) == 1:  # slices are faster than index tensors
        box = int(rows), slice(None), slice(int(ys[0, 0]), int(ys[0, -1]) + 1), slice(int(xs[0, 0]), int(xs[0, -1]) + 1)
    else:
        channels = torch.arange(images.shape[1])[:, None, None]
        box = rows[:, None, None, None], channels, ys[:, None, :, None], xs[:, None, None, :]
    there = images[box]
    color = tone[:, :, None, None] + shade + spread[8][:, None] * grain[box]
    images[box] = there + (mask * (color - there)).view_as(there)


def _paint_whole(
    images: Float[Tensor, "images channels height width"],
    leaves: _Leaves,
    grain: Sequence[Float[Tensor, "images channels height width"]],
) -> None:
    """As :func:`_paint_boxes`, to the last bit, but with masks and colors of many leaves at once.

    This is faster for small images, where calls take longer than arithmetic: three operations a leaf, not dozens.
    """
    (height, width), total = images.shape[2:], leaves.square.shape[1]
    reach = leaves.reach.clone()
    for leaf in range(total):
        for rows in leaves.alike_in_size(leaf, height, width):
            reach[rows, leaf] = leaves.reach[rows[0], leaf]
    x, y = torch.arange(width), torch.arange(height)[:, None]
    textures = torch.stack(list(grain))
    for some in torch.arange(total).split(max(2, _AT_ONCE // images.numel())):
        spread = leaves.numbers[:, :, some].transpose(1, 2)[..., None, None].unbind()
        far, square = reach[:, some].T[..., None, None], leaves.square[:, some].T[..., None, None]
        mask, shade = _cover(spread, square, x - spread[1], y - spread[2])
        # A leaf ends with its box, as it does where only boxes are painted.
        left, top = _starts(spread[1], far, width), _starts(spread[2], far, height)
        mask *= (x >= left) & (x <= left + 2 * far) & (y >= top) & (y <= top + 2 * far)
        tone = leaves.tone[:, some].transpose(0, 1)[..., None, None]
        color = (tone + shade[:, :, None]).add_(spread[8][:, :, None] * textures[some % 2])
        for paint, cover in zip(color, mask[:, :, None], strict=True):
            images += paint.sub_(images).mul_(cover)


def synthesize(
    model: nn.Module,
    inputs: ExampleInputs,
    count: int,
    make: Maker,
    generator: torch.Generator,
    scales: InputScales,
) -> ExampleInputs:
    """Make ``count`` inputs like the example: floats from ``make``, and whole numbers as ``scales`` says.

    Floats are converted to their scales, one for each tensor of the example.

    Tensors without a batch axis (as long as that of the first tensor) are kept as they are.
    """
    tensors = inputs.tensors()
    batch = tensors[0].shape[0] if tensors[0].dim() else 0
    as_stored = channels_last if takes_channels_last(model, inputs) else Tensor.contiguous

    scale_of, integers_of = iter(scales.scales), iter(scales.integers or [None] * len(tensors))

    def replace(tensor: Tensor) -> Tensor:
        scale, integers = next(scale_of), next(integers_of)
        if not tensor.dim() or tensor.shape[0] != batch:
            return tensor
        shape = (count, *tensor.shape[1:])
        if tensor.is_floating_point() and scale.kept:
            return tensor[:1].expand(shape).clone()
        if tensor.is_floating_point():
            return as_stored(scale.of(make(shape, generator)).to(tensor))
        if tensor.is_complex():
            size = tensor.detach().abs().square().mean().sqrt().nan_to_num(1.0).item() or 1.0
            parts = (make(shape, generator).float() for _ in range(2))
            return (size / math.sqrt(2) * torch.complex(*parts)).to(tensor)
        if integers is not None:
            return integers.draw(count, generator).to(tensor)
        return tensor[:1].expand(shape).clone() if batch else tensor

    return inputs.map(replace)


def takes_channels_last(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether the model runs on images in channels-last format, which is faster on CPU; ``x.view(...)`` may fail."""
    moved = inputs.map(lambda t: channels_last(t) if t.is_floating_point() else t)
    if all(a.stride() == b.stride() for a, b in zip(inputs.tensors(), moved.tensors(), strict=True)):
        return True
    return outputs_if_taken(model, moved) is not None
