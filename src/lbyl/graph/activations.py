"""Element-wise functions that the closed forms can pass samples through, by ATen name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": functional.relu6,
    "hardtanh": functional.relu6,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
