"""Reductions over channels in a model's own code: in the masked network they are taken over the kept channels.

Examples are a layer norm or a pixel norm written by hand, a normalization over channels, and the mean and maximum of
spatial attention. Zeros at dropped channels would change a mean or a maximum. So the masked network, which a cut
network is compared with, leaves them out, as the cut network does. Layer norms and RMS norms without a weight are among
them; their outputs are zero at dropped channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lbyl.runtime.intercept import OperatorInterceptor, module_hooks, undivided


@dataclass(frozen=True)
class Reduction:
    """One call of an operation that reduces over an axis, identified by its place in the forward pass.

    Attributes:
        module: the path of the innermost module that runs it.
        op: the ATen name of the operation.
        call: number of earlier calls of this operation in this module during the same forward pass.
        dim: the axis.
    """

    module: str
    op: str
    call: int
    dim: int


_NORMS = ("layer_norm", "rms_norm")
"""Operations that return all that they normalize."""


def aten_name(func: Any) -> str:
    """The name of an operation without namespace and overload."""
    schema = getattr(func, "_schema", None)
    return schema.name.split("::")[1] if schema else getattr(func, "__name__", str(func))


@contextmanager
def masked_reductions(model: nn.Module, kept: Mapping[Reduction, Bool[Tensor, " channels"]]) -> Iterator[None]:
    """While active, one forward pass of the model takes these reductions over the kept channels.

    Args:
        model: the network that runs.
        kept: whether each channel along the reduced axis is kept, for each reduction.
    """
    path: list[str] = []

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        path.append(name)

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        path.pop()

    modules = dict(model.named_modules())
    with (
        module_hooks(modules, enter, leave, enter_first=True),
        undivided(),
        _Reductions(kept, lambda: path[-1] if path else ""),
    ):
        yield


class _Reductions(OperatorInterceptor):
    def __init__(self, kept: Mapping[Reduction, Tensor], where: Callable[[], str]) -> None:
        super().__init__()
        self.kept, self.where = kept, where
        self.ops = {reduction.op for reduction in kept}
        self.calls: Counter[tuple[str, str]] = Counter()

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = aten_name(func)
        if name in self.ops:
            place = self.where(), name
            number, self.calls[place] = self.calls[place], self.calls[place] + 1
            for dim in range(args[0].dim()):
                mask = self.kept.get(Reduction(*place, number, dim))
                if mask is not None and mask.numel() == args[0].shape[dim]:
                    stay = mask.nonzero().flatten().to(args[0].device)
                    part = args[0].index_select(dim, stay)
                    if name in _NORMS:
                        whole = torch.zeros_like(args[0])
                        return whole.index_copy_(dim, stay, func(part, [len(stay)], *args[2:], **kwargs))
                    return func(part, *args[1:], **kwargs)
        return func(*args, **kwargs)
