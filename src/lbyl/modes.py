"""Running somebody else's model without leaving a trace in it."""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lbyl.errors import InputError

_TORCH = frozenset(vars(nn.Module()))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module's mode and plain attributes are what they were.

    Some modules keep what they compute from their weights (attention biases, masks): after a run in another
    precision, or a trace with fake tensors, that would be wrong or worse.
    """
    modes = {module: module.training for module in model.modules()}
    before = [(vars(module), vars(module).copy()) for module in modes]
    held = {
        id(value): (value, value.copy())
        for _, own in before
        for name, value in own.items()
        if type(value) not in _ATOMS and isinstance(value, _CONTAINERS) and name not in _TORCH
    }
    model.eval()  # even where they all are: it makes some forget what they keep
    try:
        yield
    finally:
        set_modes(modes)
        for now, own in before:
            if now.keys() == own.keys() and all(map(is_, now.values(), own.values())):
                continue  # as usual
            for name in now.keys() - own.keys() - _TORCH:
                del now[name]
            now.update({name: value for name, value in own.items() if name not in _TORCH})
        for container, content in held.values():
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)


def set_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Set whether each module is in training mode, and nothing besides: none is told, and setting takes long."""
    for module, training in modes.items():
        if module.training != training:
            module.training = training


@contextmanager
def plain_attention() -> Iterator[None]:
    """Without the fast path of torch's attention, which hides a whole layer in one operation."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection: while many objects are made and kept, going through all of them is in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def duplicate(model: nn.Module, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy, with ``instead[id(part)]`` in place of some parts.

    Raises:
        InputError: the model holds something that can't be copied.
    """
    memo: dict[int, Any] = dict(instead or {})
    for module in model.modules():
        for name, value in vars(module).items():
            for tensor in pytree.tree_leaves(value) if name not in _TORCH and type(value) not in _ATOMS else ():
                # Results that a module keeps may hang on a gradient, which can't be copied.
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
    try:
        with uncollected():
            _copy_modules(model, memo)
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(f"{type(model).__name__} can't be copied ({error}); lbyl only works on a copy") from error


def _copy_modules(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copy the modules that have no way of their own to be copied into ``memo``, as `copy.deepcopy` would.

    It looks at each number, each empty dictionary of hooks by itself, which takes longer than copying the weights.
    """
    ours = [module for module in model.modules() if id(module) not in memo and _plainly_copied(type(module))]
    twins = [module.__class__.__new__(module.__class__) for module in ours]
    memo |= {id(module): twin for module, twin in zip(ours, twins, strict=True)}

    def twin_of(value: Any) -> Any:
        if type(value) in _ATOMS:
            return value
        return memo[id(value)] if id(value) in memo else copy.deepcopy(value, memo)

    for module, twin in zip(ours, twins, strict=True):
        own = vars(twin)
        own.update(vars(module))
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _ATOMS or (kind is tuple and all(type(item) in _ATOMS for item in value)):
                continue
            if id(value) in memo:
                own[name] = memo[id(value)]
            elif kind in (dict, OrderedDict):
                own[name] = memo[id(value)] = kind()
                if value:
                    own[name].update({key: twin_of(item) for key, item in value.items()})
            elif kind in (set, list) and not value:
                own[name] = memo[id(value)] = kind()
            else:
                own[name] = copy.deepcopy(value, memo)


def _plainly_copied(kind: type[nn.Module]) -> bool:
    """Whether `copy.deepcopy` makes a copy out of the attributes alone."""
    # What a convolution does besides is to set attributes that are missing in very old files.
    restoring = (nn.Module.__setstate__, nn.modules.conv._ConvNd.__setstate__)
    usual = all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _COPYING)
    return usual and kind.__setstate__ in restoring


_ATOMS = frozenset((bool, int, float, str, type(None)))
_COPYING = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs_ex__", "__getnewargs__")
_CONTAINERS = (dict, list, set)
