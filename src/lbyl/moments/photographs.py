"""Crops of photographs that come with the package, as probes for networks that take color images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from lbyl.moments.base import Probes
from lbyl.moments.input_scales import input_scales
from lbyl.moments.noise import Noise
from lbyl.moments.scale import InputScales
from lbyl.moments.synthesis import Maker, dead_leaves, synthesize
from lbyl.moments.text_lines import text_lines
from lbyl.runtime.batches import affordable, held_out_size, macs_per_input, split
from lbyl.runtime.checks import check_number
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.progress import Progress
from lbyl.runtime.seeding import generator_for

_SMALLEST = 16
"""Smallest side of an input for which crops of photographs are used."""
_PART = 0.4
"""The smallest crop, as a share of the sides of the largest possible one; larger if that has too few pixels."""


@dataclass(frozen=True)
class Photographs:
    """Crops of photographs that come with the package; batch norms normalize with the probes' own statistics.

    They also suit networks without batch norms, because nothing is dreamed. Inputs that do not look like color images
    get :class:`lbyl.Noise`.

    Networks that read or find text, or tell which way up it is, say next to nothing on photographs. Where the outputs
    vary far more on images of text, most probes are such images.

    Attributes:
        images: number of crops on which moments are collected; a quarter more is held out. None chooses as many as
            3.2e10 multiply-accumulates allow, between 48 and 192; fewer than 48 only if one takes more than 8e9.
        text: share of the images that hold lines of text in place of a photograph, from 0 to 1. None takes three
            quarters if the variance of the network's outputs is at least 4 times as large on text as on photographs, or
            at least twice as large as both on photographs and on upright text once half of it is upside down (as half
            of it then is in the probes); and otherwise 0.
    """

    images: int | None = None
    text: float | None = None

    def __post_init__(self) -> None:
        check_number("Photographs(images={})", self.images, whole=True, least=2, optional=True)
        check_number("Photographs(text={})", self.text, least=0, most=1, optional=True)

    def lifelike(self, inputs: ExampleInputs) -> bool:
        """Whether its probes are like real inputs."""
        return takes_photographs(inputs)

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """Crops of the example's size."""
        if not takes_photographs(inputs):
            noise = Noise(self.images).probes(model, inputs, generator, progress)
            told = "noise in place of photographs: no input looks like color images"
            return replace(noise, note="; ".join(filter(None, [told, noise.note])))
        count = self.images or affordable(macs_per_input(model, inputs), 3.2e10, 48, 192, ceiling=4e11)
        held = held_out_size(count)
        scales = input_scales(model, inputs)
        tried = min(_TRIED, max(_LEAST, count // 8)) if self.images else _TRIED  # as much effort as is asked for
        make, told = pictures_for(model, inputs, scales, tried) if self.text is None else (pictures(self.text), "")
        made = synthesize(model, inputs, count + held, make, generator, scales)
        train, test = split(made, [count, held])
        note = "; ".join(filter(None, [scales.note, told]))
        return Probes((train,), test, batch_statistics=True, note=note)


def takes_photographs(inputs: ExampleInputs) -> bool:
    """Whether an input looks like color images."""
    return any(t.is_floating_point() and _is_color(t.shape) for t in inputs.tensors())


_FAR_MORE, _MORE, _MOSTLY = 4.0, 2.0, 0.75
_TRIED, _LEAST = 16, 8


def pictures_for(
    model: nn.Module, inputs: ExampleInputs, scales: InputScales, tried: int = _TRIED
) -> tuple[Maker, str]:
    """Makes photographs, or mostly text for networks that answer to that; with a note that says so ("" if they don't).

    Networks that find or read text get upright lines. Half of the text is upside down for those that tell directions.
    ``tried`` is how many images of each kind the network is run on.
    """
    upright, both = _gains_of_text(model, inputs, scales, tried)
    told = f"{_MOSTLY:.0%} of the probes are lines of text"
    if upright >= _FAR_MORE:
        note = f"{told}, on which the outputs vary {upright:.2g} times as much as on photographs"
        return pictures(_MOSTLY), note
    if both >= _MORE * max(1.0, upright):
        note = f"{told}, half of it upside down, on which the outputs vary {both:.2g} times as much as on photographs"
        return pictures(_MOSTLY, 0.5), note
    return photographs, ""


def _gains_of_text(model: nn.Module, inputs: ExampleInputs, scales: InputScales, tried: int) -> tuple[float, float]:
    """How much larger the outputs' variance is on text, and on text of which half is upside down, than on photographs.

    It is the geometric mean over all outputs of the ratio of their variances, each summed over all elements. Both are 1
    if nothing can be said.
    """

    def variances(make: Maker) -> list[float]:
        generator = generator_for(0, "text or photographs")
        made = synthesize(model, inputs, tried, make, generator, scales)
        with torch.no_grad(), undisturbed(model):
            outputs = [out for out in output_tensors(made.call(model)) if out.is_floating_point() and out.numel() > 1]
        apart = [out.detach().double() for out in outputs if out.dim()]  # an output may be a parameter of the network
        batched = (out if len(out) == tried else out.reshape(-1, 1) for out in apart)
        return [float(out.var(0).sum()) for out in batched]

    try:
        seen, *read = (variances(make) for make in (photographs, pictures(1.0), pictures(1.0, 0.5)))
    except Exception:  # a user's model may raise anything on inputs that it was not made for
        return 1.0, 1.0
    upright, both = (_mean_ratio(each, seen) for each in read)
    return upright, both


def _mean_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The geometric mean of the ratios of positive values; 1 if there are none."""
    pairs = [(a, b) for a, b in zip(values, others, strict=False) if a > 0 and b > 0 and math.isfinite(a + b)]
    return math.exp(sum(math.log(a / b) for a, b in pairs) / len(pairs)) if pairs else 1.0


def pictures(text: float, turned: float = 0.0) -> Maker:
    """Makes crops of photographs, and lines of text in place of this share of them; see :func:`photographs`.

    ``turned`` is the share of the text that is upside down.
    """

    def make(shape: Sequence[int], generator: torch.Generator) -> Float[Tensor, "..."]:
        count, last = round(text * shape[0]), shape[-1] == 3 != shape[1]
        if count == shape[0] and _is_color(shape):
            images = torch.empty(tuple(shape), dtype=torch.float32)  # no photograph is left
        else:
            images = photographs(shape, generator)
        if not count or not _is_color(shape):
            return images
        rows = torch.randperm(shape[0], generator=generator)[:count]
        _, channels, *sides = images.shape if not last else images.permute(0, 3, 1, 2).shape
        lines = text_lines((count, channels, *sides), generator)
        over = round(turned * count)
        lines = torch.cat([lines[:over].flip(2, 3), lines[over:]])
        images[rows] = lines.permute(0, 2, 3, 1) if last else lines
        return images

    return make


def photographs(shape: Sequence[int], generator: torch.Generator) -> Float[Tensor, "..."]:
    """Random crops of 32 photographs in turn, scaled down to the input's size, half of them mirrored.

    ``images/SOURCES.md`` names authors and licenses. Each channel has zero mean and unit variance over all crops.
    Channels may be the second or the last axis. For other shapes than color images, the result is that of
    :func:`~lbyl.moments.synthesis.dead_leaves`.
    """
    if not _is_color(shape):
        return dead_leaves(shape, generator)
    if shape[1] != 3:
        count, height, width, _ = shape
        return photographs((count, 3, height, width), generator).permute(0, 2, 3, 1).contiguous()
    count, _, height, width = shape
    images, available = torch.empty(tuple(shape), dtype=torch.float32), _load()
    for number in range(count):
        whole = available[number % len(available)]
        part, across, down, mirror = torch.rand(4, generator=generator, dtype=torch.float32).tolist()
        largest = min(whole.width / width, whole.height / height)
        # A crop with fewer pixels than the input would be blurred, as real inputs are not.
        smallest = max(_PART, min(1.0, 1 / largest))
        scale = largest * (smallest + (1 - smallest) * part)
        crop_width, crop_height = max(1, math.floor(scale * width)), max(1, math.floor(scale * height))
        left, top = int(across * (whole.width - crop_width + 1)), int(down * (whole.height - crop_height + 1))
        box = left, top, left + crop_width, top + crop_height
        crop = whole.resize((width, height), Image.Resampling.BICUBIC, box)
        if mirror < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        images[number] = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float()
    images = images - images.mean((0, 2, 3), keepdim=True)
    return images / images.std((0, 2, 3), keepdim=True).clamp_min(1e-6)


def _is_color(shape: Sequence[int]) -> bool:
    if len(shape) != 4:
        return False
    first, last = shape[1] == 3 and min(shape[2:]) >= _SMALLEST, shape[3] == 3 and min(shape[1:3]) >= _SMALLEST
    return first or last


@cache
def _load() -> tuple[Image.Image, ...]:
    folder = files("lbyl.moments") / "images"
    found = []
    for file in sorted((f for f in folder.iterdir() if f.name.endswith(".jpg")), key=lambda f: f.name):
        with file.open("rb") as stream, Image.open(stream) as image:
            found.append(image.convert("RGB"))
    return tuple(found)
