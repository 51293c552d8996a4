"""Copies of a model, with tensors of their own or with the tensors of the original."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lbyl.errors import InputError, SurgeryError
from lbyl.runtime.contexts import ATOMS, MODULE_ATTRIBUTES, TABLES, alone, forget_cached, uncollected
from lbyl.runtime.inputs import ExampleInputs


def copy_model(model: nn.Module, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model, in which ``instead[id(part)]`` replaces a part.

    Tensors that are parts of larger ones get memory of their own, for files of weights can't hold them otherwise.

    Raises:
        InputError: the model holds something that can't be copied.
    """
    memo: dict[int, Any] = dict(instead or {})
    for module in model.modules():
        for name, value in vars(module).items():
            for tensor in (
                pytree.tree_leaves(value) if name not in MODULE_ATTRIBUTES and type(value) not in ATOMS else ()
            ):
                # A cached result may have a gradient history, which can't be copied.
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
    memo |= _parts_alone(tensor for tensor in tensors_of(model).values() if id(tensor) not in memo)
    try:
        with alone(model), uncollected():
            _copy_modules(model, memo)
            twin = copy.deepcopy(model, memo)
            _rebind_functions(twin, memo)
    except Exception as error:
        raise InputError(f"{type(model).__name__} can't be copied ({error}); lbyl only works on a copy") from error
    _check_names(model, twin)
    _check_apart(model, twin, instead or {})
    forget_cached(twin)  # after a cut it would be wrong
    return twin


def _check_names(model: nn.Module, twin: nn.Module) -> None:
    """Raise InputError if a copy has other names, as of a network that builds itself anew when it is copied."""
    if lost := sorted(tensors_of(model).keys() - tensors_of(twin).keys()):
        raise InputError(
            f"{type(model).__name__} can't be copied: its copy has no {lost[0]!r}, because it is built under other "
            "names; lbyl only works on a copy, so pass a network that copy.deepcopy copies as it is"
        )


def _check_apart(model: nn.Module, twin: nn.Module, instead: Mapping[int, Any]) -> None:
    """Raise InputError if a copy still holds a part of the original, which a cut would change.

    Args:
        model: the original.
        twin: its copy.
        instead: what replaces parts of the original.
    """
    given = {id(part) for part in instead.values()}
    for what, parts in (("module", dict(model.named_modules())), ("tensor", tensors_of(model))):
        names = {id(part): name for name, part in parts.items() if id(part) not in given}
        for part in twin.modules() if what == "module" else tensors_of(twin).values():
            if id(part) in names:
                raise InputError(
                    f"{type(model).__name__} can't be copied: its copy shares the {what} {names[id(part)]!r} with it, "
                    "as where __deepcopy__ returns the object itself; lbyl only works on a copy, so pass a network "
                    "that copy.deepcopy copies as a whole"
                )


def _rebind_functions(twin: nn.Module, memo: Mapping[int, Any]) -> None:
    """Let functions that a copy holds refer to the copy: hooks, and functions in attributes.

    `copy.deepcopy` does not copy functions, so a hook that stores features in its network would store those of a copy
    in the original, and the copy would go on with what it was copied with.

    Args:
        twin: the copy.
        memo: what was copied, by the ids of the originals.
    """
    for module in twin.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, FunctionType):
                vars(module)[name] = _rebound(value, memo)
            elif name in TABLES and value:
                value.update(
                    {key: _rebound(hook, memo) for key, hook in value.items() if isinstance(hook, FunctionType)}
                )


