"""Images of lines of text, as probes for networks that read or find text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_LONG = 3
"""Images at least so many times as wide as they are high hold one line."""
_MOST_LINES = 16
_SMALLEST_FONT = 7


def text_lines(shape: Sequence[int], generator: torch.Generator) -> Float[Tensor, "images 3 height width"]:
    """English words in lines, drawn with the font that comes with Pillow on a plain ground.

    Three images of four are dark on light, the others light on dark. Size, slant, width, weight, place and direction
    (by up to 3 degrees) of the lines vary, and so do shades, a shadow over the ground, and noise. Images at least three
    times as wide as high hold one line across their whole height, as networks that read lines are given them. Each
    channel has zero mean and unit variance over all images.

    Args:
        shape: ``[images, 3, height, width]``.
        generator: the source of all random numbers.
    """
    count, _, height, width = shape
    images = torch.stack([_page(height, width, generator) for _ in range(count)])
    images = images - images.mean((0, 2, 3), keepdim=True)
    return images / images.std((0, 2, 3), keepdim=True).clamp_min(1e-6)


def _page(height: int, width: int, generator: torch.Generator) -> Float[Tensor, "3 height width"]:
    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float32))

    single = width >= _LONG * height
    line = height / between(1.0, 1.5) if single else height / math.exp(between(math.log(4), math.log(_MOST_LINES)))
    slant, stretch, turn = between(-0.1, 0.25), between(0.8, 1.25), math.radians(between(-3, 3))
    font = ImageFont.load_default(max(_SMALLEST_FONT, 0.8 * line))
    assert isinstance(font, ImageFont.FreeTypeFont)
    # Masks hold how much ink each pixel has; the page is larger than the image, because it is slanted and turned.
    wide, high = round(1.6 * width) + 16, round(1.5 * height) + 16
    ink = Image.new("L", (wide, high))
    draw, bold = ImageDraw.Draw(ink), int(line > 24 and between(0, 1) < 0.3)
    top = (high - line) / 2 if single else between(0, line)
    while top < high:
        left = between(0, 0.5) * width if single or between(0, 1) < 0.3 else 0.3 * width
        words = _words(generator, round((wide - left) / (2 * font.size)) + 2)
        draw.text((left, top), words, fill=255, font=font, stroke_width=bold)
        top += high if single else between(1.2, 1.9) * line
    # The affine map takes places of the image to places of the page.
    cos, sin = math.cos(turn), math.sin(turn)
    across, down = (cos / stretch - slant * sin, slant * cos + sin / stretch), (-sin, cos)
    start = [
        side / 2 - row[0] * width / 2 - row[1] * height / 2
        for side, row in zip((wide, high), (across, down), strict=True)
    ]
    page = ink.transform(
        (width, height), Image.Transform.AFFINE, (*across, start[0], *down, start[1]), Image.Resampling.BICUBIC
    )
    share = torch.from_numpy(np.array(page)).float() / 255
    ground, color = between(150, 255), between(0, 90)
    if between(0, 1) < 0.25:
        ground, color = color, ground
    shades = [[between(-12, 12) for _ in range(3)] for _ in range(2)]
    tint = torch.tensor(shades, dtype=torch.float32)[:, :, None, None]
    down_to, across_to = between(-40, 40), between(-40, 40)
    slope = torch.linspace(0, down_to, height, dtype=torch.float32)[:, None]
    slope = slope + torch.linspace(0, across_to, width, dtype=torch.float32)
    made = torch.lerp(ground + tint[0] + slope, (color + tint[1]).expand(3, height, width), share)
    noise = torch.randn(made.shape, generator=generator, dtype=torch.float32)
    return (made + between(0, 18) * noise).clamp(0, 255)


def _words(generator: torch.Generator, length: int) -> str:
    """So many words that follow each other in a sentence, some of them numbers, and some lines in capitals."""
    words = _text()
    first = int(torch.randint(len(words) - length, (), generator=generator))
    line = words[first : first + length]
    if float(torch.rand((), generator=generator, dtype=torch.float32)) < 0.15:
        line = [word.upper() for word in line]
    numbers = torch.randint(10000, (length,), generator=generator).tolist()
    return " ".join(str(number) if number % 12 == 0 else word for word, number in zip(line, numbers, strict=True))


@cache
def _text() -> list[str]:
    found = (files("lbyl.moments") / "texts" / "sentences.txt").read_text(encoding="utf-8").split()
    return [word for word in found if word.isascii()]
