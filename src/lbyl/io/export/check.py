"""Compares an exported file with the PyTorch model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lbyl.errors import ExportError
from lbyl.io.comparison import difference
from lbyl.io.export.base import Refused, Run
from lbyl.runtime.inputs import ExampleInputs

TOLERANCE = 1e-4
"""Largest allowed difference between file and model in float32, relative to the output's largest magnitude."""

Case = tuple[ExampleInputs, list[Tensor]]
"""Inputs, and the PyTorch model's outputs for them."""


def largest_differences(
    run: Run, cases: Sequence[Case], tolerance: float, file: str, dynamic: bool
) -> tuple[float, float]:
    """The largest absolute and the largest relative difference between the file and the model over all cases.

    Raises:
        ExportError: the file computes something else than the model.
        Refused: the file does not run.
    """
    absolute = relative = 0.0
    for inputs, expected in cases:
        try:
            found = run(inputs)
        except ExportError:
            raise
        except Exception as error:
            raise Refused(f"the exported file does not run on {inputs.describe()}", error) from error
        if [t.shape for t in found] != [t.shape for t in expected]:
            raise ExportError(
                f"{file} returns {_shapes(found)} on {inputs.describe()}, "
                f"the PyTorch model {_shapes(expected)}; no file was kept"
            )
        for a, b in zip(expected, found, strict=True):
            apart, share = difference(a, b)
            if not share <= _allowed(a.dtype, tolerance):
                raise ExportError(
                    f"{file} does not compute what the PyTorch model does: the largest difference on "
                    f"{inputs.describe()} is {apart:.1e}, relative {share:.1e} (allowed: "
                    f"{_allowed(a.dtype, tolerance):.0e}); no file was kept"
                    + (". A fixed batch size may help: dynamic=False (--fixed-batch)" if dynamic else "")
                )
            absolute, relative = max(absolute, apart), max(relative, share)
    return absolute, relative


def _allowed(dtype: torch.dtype, tolerance: float) -> float:
    return max(tolerance, 16 * torch.finfo(dtype).eps) if dtype.is_floating_point else tolerance


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join("x".join(map(str, t.shape)) or "scalar" for t in tensors)
