"""Products of rows with the matrix of their expert, as mixtures of experts compute them in one call.

PyTorch's own function takes neither float64 nor, on the meta device, any precision but bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

GROUPED: Any = getattr(torch, "_grouped_mm", None)
"""PyTorch's function; None where it is missing."""


def of_each_expert(ends: Int[Tensor, " experts"]) -> Iterator[tuple[int, slice]]:
    """Each expert that has any rows, and its rows, sorted by expert; ``ends`` holds where each expert ends."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def grouped_product(
    x: Float[Tensor, "rows columns"],
    weight: Float[Tensor, "experts columns out"],
    offs: Int[Tensor, " experts"] | None = None,
    **options: Any,
) -> Float[Tensor, "rows out"]:
    """Replaces ``torch._grouped_mm``, with the same arguments and result, in every precision and on the meta device."""
    lacking = (x.is_meta or x.dtype == torch.float64) and x.dim() == 2 and weight.dim() == 3
    if offs is None or not lacking or any(value is not None for value in options.values()):
        return GROUPED(x, weight, offs=offs, **options)
    out = x.new_zeros(len(x), weight.shape[2])
    if not x.is_meta:
        for expert, rows in of_each_expert(offs):
            torch.mm(x[rows], weight[expert], out=out[rows])
    return out
