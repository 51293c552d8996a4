"""Reads a folder of images as batches of a model's inputs, for ``lbyl compress --data``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lbyl.errors import InputError, first_line
from lbyl.io.files import files_in

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH, BATCHES = 24, 4
BICUBIC = 3
"""PIL.Image.Resampling.BICUBIC. PIL itself is imported only when images are read."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

Preprocess = Callable[[Any], Tensor]
"""A function from a PIL image to the model's input, without the batch axis."""


def read_images(
    folder: Path, preprocess: Preprocess, mode: str = "RGB", seed: int = 0
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Up to ``BATCHES`` batches of images from a folder and its subfolders, and the files that were left out, and why.

    If there are more images, a random sample is used, because the first files of a folder often show only one class.
    Files that can't be read are replaced by others.

    Raises:
        InputError: there is no folder or no image in it, none can be read, or preprocessed sizes differ.
    """
    from PIL import Image

    files, wanted = find_images(folder), BATCH * BATCHES
    chosen = random.Random(seed).sample(files, min(len(files), wanted))
    others = set(files) - set(chosen)
    images: dict[Path, Tensor] = {}
    left: list[str] = []
    for file in chain(chosen, random.Random(seed).sample(sorted(others), len(others))):
        if len(images) == wanted:
            break
        try:
            with Image.open(file) as image:
                made = preprocess(_in_bytes(image).convert(mode))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of these
            left.append(f"{file} can't be read as an image: {first_line(error)}")
            continue
        images[file] = made
        first, shape = next((file, image.shape) for file, image in images.items())
        if made.shape != shape:
            raise InputError(
                f"{first} and {file} become {tuple(shape)} and {tuple(made.shape)}; "
                "pass --input, such as --input 1x3x224x224, to bring all images to one size"
            )
    if not images:
        raise InputError(f"no image in {folder} can be read: {left[0]}")
    rows = list(images.values())
    return [torch.stack(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)], tuple(left)


_GRAY_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def _in_bytes(image: Any) -> Any:
    """An image of 8 bits a channel. Pillow itself would cut off gray values above 255, and fractions.

    Raises:
        ValueError: its values are neither of 16 bits, nor fractions from 0 to 1.
    """
    from PIL import Image

    if image.mode not in (*_GRAY_16, "F"):
        return image
    values, most = np.asarray(image, dtype=np.float32), 1.0 if image.mode == "F" else 65535.0
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= most):
        raise ValueError(f"its gray values are from {values.min():g} to {values.max():g}, and not from 0 to {most:g}")
    return Image.fromarray((values * (255 / most)).round().astype(np.uint8))


def find_images(folder: Path) -> list[Path]:
    """All image files in a folder and its subfolders, sorted by name.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    return files_in(folder, SUFFIXES, "image")


def preprocessing(
    source: str,
    model: nn.Module,
    shape: Sequence[int],
    *,
    sized: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Preprocess, str]:
    """The function that turns images into inputs of a model, and the PIL mode to which images are converted first.

    Args:
        source: as for ``lbyl.io.sources.load_source``; timm and torchvision have their own preprocessing.
        model: the model from that source.
        shape: shape of the example input, batch x channels x height x width.
        sized: whether the user gave that shape; otherwise it is the source's default.
        mean: subtracted from pixel values between 0 and 1; by default that of the source, or ImageNet's.
        std: the divisor after that.

    Raises:
        InputError: the model takes no images, or the number of channels does not fit.
    """
    if len(shape) != 4 or shape[1] not in (1, 3):
        sizes = "x".join(map(str, shape))
        raise InputError(f"the example input is {sizes}, not a batch of gray or RGB images; leave out --data")
    if mean is None and std is None:
        kind, _, name = source.rpartition(":")
        if kind == "timm":
            return _of_timm(model, shape), "RGB" if shape[1] == 3 else "L"
        if kind == "torchvision" and not sized:
            return _of_torchvision(name), "RGB"
    return _resize_and_normalize(shape, mean, std), "RGB" if shape[1] == 3 else "L"


def _of_timm(model: nn.Module, shape: Sequence[int]) -> Preprocess:
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    config: dict[str, Any] = resolve_data_config({"input_size": tuple(shape[1:])}, model=model)
    return cast(Preprocess, create_transform(**config, is_training=False))


def _of_torchvision(name: str) -> Preprocess:
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(name)
    return weights.DEFAULT.transforms()


def _resize_and_normalize(
    shape: Sequence[int], mean: Sequence[float] | None, std: Sequence[float] | None
) -> Preprocess:
    channels, height, width = shape[1:]
    if channels == 1 and (mean is None or std is None):
        raise InputError("gray images have no usual scale; pass --mean and --std")
    shift, divisor = mean or IMAGENET_MEAN, std or IMAGENET_STD
    for name, numbers in (("--mean", shift), ("--std", divisor)):
        if len(numbers) not in (1, channels):
            raise InputError(f"{name} has {len(numbers)} numbers, but the model takes {channels} channels")
    center, spread = (torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1, 1) for numbers in (shift, divisor))

    def preprocess(image: Any) -> Tensor:
        # Crop to the largest centered window with the input's proportions, so that images are not stretched.
        scale = min(image.height / height, image.width / width)
        left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
        window = (left, top, left + scale * width, top + scale * height)
        pixels = np.array(image.resize((width, height), BICUBIC, box=window), dtype=np.float32)
        return (torch.from_numpy(pixels).reshape(height, width, channels).permute(2, 0, 1) / 255 - center) / spread

    return preprocess
