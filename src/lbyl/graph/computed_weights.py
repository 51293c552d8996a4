"""Replaces layers that compute their weight on the fly (weight standardization, weight norm) by plain ones.

The weight that such a layer computes depends on all of its input channels, so a cut would change the rest of it too.
A plain layer with the weight that the layer computes now gives the same outputs and can be cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbyl.errors import SurgeryError
from lbyl.runtime.contexts import seeded, undisturbed
from lbyl.runtime.copying import copy_model, tensors_of
from lbyl.runtime.inputs import ExampleInputs, outputs
from lbyl.runtime.intercept import FunctionInterceptor, module_hooks

_LAYERS: Mapping[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "linear": nn.Linear,
}
_LARGEST = 2**40
_ARGUMENTS = {
    *("bias", "in_features", "out_features", "in_channels", "out_channels"),
    *("kernel_size", "stride", "padding", "dilation", "groups"),
}
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Fold:
    """Replace a module by a plain layer with these arguments."""

    module: str
    op: str
    arguments: Mapping[str, Any]


def fold_computed(model: nn.Module, inputs: ExampleInputs, paths: Iterable[str]) -> tuple[nn.Module, tuple[Fold, ...]]:
    """A copy of a model in which the named modules are plain layers, where a plain layer computes the same.

    Args:
        model: the model in evaluation mode; it is not changed.
        inputs: the example inputs.
        paths: names of the modules whose weight is computed, as the trace found them.

    Returns:
        The copy, and what was replaced.
    """
    modules = {path: model.get_submodule(path) for path in dict.fromkeys(paths) if path}
    calls = _SoleLayerCalls()
    with module_hooks(modules, calls.enter, calls.leave), undisturbed(model), calls:
        outputs(model, inputs)
    if not calls.folds:
        return model, ()
    twin = copy_model(model)
    folds = []
    for path, (item, weight, bias) in calls.folds.items():
        layer = _place(twin, item).to_empty(device=weight.device)
        with torch.no_grad():
            layer.get_parameter("weight").copy_(weight)
            if bias is not None:
                layer.get_parameter("bias").copy_(bias)
        layer.to(weight.device, weight.dtype).train(modules[path].training)
        folds.append(item)
    return twin, tuple(folds)


def apply_folds(model: nn.Module, folds: Sequence[Fold]) -> nn.Module:
    """A copy of a fresh model with the same plain layers, on the meta device; :func:`fill_folds` gives them memory.

    Raises:
        SurgeryError: the model lacks one of the modules, or a layer can't be made from its arguments.
    """
    if not folds:
        return model
    twin = copy_model(model)
    for item in folds:
        _place(twin, item)
    return twin


def fill_folds(model: nn.Module, fresh: nn.Module, folds: Sequence[Fold]) -> None:
    """Allocate these layers on the device of the modules that they replace, so that weights can be loaded."""
    for item in folds:
        state = tensors_of(fresh.get_submodule(item.module))
        device = next((tensor.device for tensor in state.values()), torch.device("cpu"))
        model.get_submodule(item.module).to_empty(device=device)


def _place(model: nn.Module, item: Fold) -> nn.Module:
    if item.op not in _LAYERS or item.module not in dict(model.named_modules()):
        raise SurgeryError(
            f"{item.module!r}: the model has no such module that a plain {item.op} could replace; "
            "the plan was made for another architecture, so pass a model of that architecture"
        )
    try:
        if foreign := item.arguments.keys() - _ARGUMENTS:
            raise ValueError(f"unknown arguments {sorted(foreign)}")
        # On the meta device, so that a forged plan can't make us allocate memory.
        with seeded(), torch.device("meta"):
            layer = _LAYERS[item.op](**item.arguments)
        if sum(parameter.numel() for parameter in layer.parameters()) > _LARGEST:
            raise ValueError("too large")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SurgeryError(f"{item.module!r}: no {item.op} can be made of {dict(item.arguments)}: {error}") from error
    state = tensors_of(model.get_submodule(item.module))
    first = next((t for t in state.values() if t.is_floating_point()), None)
    if first is not None:
        layer.to(first.dtype)
    model.set_submodule(item.module, layer)
    return layer


class _SoleLayerCalls(FunctionInterceptor):
    """Records modules that do nothing but call one layer function, and how they call it."""

    def __init__(self) -> None:
        super().__init__()
        self.folds: dict[str, tuple[Fold, Tensor, Tensor | None]] = {}
        self._inside: list[str] = []
        self._calls: dict[str, list[tuple[str, dict[str, Any], Any]]] = {}

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside.append(path)
        self._calls[path] = []

    def leave(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside.pop()
        calls = self._calls.pop(path)
        if len(calls) != 1:
            return
        op, given, result = calls[0]
        # Only the call itself may stand between input and output: no padding before it, nothing after it.
        if len(args) != 1 or given["input"] is not args[0] or result is not output:
            return
        weight, bias = given["weight"], given.get("bias")
        arguments: dict[str, Any] = {"bias": bias is not None}
        if op == "linear":
            arguments |= {"in_features": weight.shape[1], "out_features": weight.shape[0]}
        else:
            groups = given.get("groups", 1)
            arguments |= {
                "in_channels": weight.shape[1] * groups,
                "out_channels": weight.shape[0],
                "kernel_size": list(weight.shape[2:]),
                "stride": _plain(given.get("stride", 1)),
                "padding": _plain(given.get("padding", 0)),
                "dilation": _plain(given.get("dilation", 1)),
                "groups": groups,
            }
        self.folds[path] = (
            Fold(path, op, arguments),
            weight.detach().clone(),
            None if bias is None else bias.detach().clone(),
        )

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if self._inside and name in _LAYERS:
            given = dict(zip(_NAMES, args, strict=False)) | kwargs
            self._calls[self._inside[-1]].append((name, given, result))
        return result


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value
