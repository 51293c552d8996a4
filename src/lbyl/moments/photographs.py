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
from lbyl.moments.synthesis import dead_leaves, synthesize
from lbyl.runtime.batches import affordable, held_out_size, macs_per_input, split
from lbyl.runtime.checks import check_number
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress

_SMALLEST = 16
"""Smallest side of an input for which crops of photographs are used."""
_PART = 0.4
"""The smallest crop, as a share of the sides of the largest possible one; larger if that has too few pixels."""


@dataclass(frozen=True)
class Photographs:
    """Crops of photographs that come with the package; batch norms normalize with the probes' own statistics.

    They also suit networks without batch norms, because nothing is dreamed. Inputs that do not look like color images
    get :class:`lbyl.Noise`.

    Attributes:
        images: number of crops on which moments are collected; a quarter more is held out. None chooses as many as
            3.2e10 multiply-accumulates allow, between 48 and 192; fewer than 48 only if one takes more than 8e9.
    """

    images: int | None = None

    def __post_init__(self) -> None:
        check_number("Photographs(images={})", self.images, whole=True, least=2, optional=True)

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
        made = synthesize(model, inputs, count + held, photographs, generator, scales)
        train, test = split(made, [count, held])
        return Probes((train,), test, batch_statistics=True, note=scales.note)


def takes_photographs(inputs: ExampleInputs) -> bool:
    """Whether an input looks like color images."""
    return any(t.is_floating_point() and _is_color(t.shape) for t in inputs.tensors())


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
