"""Replaces layers that compute their weight on the fly (weight standardization, weight norm) by plain ones.

The weight that such a layer computes depends on all of its input channels, so a cut would change the rest of it too.
A plain layer with the weight that the layer computes now gives the same outputs and can be cut. Where PyTorch computes
the weight (weight norm, spectral norm, any parametrization), the layer itself keeps it, with a forward of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from lbyl.errors import SurgeryError
from lbyl.runtime.contexts import seeded, undisturbed
from lbyl.runtime.copying import copy_model, tensors_of
from lbyl.runtime.inputs import ExampleInputs, outputs
from lbyl.runtime.intercept import FunctionInterceptor, module_hooks

_LAYERS: Mapping[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
    "linear": nn.Linear,
}
_ITSELF = "itself"
"""The ``op`` of a fold that keeps the module, and makes parameters of the tensors that PyTorch computes for it."""
_LARGEST = 2**40
_ARGUMENTS = {
    *("bias", "in_features", "out_features", "in_channels", "out_channels"),
    *("kernel_size", "stride", "padding", "output_padding", "dilation", "groups"),
}
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NAMES_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


@dataclass(frozen=True)
class Fold:
    """Replace a module by a plain layer with these arguments, or let it keep the weight that PyTorch computes."""

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
    itself = [path for path, module in modules.items() if _computed_by_torch(module)]
    calls = _SoleLayerCalls()
    others = {path: module for path, module in modules.items() if path not in itself}
    if others:
        with module_hooks(others, calls.enter, calls.leave), undisturbed(model), calls:
            outputs(model, inputs)
    if not calls.folds and not itself:
        return model, ()
    twin = copy_model(model)
    for path, (item, weight, bias) in calls.folds.items():
        layer = _place(twin, item).to_empty(device=weight.device)
        with torch.no_grad():
            layer.get_parameter("weight").copy_(weight)
            if bias is not None:
                layer.get_parameter("bias").copy_(bias)
        layer.to(weight.device, weight.dtype).train(modules[path].training)
    _keep([twin.get_submodule(path) for path in itself])
    folds = {path: item for path, (item, _, _) in calls.folds.items()}
    folds |= {path: Fold(path, _ITSELF, {}) for path in itself}
    return twin, tuple(folds[path] for path in modules if path in folds)


def apply_folds(model: nn.Module, folds: Sequence[Fold]) -> nn.Module:
    """A copy of a fresh model with the same plain layers. New ones are on the meta device, see :func:`fill_folds`.

    Raises:
        SurgeryError: the model lacks one of the modules, or a layer can't be made from its arguments.
    """
    if not folds:
        return model
    twin = copy_model(model)
    for item in folds:
        if item.op != _ITSELF:
            _place(twin, item)
    _keep(tuple(dict.fromkeys(_computing(twin, item) for item in folds if item.op == _ITSELF)))
    return twin


def fill_folds(model: nn.Module, fresh: nn.Module, folds: Sequence[Fold]) -> None:
    """Allocate new layers on the device of the modules that they replace, so that weights can be loaded."""
    for item in folds:
        if item.op == _ITSELF:
            continue
        state = tensors_of(fresh.get_submodule(item.module))
        device = next((tensor.device for tensor in state.values()), torch.device("cpu"))
        model.get_submodule(item.module).to_empty(device=device)


def _computed_by_torch(module: nn.Module) -> bool:
    """Whether PyTorch computes a tensor of a module: by a parametrization, or in a hook before each call."""
    return parametrize.is_parametrized(module) or any(True for _ in _norm_hooks(module))


def _norm_hooks(module: nn.Module) -> Iterator[WeightNorm | SpectralNorm]:
    """The hooks that compute a module's tensor, as `torch.nn.utils.weight_norm` registers them."""
    yield from (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm | SpectralNorm))


def _keep(modules: Sequence[nn.Module]) -> None:
    """Let modules keep, as tensors of their own, what PyTorch computes for them."""
    parametrized = [module for module in modules if parametrize.is_parametrized(module)]
    with torch.no_grad():
        for module in parametrized:
            _keep_parametrized(module)
    for module in modules:
        for hook in list(_norm_hooks(module)):
            trained = any(p.requires_grad for name, p in module.named_parameters() if name.startswith(f"{hook.name}_"))
            remove = remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm
            remove(module, hook.name).get_parameter(hook.name).requires_grad_(trained)
        loading = module._load_state_dict_pre_hooks
        for key, hook in list(loading.items()):  # PyTorch does not find it, since it is wrapped
            if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
                del loading[key]


def _keep_parametrized(module: nn.Module) -> None:
    """Remove all parametrizations of a module, and keep what they compute.

    `parametrize.remove_parametrizations` would also take them from the class, which the user's model has, too.
    """
    recipes = module.parametrizations
    assert isinstance(recipes, nn.ModuleDict)
    made = {name: getattr(module, name).detach().clone() for name in recipes}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, recipe in recipes.items():
        trained = list(recipe.parameters())
        if trained:
            module.register_parameter(name, nn.Parameter(made[name], any(each.requires_grad for each in trained)))
        else:
            module.register_buffer(name, made[name])


def _computing(model: nn.Module, item: Fold) -> nn.Module:
    """The module of a fold that keeps it."""
    module = dict(model.named_modules()).get(item.module)
    if module is None or not _computed_by_torch(module):
        raise SurgeryError(
            f"{item.module!r}: the model has no such module with a weight that PyTorch computes; "
            "the plan was made for another architecture, so pass a model of that architecture"
        )
    return module


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
        arguments = {"bias": bias is not None, **_arguments(op, given)}
        self.folds[path] = (
            Fold(path, op, arguments),
            weight.detach().clone(),
            None if bias is None else bias.detach().clone(),
        )

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if self._inside and name in _LAYERS:
            names = _NAMES_TRANSPOSED if "transpose" in name else _NAMES
            given = dict(zip(names, args, strict=False)) | kwargs
            self._calls[self._inside[-1]].append((name, given, result))
        return result


def _arguments(op: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a layer that makes this call; all but that of the bias."""
    first, second, *kernel = given["weight"].shape
    if op == "linear":
        return {"in_features": second, "out_features": first}
    groups, transposed = given.get("groups", 1), "transpose" in op
    usual = {"stride": 1, "padding": 0, "dilation": 1} | ({"output_padding": 0} if transposed else {})
    return {
        "in_channels": first if transposed else second * groups,
        "out_channels": second * groups if transposed else first,
        "kernel_size": kernel,
        "groups": groups,
        **{name: _plain(given.get(name, value)) for name, value in usual.items()},
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value
