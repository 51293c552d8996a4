"""A ``config.json`` that says how wide a pruned Hugging Face model is, so that ``from_pretrained`` loads its folder.

A configuration has a few numbers for widths. Each holds for all layers alike, and some widths have no number. There is
no list of architectures that says which number decides which size. Instead, the model is built on the meta device,
where nothing is allocated, with one number changed: the sizes that change too are the ones that the number decides.

Nothing here imports transformers: if a model has a configuration, transformers is imported already.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lbyl.errors import first_line
from lbyl.io.quiet import quiet
from lbyl.surgery.plan import architecture_of

CONFIG = "config.json"

_WIDTH = re.compile(r"intermediate|inner|ffn|d_ff|mlp_dim|hidden_dim|hidden_size|n_embd|d_model|(^|_)heads?$")
"""Numbers that count hidden neurons, heads and channels of streams. Sizes within heads are not cut."""

_HEADS = re.compile(r"(^|_)heads?$")
"""Numbers that count heads."""

_WITHIN = re.compile(r"head_dim|(?<!all_)head_size|scal|groups|n_rep")
"""Attributes that say how a head computes. Shapes alone do not tell 8 heads of 4 from 4 heads of 8."""

_Settings = dict[str, Any]
_Shapes = Mapping[str, tuple[int, ...]]


class _Unsayable(Exception):
    """Why no configuration can express these widths."""


def is_pretrained_model(model: nn.Module) -> bool:
    """Whether a model has a configuration and can be loaded from a folder, as models of transformers can."""
    config = getattr(model, "config", None)
    return all(callable(getattr(config, name, None)) for name in ("to_dict", "to_json_string")) and callable(
        getattr(type(model), "from_pretrained", None)
    )


def write_config(folder: Path, model: nn.Module, before: Mapping[str, Sequence[int]]) -> str:
    """Write ``config.json`` beside saved weights, if ``from_pretrained`` then gives the very same model.

    This is tested: first on the shapes of a model that is built from the configuration, then by loading the folder.

    Args:
        folder: a folder that already has the ``model.safetensors`` of the pruned model.
        model: the pruned model. Its own configuration still has the old widths; it is not changed.
        before: shapes of the parameters and buffers of the unpruned model.

    Returns:
        A note for the report: that transformers can load the folder, or why it can't.
    """
    name = type(model).__name__
    file = folder / CONFIG
    try:
        with quiet():
            text = _config_text(model, {parameter: tuple(shape) for parameter, shape in before.items()})
            file.write_text(text, encoding="utf-8")
            _check_loaded(folder, model)
    except _Unsayable as error:
        file.unlink(missing_ok=True)
        return f"{name}.from_pretrained can't load this folder ({error}); lbyl.load can"
    return f"transformers loads this folder as well: {name}.from_pretrained(folder)"


def _check_loaded(folder: Path, model: nn.Module) -> None:
    kind: Any = type(model)
    try:
        loaded: nn.Module = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _Unsayable(f"{type(error).__name__}: {first_line(error)}") from error
    state, found = model.state_dict(), loaded.state_dict()
    for name in sorted(state.keys() | found.keys()):
        if (
            name not in state
            or name not in found
            or not torch.equal(state[name].cpu(), found[name].cpu().to(state[name].dtype))
        ):
            raise _Unsayable(f"{name} does not come back as it was saved")


def _config_text(model: nn.Module, before: _Shapes) -> str:
    """The text of a configuration with the widths of ``model``."""
    config: Any = model.config
    name, after = type(config).__name__, architecture_of(model)
    if after.keys() != before.keys():
        raise _Unsayable("some of its layers became plain ones, which its class does not build")
    plain = {**copy.deepcopy(config.to_dict()), "architectures": [type(model).__name__]}
    for key in plain.keys() & {"dtype", "torch_dtype"}:  # the weights may have been converted since
        plain[key] = str(next(t for t in model.parameters() if t.is_floating_point()).dtype).removeprefix("torch.")
    settings = _explicit(plain)
    base = _attempt(model, settings)
    if base is None or architecture_of(base) != before:
        raise _Unsayable(f"a model built from its {name} is not the unpruned one")
    unexplained = {axis for axis, size in _sizes(before).items() if _sizes(after)[axis] != size}
    new = {}
    for path, value in _fields(settings):
        slopes = _decides(model, settings, path, value, before)
        if slopes.keys() & unexplained:
            number = _solved(path, value, slopes, _sizes(before), _sizes(after))
            unexplained -= slopes.keys()
            if number != value:
                new[path] = number
    if unexplained:
        parameter, dim = min(unexplained)
        raise _Unsayable(f"no number in {name} says that {parameter} has {after[parameter][dim]} in dimension {dim}")
    # A number is written out only if the others no longer imply it. The number of heads may decide no size at all.
    trouble = f"a model built from its {name} has other shapes, or none can be"
    for numbers in (new, {**_fewer_heads(model, settings), **new}):
        for candidate in (_with(plain, numbers), _with(settings, numbers)):
            built = _attempt(model, candidate)
            if built is not None and architecture_of(built) == after:
                trouble = _other_heads(model, built)
                if not trouble:
                    return _config(model, candidate).to_json_string()
    raise _Unsayable(trouble)


def _sizes(shapes: _Shapes) -> dict[tuple[str, int], int]:
    return {(parameter, dim): size for parameter, shape in shapes.items() for dim, size in enumerate(shape)}


def _decides(
    model: nn.Module, settings: _Settings, path: tuple[str, ...], value: int, before: _Shapes
) -> dict[tuple[str, int], Fraction]:
    """The sizes that a number decides, and how much each grows when the number grows by one."""
    # Configurations check divisibility: 1 divides everything, and what divides a number also divides its double.
    probe, probed = 1, None
    for probe in (1, 2 * value) if value != 1 else (2,):
        probed = _attempt(model, _with(settings, {path: probe}))
        if probed is not None:
            break
    sizes = _sizes(architecture_of(probed)) if probed is not None else {}
    return {
        axis: Fraction(size - sizes[axis], value - probe)
        for axis, size in _sizes(before).items()
        if axis in sizes and sizes[axis] != size
    }


def _solved(
    path: tuple[str, ...],
    value: int,
    slopes: Mapping[tuple[str, int], Fraction],
    before: Mapping[tuple[str, int], int],
    after: Mapping[tuple[str, int], int],
) -> int:
    """The value that a number must have for the sizes that it decides."""
    name = ".".join(path)
    wanted = {value + (after[axis] - before[axis]) / slope for axis, slope in slopes.items()}
    if len(wanted) > 1:
        raise _Unsayable(f"{name} is one number for all layers, and they keep {min(wanted)} to {max(wanted)}")
    (number,) = wanted
    if number.denominator != 1:
        raise _Unsayable(f"{name} would be {number}, no whole number")
    return int(number)


def _explicit(settings: _Settings) -> _Settings:
    """The same settings, in which numbers that follow from others are written out."""
    settings = copy.deepcopy(settings)
    hidden, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    if settings.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        settings["head_dim"] = hidden // heads
    if settings.get("num_key_value_heads", 0) is None:
        settings["num_key_value_heads"] = heads
    if settings.get("n_inner", 0) is None and "n_embd" in settings:
        settings["n_inner"] = 4 * settings["n_embd"]
    return settings


def _fields(settings: _Settings, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Whole numbers that may be a width, also those of configurations within the configuration."""
    for name, value in settings.items():
        if isinstance(value, dict) and name.endswith("config"):
            yield from _fields(value, (*path, name))
        elif type(value) is int and _WIDTH.search(name):
            yield (*path, name), value


