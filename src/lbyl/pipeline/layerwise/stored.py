"""Checks the weights of a folder against its configuration, before any layer takes time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lbyl.errors import InputError
from lbyl.io.shards import FLOATING, Shards
from lbyl.pipeline.layerwise.layers import Skeleton
from lbyl.pipeline.prepare import check_weight
from lbyl.runtime.progress import Progress


def check_stored(skeleton: Skeleton, stored: Shards) -> None:
    """Check names, shapes and types of all weights, by the headers of the files.

    Raises:
        InputError: one is missing, has another shape than the configuration says, or is quantized.
    """
    expected = skeleton.model.state_dict()
    for name, (shape, kind) in stored.headers(skeleton.all_names(stored.files)).items():
        if shape != tuple(expected[name].shape):
            shapes = ("x".join(map(str, sizes)) for sizes in (shape, expected[name].shape))
            raise InputError("{} is {} in the file, but {} by config.json".format(name, *shapes))
        if kind not in FLOATING:
            raise InputError(
                f"{name} is of type {kind} in the file; layers are compressed in {', '.join(FLOATING)}, so pass the "
                "folder of the weights before they were quantized"
            )


def stored_dtype(skeleton: Skeleton, stored: Shards) -> torch.dtype:
    """The type that ``from_pretrained`` gives all weights: that of the configuration, or else of the embedding."""
    found = getattr(skeleton.model.config, "dtype", None)
    if isinstance(found, torch.dtype):
        return found
    return next(FLOATING[kind] for _, kind in stored.headers(skeleton.embedding).values())


def check_values(names: Sequence[str], read: Callable[[str], Tensor], progress: Progress | None) -> None:
    """Read all weights once, one at a time, and check their values.

    Raises:
        InputError: one is not finite or too large, or a file is damaged.
    """
    for number, name in enumerate(names):
        if progress:
            progress("checking the weights", number, len(names))
        check_weight(name, read(name))
