"""Runs an ONNX file in onnxruntime, and compares it with a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lbyl.errors import InputError, first_line
from lbyl.io.comparison import difference
from lbyl.io.onnx.arrays import as_array
from lbyl.io.onnx.file import session
from lbyl.io.onnx.network import FileInput
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.inputs import ExampleInputs, outputs

TOLERANCE = 1e-3
"""Largest allowed difference between a file and its network, relative to the output's largest magnitude."""
_NOTHING = 1e-6
"""An absolute difference up to this is always allowed."""


def run_file(path: Path, inputs: Sequence[FileInput], given: ExampleInputs) -> list[Tensor]:
    """The outputs of a file in onnxruntime.

    Raises:
        InputError: onnxruntime can't load the file, or the file does not run on these inputs.
    """
    try:
        opened = session(path)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"onnxruntime can't load {path}: {first_line(error)}") from error
    try:
        found = opened.run(None, feed(inputs, given))
    except Exception as error:
        raise InputError(f"{path} does not run on {given.describe()}: {first_line(error)}") from error
    return [torch.from_numpy(np.asarray(item)) for item in found]


def feed(inputs: Sequence[FileInput], given: ExampleInputs) -> dict[str, np.ndarray]:
    """Inputs as arrays, by their names in the file."""
    named = dict(zip([item.name for item in inputs], given.args, strict=False)) | dict(given.kwargs)
    return {name: as_array(value, np.dtype(value.numpy().dtype)) for name, value in named.items()}


def compared(
    path: Path, inputs: Sequence[FileInput], network: nn.Module, given: ExampleInputs, tolerance: float = TOLERANCE
) -> float:
    """The largest difference between a file's outputs and a network's, relative to the outputs' largest magnitude.

    Raises:
        InputError: one of them does not run, or the difference is above the tolerance.
    """
    with undisturbed(network):
        ours = outputs(network, given)
    theirs = run_file(path, inputs, given)
    if [tuple(t.shape) for t in ours] != [tuple(t.shape) for t in theirs]:
        shapes = [", ".join("x".join(map(str, t.shape)) for t in found) for found in (theirs, ours)]
        raise InputError(f"{path} gives {shapes[0]}, but the network that was read from it gives {shapes[1]}")
    largest = 0.0
    for a, b in zip(theirs, ours, strict=True):
        absolute, relative = difference(a, b.to(a.dtype))
        if not (relative <= tolerance or absolute <= _NOTHING):
            raise InputError(f"{path} and the network that was read from it differ: relative difference {relative:.1e}")
        largest = max(largest, min(relative, absolute / _NOTHING * TOLERANCE if absolute < _NOTHING else relative))
    return largest
