"""Adam for inputs that are moved. `torch.optim` would load PyTorch's compiler, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MEAN, _SQUARE, _TINY = 0.9, 0.999, 1e-8


class Adam:
    """Moves tensors against their gradients (Kingma and Ba 2015), with the decays that `torch.optim.Adam` has.

    Args:
        tensors: each with its learning rate; they get gradients from now on.
    """

    def __init__(self, tensors: Sequence[tuple[Tensor, float]]) -> None:
        self._moved = [(t.requires_grad_(True), lr, torch.zeros_like(t), torch.zeros_like(t)) for t, lr in tensors]
        self._steps = 0

    @torch.no_grad()
    def step(self, share: float = 1.0) -> None:
        """Make one step, with this share of the learning rates, and clear the gradients."""
        self._steps += 1
        biases = 1 - _MEAN**self._steps, 1 - _SQUARE**self._steps
        for tensor, lr, mean, square in self._moved:
            if tensor.grad is None:
                continue
            mean.lerp_(tensor.grad, 1 - _MEAN)
            square.mul_(_SQUARE).addcmul_(tensor.grad, tensor.grad, value=1 - _SQUARE)
            spread = (square.sqrt() / biases[1] ** 0.5).add_(_TINY)
            tensor.addcdiv_(mean, spread, value=-share * lr / biases[0])
            tensor.grad = None
