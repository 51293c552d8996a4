"""Layer norms over channels of which some are dropped: mean and variance are taken over the kept channels.

Zeros in place of dropped channels would change the statistics of a layer norm, and no weight could correct that.
So the masked network, which a cut network is compared with, leaves them out of the statistics and outputs zero there::

    y_k = gamma_k (x_k - mean_K) / sqrt(var_K + eps) + beta_k    for k in K
    y_d = 0                                                      for all others

Here K is the set of kept channels. The cut layer norm computes the same y_k. A group norm with a single group is a
layer norm over channels and positions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from lbyl.runtime.intercept import FunctionInterceptor, Names
from lbyl.runtime.reductions import Reduction, masked_reductions

NormMasks = Mapping[str | Reduction, Bool[Tensor, " channels"]]
"""The kept channels of each layer norm, by the name of its weight, and of each reduction in a model's own code."""


def masked_layer_norm(
    x: Float[Tensor, "..."],
    kept: Bool[Tensor, " channels"],
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"] | None,
    eps: float,
    axis: int = -1,
) -> Float[Tensor, "..."]:
    """The layer norm above: statistics over the kept channels, and zero at all others.

    The variance is computed in a second pass, because one pass would lose precision for large values.

    Args:
        x: the input, with channels along ``axis``.
        kept: whether each channel is kept.
        weight: gamma.
        bias: beta; None for zero.
        eps: added to the variance.
        axis: statistics are taken over this axis and all later ones.

    Returns:
        A tensor of the shape of ``x``.
    """
    over = tuple(range(axis % x.dim(), x.dim()))
    inside = _along(kept, x, axis)
    count = inside.sum() * math.prod(x.shape[over[0] + 1 :])
    mean = torch.where(inside, x, 0).sum(over, keepdim=True) / count
    away = torch.where(inside, x - mean, 0)
    y = away * torch.rsqrt(away.square().sum(over, keepdim=True) / count + eps) * _along(weight, x, axis)
    return y if bias is None else y + torch.where(inside, _along(bias, x, axis), 0)


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """One value for each channel, shaped to broadcast with ``x``."""
    return values.to(x.device).reshape([-1] + [1] * (x.dim() - axis % x.dim() - 1))


_CALLS: dict[Any, inspect.Signature] = {
    functional.layer_norm: inspect.signature(functional.layer_norm),
    torch.layer_norm: inspect.signature(functional.layer_norm),
    functional.group_norm: inspect.signature(functional.group_norm),
    torch.group_norm: inspect.signature(functional.group_norm),
}
_SHORT = (torch.layer_norm, torch.group_norm)
"""These take one more argument, whether to use cuDNN, which is ignored."""


class MaskedLayerNorms(FunctionInterceptor):
    """While active, layer norms on the named weights take their statistics over the kept channels.

    Args:
        kept: the kept channels.
        names: the names of tensors by their ids; code that replaces a tensor must add the new one.
    """

    def __init__(self, kept: NormMasks, names: Names) -> None:
        super().__init__(names)
        self.kept = kept

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the named layer norms; make every other call as it is."""
        found = normalized(func, args, kwargs, self.kept, self.names)
        return func(*args, **kwargs) if found is None else found


@contextmanager
def statistics_of_kept(model: nn.Module, kept: NormMasks, names: Names) -> Iterator[None]:
    """While active, layer norms and other statistics of a model are taken over the kept channels.

    Args:
        model: the network that runs.
        kept: the kept channels.
        names: the names of tensors by their ids; code that replaces a tensor must add the new one.
    """
    reductions = {key: mask for key, mask in kept.items() if isinstance(key, Reduction)}
    with ExitStack() as on:
        if reductions:
            on.enter_context(masked_reductions(model, reductions))
        if len(kept) > len(reductions):
            on.enter_context(MaskedLayerNorms(kept, names))
        yield


def normalized(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kept: NormMasks, names: Names
) -> Tensor | None:
    """The result of a layer norm with statistics over the kept channels; None if the call is not such a layer norm."""
    call = _bound(func, args, kwargs)
    mask = None if call is None else kept.get(names.get(id(call["weight"]), ""))
    if call is None or mask is None:
        return None
    return masked_layer_norm(call["input"], mask, call["weight"], call["bias"], call["eps"], _axis(call))


def _bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    if func not in _CALLS:
        return None
    if func in _SHORT:
        args, kwargs = args[:5], {key: value for key, value in kwargs.items() if not key.startswith("cudnn_enable")}
    bound = _CALLS[func].bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _axis(call: Mapping[str, Any]) -> int:
    """The channel axis of a norm's input."""
    return 1 if "num_groups" in call else -1


class LookAheadNorms(FunctionInterceptor):
    """While the unpruned network runs, also computes what its layer norms will return after the cut.

    A layer norm over channels of which some are dropped gets two outputs. The network uses the usual one. In the
    other, its *twin*, the kept channels are normalized with their own statistics, and the dropped ones are as usual.
    Operations on a value with a twin are applied to both, until a consumer mixes the channels. Its output has no twin.

    Args:
        kept: the kept channels.
        names: the names of tensors by their ids.
        consumers: the names of the weights of consumers, where twins end.
    """

    def __init__(self, kept: NormMasks, names: Names, consumers: Collection[str]) -> None:
        super().__init__(names)
        self.kept, self.consumers = kept, consumers
        self._twins: Any = WeakIdKeyDictionary()

    def twin(self, value: Tensor) -> Tensor | None:
        """The value that the cut network will have at the kept channels; None if it is the same."""
        return self._twins.get(value)

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call, and also make it on the twins of its arguments."""
        given = [item for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        has_twin = any(item in self._twins for item in given)
        if not has_twin and func not in _CALLS:
            return func(*args, **kwargs)
        reads = any(self.names.get(id(item)) in self.consumers for item in given)
        theirs = None
        if has_twin and not reads:
            changed = _changed(func)

            def instead(item: Any) -> Any:
                if item in self._twins:
                    return self._twins[item]
                return item.clone() if changed and item is given[0] else item

            args_of, kwargs_of = pytree.tree_map_only(Tensor, instead, (args, kwargs))
        else:
            args_of, kwargs_of = args, kwargs
        ahead = normalized(func, args_of, kwargs_of, self.kept, self.names)
        if ahead is None and has_twin and not reads:
            theirs = func(*args_of, **kwargs_of)
        out = func(*args, **kwargs)
        if ahead is not None:
            call = _bound(func, args, kwargs)
            assert call is not None
            inside = _along(self.kept[self.names[id(call["weight"])]], ahead, _axis(call))
            theirs = torch.where(inside, ahead, out)
        for ours, its in zip(pytree.tree_leaves(out), pytree.tree_leaves(theirs), strict=False):
            if isinstance(ours, Tensor) and isinstance(its, Tensor) and ours.shape == its.shape:
                self._twins[ours] = its
        return out


def _changed(func: Any) -> bool:
    """Whether a function changes its first argument."""
    name = str(getattr(func, "__name__", ""))
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__index__", "__int__", "__invert__", "__iter__")
    return name.endswith("_")