def _rebound(function: FunctionType, memo: Mapping[int, Any]) -> FunctionType:
    """The function itself, or a copy of it where it refers to something that was copied.

    It may do so in its closure, in its defaults, or by a global name: of a container that a module holds as well, of a
    module, or of a module's method, as in a notebook.
    """

    def twin_of(value: Any) -> Any:
        if isinstance(value, FunctionType) and value is not function:
            return _rebound(value, memo)
        if isinstance(value, MethodType) and id(value.__self__) in memo:
            return MethodType(twin_of(value.__func__), memo[id(value.__self__)])
        if type(value) is partial:
            parts = (value.func, *value.args, *value.keywords.values())
            if all(twin_of(part) is part for part in parts):
                return value
            named = {name: twin_of(part) for name, part in value.keywords.items()}
            return partial(twin_of(value.func), *map(twin_of, value.args), **named)
        copied = isinstance(value, (nn.Module, Tensor, dict, list, set)) and id(value) in memo
        return memo[id(value)] if copied else value

    def now(cell: CellType) -> Any:
        try:
            return cell.cell_contents
        except ValueError:  # an empty cell
            return None

    cells, known = function.__closure__ or (), function.__globals__
    shared = {name: known[name] for name in function.__code__.co_names if name in known}
    held = (dict, list, set, nn.Module, MethodType, partial)
    shared = {name: twin_of(value) for name, value in shared.items() if isinstance(value, held)}
    shared = {name: value for name, value in shared.items() if value is not known[name]}
    defaults, named = function.__defaults__ or (), function.__kwdefaults__ or {}
    values = [now(cell) for cell in cells]
    given = [*values, *defaults, *named.values()]
    if not shared and all(twin_of(value) is value for value in given):
        return function
    closed = tuple(
        cell if twin_of(value) is value else CellType(twin_of(value)) for cell, value in zip(cells, values, strict=True)
    )
    made = FunctionType(function.__code__, {**known, **shared} if shared else known, function.__name__, None, closed)
    made.__defaults__ = tuple(map(twin_of, defaults)) or None
    made.__kwdefaults__ = {name: twin_of(value) for name, value in named.items()} or None
    vars(made).update(vars(function))
    return made


