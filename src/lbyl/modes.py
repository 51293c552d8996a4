"""Running somebody else's model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_TORCH = frozenset(vars(nn.Module()))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module's mode and plain attributes are what they were.

    Some modules keep what they compute from their weights (attention biases, masks): after a run in another
    precision, or a trace with fake tensors, that would be wrong or worse.
    """
    modes = {module: module.training for module in model.modules()}
    plain = {module: _plain(module) for module in modes}
    held = {id(v): (v, v.copy()) for values in plain.values() for v in values.values() if isinstance(v, _CONTAINERS)}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
            for name in _plain(module).keys() - plain[module].keys():
                del module.__dict__[name]
            module.__dict__.update(plain[module])
        for container, content in held.values():
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)


_CONTAINERS = (dict, list, set)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _TORCH}
