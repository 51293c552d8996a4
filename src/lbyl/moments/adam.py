"""The Adam optimizer, for inputs. Importing `torch.optim` would load PyTorch's compiler, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lbyl.errors import RestorationError

_MEAN, _SQUARE, _TINY = 0.9, 0.999, 1e-8


class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980), with the default decay rates of `torch.optim.Adam`.

    Args:
        tensors: pairs of a tensor and its learning rate, which may be a tensor of rates that stretches over it;
            gradients are turned on for these tensors.
    """

    def __init__(self, tensors: Sequence[tuple[Tensor, float | Tensor]]) -> None:
        # At least float32, because squares of gradients underflow in half precision.
        zeros = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t, _ in tensors]
        self._moved = [(t.requires_grad_(True), lr, z, z.clone()) for (t, lr), z in zip(tensors, zeros, strict=True)]
        self._steps = 0

    def descend(self, loss: Tensor, share: float = 1.0) -> None:
        """Make one step that lowers a loss, with the learning rates times ``share``.

        Raises:
            RestorationError: the loss does not depend on the inputs.
        """
        if not loss.requires_grad:
            raise RestorationError(
                "nothing can be dreamed: no gradient reaches the network's inputs, as if its code turned gradients off"
            )
        loss.backward()
        self.step(share)

    @torch.no_grad()
    def step(self, share: float = 1.0) -> None:
        """Make one step with the learning rates times ``share``, and clear the gradients."""
        self._steps += 1
        biases = 1 - _MEAN**self._steps, 1 - _SQUARE**self._steps
        for tensor, lr, mean, square in self._moved:
            if tensor.grad is None:
                continue
            # A square root at the bound of its range has an infinite gradient, and that of a dead value is NaN.
            gradient = tensor.grad.to(mean.dtype).nan_to_num(0.0, 0.0, 0.0)
            mean.lerp_(gradient, 1 - _MEAN)
            square.mul_(_SQUARE).addcmul_(gradient, gradient, value=1 - _SQUARE)
            spread = (square.sqrt() / biases[1] ** 0.5).add_(_TINY)
            rate, moved = (1.0, mean * lr) if isinstance(lr, Tensor) else (lr, mean)
            tensor.copy_(torch.addcdiv(tensor, moved, spread, value=-share * rate / biases[0]))
            tensor.grad = None
