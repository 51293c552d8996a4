"""Run somebody's model without leaving a trace: modes, random state, attention kernels, the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import is_

import torch
from torch import nn

MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""What torch itself keeps in every module."""
ATOMS = frozenset((bool, int, float, str, type(None)))
CONTAINERS = (dict, list, set)


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
        if type(value) not in ATOMS and isinstance(value, CONTAINERS) and name not in MODULE_ATTRIBUTES
    }
    model.eval()  # even where they all are: it makes some forget what they keep
    try:
        yield
    finally:
        set_modes(modes)
        for now, own in before:
            if now.keys() == own.keys() and all(map(is_, now.values(), own.values())):
                continue  # as usual
            for name in now.keys() - own.keys() - MODULE_ATTRIBUTES:
                del now[name]
            now.update({name: value for name, value in own.items() if name not in MODULE_ATTRIBUTES})
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