def _parts_alone(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Copies of tensors that are parts of a memory which none of them fills, by id; equal parts share their copy.

    A Hann window is one: it is made with one number more than it keeps.
    """
    by_memory: dict[tuple[torch.device, int], list[Tensor]] = {}
    for tensor in tensors:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
        if plain and tensor.numel() and not tensor.is_quantized:
            by_memory.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(tensor)
    made: dict[int, Tensor] = {}
    for those in by_memory.values():
        if any(each.numel() * each.element_size() == each.untyped_storage().nbytes() for each in those):
            continue
        parts: dict[tuple[Any, ...], Tensor] = {}
        for each in those:
            part = (each.storage_offset(), each.shape, each.stride(), each.dtype)
            made[id(each)] = in_place_of(each, parts.setdefault(part, each.detach().clone()))
    return made


def _copy_modules(model: nn.Module, memo: dict[int, Any]) -> None:
    """Put copies of modules into ``memo``, as `copy.deepcopy` would make them, except where they customize copying.

    `copy.deepcopy` also visits each number and each empty dictionary of hooks, which takes longer than the weights.
    """
    ours = [module for module in model.modules() if id(module) not in memo and _plainly_copied(type(module))]
    twins = [module.__class__.__new__(module.__class__) for module in ours]
    memo |= {id(module): twin for module, twin in zip(ours, twins, strict=True)}

    def twin_of(value: Any) -> Any:
        if type(value) in ATOMS:
            return value
        return memo[id(value)] if id(value) in memo else copy.deepcopy(value, memo)

    for module, twin in zip(ours, twins, strict=True):
        vars(twin).update(vars(module))
        vars(twin).pop("_compiled_call_impl", None)  # it would call the original, so `nn.Module` leaves it out as well
    for twin in twins:
        own = vars(twin)
        for name, value in list(own.items()):
            kind = type(value)
            if kind in ATOMS or (kind is tuple and all(type(item) in ATOMS for item in value)):
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
    """Whether `copy.deepcopy` does nothing but copy the attributes."""
    # Convolutions also set attributes that are missing in very old files.
    restoring = (nn.Module.__setstate__, nn.modules.conv._ConvNd.__setstate__)
    usual = all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _COPYING)
    return usual and kind.__setstate__ in restoring


_COPYING = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs_ex__", "__getnewargs__")


_WRAPPERS = {
    nn.DataParallel: "module",
    nn.parallel.DistributedDataParallel: "module",
    torch.optim.swa_utils.AveragedModel: "module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, without what wraps it for training: DataParallel, torch.compile and the like."""
    inner = getattr(model, _WRAPPERS.get(type(model), "_orig_mod"), None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, including non-persistent buffers and all names of tied tensors."""
    modules = list(model.named_modules(remove_duplicate=False))
    # One walk over the modules in place of two by `named_parameters` and `named_buffers`.
    both = [("_parameters", name, module) for name, module in modules]
    both += [("_buffers", name, module) for name, module in modules]
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for kind, prefix, module in both
        for name, tensor in getattr(module, kind).items()
        if tensor is not None
    }


def named_once(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers under one name each, the last one of several: that which the channel graph uses."""
    last = {id(tensor): (name, tensor) for name, tensor in tensors_of(model).items()}
    return dict(last.values())


@torch.no_grad()
def apply_changes(model: nn.Module, changes: Mapping[str, Sequence[Callable[[Tensor], object]]]) -> nn.Module:
    """Make in-place changes to parameters and buffers, given by name, and return the model itself."""
    state = tensors_of(model)
    for name, those in changes.items():
        for change in those:
            change(state[name])
    return model


def replacements_by_id(model: nn.Module, values: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """New parameters and buffers, by the ids of the tensors that they replace in a copy of the model.

    Raises:
        SurgeryError: the model has no tensor of that name, or its shape differs.
    """
    state = tensors_of(model)
    for name, value in values.items():
        if name not in state:
            raise SurgeryError(f"the model has no parameter or buffer {name!r}")
        if state[name].shape != value.shape:
            raise SurgeryError(
                f"{name}: the model has {shape_and_dtype(state[name])}, the new value is {shape_and_dtype(value)}"
            )
    return {id(state[name]): in_place_of(state[name], value) for name, value in values.items()}


def sharing_copy(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of a model for evaluation that shares the model's parameters, except for those in ``values``.

    Its parameters must not be written to. Buffers are copied because a forward pass may write to them, and so are
    embeddings with a maximum norm.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    written = {id(table.weight) for table in tables if table.max_norm is not None}
    borrowed = [p for p in model.parameters() if type(p) is nn.Parameter and id(p) not in written]
    twins: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in borrowed}
    return copy_model(model, twins | replacements_by_id(model, values or {})).eval()


def call_with(model: nn.Module, inputs: ExampleInputs, values: Mapping[str, Tensor]) -> Any:
    """Run a model once with some parameters and buffers replaced, by name, and return its output.

    The model is not copied, and gets its own tensors back afterwards. To run it several times with the same values, use
    :func:`sharing_copy`.
    """
    own = inputs.cloned()
    if not values:
        return own.call(model)

    def run(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, dict(values), args, kwargs, tie_weights=True)

    return own.through(run)


def imprint(model: nn.Module) -> str:
    """A digest of a few values of every tensor: training changes it, and another device does not."""
    sample: list[Tensor] = []
    for tensor in tensors_of(model).values():
        if not tensor.is_meta and tensor.numel() and tensor.layout == torch.strided:
            flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().reshape(-1)
            sample.append(flat[:: -(-len(flat) // _SAMPLE)].to("cpu", torch.float64))
    values = torch.cat(sample) if sample else torch.zeros(0)
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().data).hexdigest()


_SAMPLE = 256


def in_place_of(old: Tensor, new: Tensor) -> Tensor:
    """The new tensor, as a parameter if the old one is a parameter."""
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def shape_and_dtype(tensor: Tensor) -> str:
    """A tensor's shape and dtype as text, for errors."""
    return "x".join(map(str, tensor.shape))
