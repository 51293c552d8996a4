"""Counting multiply-accumulates while a model runs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_FREE = {
    torch.ops.aten.adaptive_avg_pool2d,
    torch.ops.aten.batch_norm,
    torch.ops.aten.contiguous,
    torch.ops.aten.dropout,
    torch.ops.aten.flatten,
    torch.ops.aten.group_norm,
    torch.ops.aten.layer_norm,
    torch.ops.aten.pad,
    torch.ops.aten.reshape,
    torch.ops.aten.to,
}
"""Operations without a multiplication that counts, which need not be taken apart to find out."""


class MacCounter(TorchDispatchMode):
    """Multiply-accumulates of convolutions, linear layers and matrix products, by PyTorch's own formulas.

    ``torch.utils.flop_counter.FlopCounterMode`` finds the same, but follows every module, which takes as long as a
    small model does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._flops = 0

    @property
    def total(self) -> int:
        """What has been counted so far."""
        return self._flops // 2

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and _composite(func):
            # Within inference_mode, operations arrive whole that are made of others.
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if formula is not None:
            self._flops += formula(*args, **kwargs, out_val=result)
        return result


@cache
def _composite(func: Any) -> bool:
    """Whether an operation is made of others that may count."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return func._overloadpacket not in _FREE and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite)
