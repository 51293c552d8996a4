"""Layer norms over channels of which some are dropped: mean and variance are those of the channels that stay.

Zeros in place of dropped channels would change the statistics of a layer norm, and no weight could make up for that.
So the masked network that a cut is compared with leaves them out of the statistics, and returns zero in their place::

    y_k = gamma_k (x_k - mean_K) / sqrt(var_K + eps) + beta_k    for k in K
    y_d = 0                                                      for all others

This is what the cut layer norm computes. Here it is computed on the whole width, while the model runs. A group norm
of a single group is a layer norm over channels and positions.
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
"""Which channels stay, by the names of the weights of the layer norms that are taken over them, or by what takes them
together in a model's own code."""


def masked_layer_norm(
    x: Float[Tensor, "..."],
    kept: Bool[Tensor, " channels"],
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"] | None,
    eps: float,
    axis: int = -1,
) -> Float[Tensor, "..."]:
    """The layer norm above: statistics over the channels that stay, zero at the others.

    Two passes in the precision of ``x``, as the variance of large values would lose its digits in one.

    Args:
        x: whatever has channels along ``axis``.
        kept: which channels stay.
        weight: gamma.
        bias: beta; None for zero.
        eps: added to the variance.
        axis: statistics are over this axis and those behind it.
    """
    over = tuple(range(axis % x.dim(), x.dim()))
    inside = _along(kept, x, axis)
    count = inside.sum() * math.prod(x.shape[over[0] + 1 :])
    mean = torch.where(inside, x, 0).sum(over, keepdim=True) / count
    away = torch.where(inside, x - mean, 0)
    y = away * torch.rsqrt(away.square().sum(over, keepdim=True) / count + eps) * _along(weight, x, axis)
    return y if bias is None else y + torch.where(inside, _along(bias, x, axis), 0)


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """One value a channel, shaped to broadcast with ``x``."""
    return values.to(x.device).reshape([-1] + [1] * (x.dim() - axis % x.dim() - 1))


_CALLS: dict[Any, inspect.Signature] = {
    functional.layer_norm: inspect.signature(functional.layer_norm),
    torch.layer_norm: inspect.signature(functional.layer_norm),
    functional.group_norm: inspect.signature(functional.group_norm),
    torch.group_norm: inspect.signature(functional.group_norm),
}
_SHORT = (torch.layer_norm, torch.group_norm)
"""They also take whether cuDNN may be used, which is of no matter here."""


class MaskedLayerNorms(FunctionInterceptor):
    """While it is on, layer norms on the named weights take their statistics over the channels that stay.

    Args:
        kept: which channels stay.
        names: the names of tensors by their ids; who replaces a tensor adds the new one.
    """

    def __init__(self, kept: NormMasks, names: Names) -> None:
        super().__init__(names)
        self.kept = kept

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the named layer norms anew; leave every other call alone."""
        found = normalized(func, args, kwargs, self.kept, self.names)
        return func(*args, **kwargs) if found is None else found


@contextmanager
def statistics_of_kept(model: nn.Module, kept: NormMasks, names: Names) -> Iterator[None]:
    """While it is on, layer norms and other statistics of a model are taken over the channels that stay.

    Args:
        model: the network that runs.
        kept: which channels stay.
        names: the names of tensors by their ids; who replaces a tensor adds the new one.
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
    """What a call gives with statistics over the channels that stay; None for all that is no such layer norm."""
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
    """Where the channels are in what a norm is called on."""
    return 1 if "num_groups" in call else -1


class LookAheadNorms(FunctionInterceptor):
    """While the unpruned network runs, compute beside it what its layer norms will return once they are cut.

    A layer norm over channels of which some are dropped returns two values. The network goes on with its own. In the
    other, its *twin*, the channels that stay are normalized by themselves, and the dropped ones are unchanged.
    Operations on a value that has a twin are done on both, until a consumer mixes the channels. Its output has no twin.

    Args:
        kept: which channels stay.
        names: the names of tensors by their ids.
        consumers: the names of the weights at which twins end.
    """

    def __init__(self, kept: NormMasks, names: Names, consumers: Collection[str]) -> None:
        super().__init__(names)
        self.kept, self.consumers = kept, consumers
        self._twins: Any = WeakIdKeyDictionary()

    def twin(self, value: Tensor) -> Tensor | None:
        """What the cut network has in this value's place, at the channels that stay; None where that is the same."""
        return self._twins.get(value)

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call, and make it on the twins of its arguments as well."""
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