def _with(settings: _Settings, values: Mapping[tuple[str, ...], int]) -> _Settings:
    changed = copy.deepcopy(settings)
    for path, value in values.items():
        place = changed
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
    return changed


def _config(model: nn.Module, settings: _Settings) -> Any:
    """A configuration as it is read from ``config.json``, with all of its checks."""
    kind: Any = type(model.config)
    return kind.from_dict(json.loads(kind.from_dict(copy.deepcopy(settings)).to_json_string()))


def _attempt(model: nn.Module, settings: _Settings) -> nn.Module | None:
    """A model of these settings on the meta device; None where the configuration or the model refuses them."""
    kind: Any = type(model)
    try:
        with torch.device("meta"):
            return kind(_config(model, settings))
    except Exception:  # a model's own checks may raise anything
        return None


def _fewer_heads(model: nn.Module, settings: _Settings) -> dict[tuple[str, ...], int]:
    """The number of heads that are left, if it is the same in all layers and one number of the configuration."""
    numbers = {v for m in model.modules() for name, v in vars(m).items() if _HEADS.search(name) and type(v) is int}
    paths = [path for path, _ in _fields(settings) if _HEADS.search(path[-1])]
    return {paths[0]: numbers.pop()} if len(numbers) == len(paths) == 1 else {}


def _other_heads(model: nn.Module, built: nn.Module) -> str:
    """An attribute by which the heads of ``built`` compute differently; "" if there is none."""
    modules = dict(built.named_modules())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if _WITHIN.search(name) and type(value) in (int, float):
                found = getattr(modules.get(path), name, None)
                if found != value:
                    return f"{path}.{name} is {value}, and would be {found}"
    return ""
