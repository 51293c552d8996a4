"""Finds a configuration with the widths of a pruned Hugging Face model, so that ``from_pretrained`` can load it.

A configuration has a few numbers for widths. Each applies to all layers, and some widths have no number. Which number
decides which sizes is not taken from a list of architectures. Instead, the model is built on the meta device, where
nothing is allocated, with one number changed. The sizes that change as well are those that the number decides.

Nothing here imports transformers: if a model has a configuration, transformers is imported already.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lbyl.errors import first_line
from lbyl.io.quiet import quiet
from lbyl.io.rotary import other_frequencies, said_as_factors
from lbyl.surgery.plan import architecture_of

CONFIG = "config.json"

_WIDTH = re.compile(
    r"intermediate|inner|ffn|d_ff|mlp_dim|hidden_dim|hidden_size|n_embd|d_model|(^|_)heads?$|(^|_)experts$"
)
"""Numbers of hidden neurons, heads, experts and channels of residual connections."""

_HEADS = re.compile(r"(^|_)heads?$")
"""Numbers that count heads."""

_WITHIN = re.compile(r"head_dim|(?<!all_)head_size|scal|groups|n_rep|eps")
"""Attributes that change how a head or a norm computes. Shapes do not distinguish 8 heads of 4 from 4 heads of 8."""

_EPS = re.compile(r"eps")
"""Numbers that norms add to a mean square. They change when channels under an RMS norm are cut."""

_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
)
"""Files beside a model that describe how text and images become its inputs, and how it generates text."""

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


def is_language_model(model: nn.Module) -> bool:
    """Whether a model of transformers has a vocabulary."""
    return is_pretrained_model(model) and isinstance(getattr(model.config, "vocab_size", None), int)


def write_config(folder: Path, model: nn.Module, before: Mapping[str, Sequence[int]]) -> str:
    """Write ``config.json`` beside saved weights, if ``from_pretrained`` then gives the same model.

    This is checked, first by the shapes of a model that is built from the configuration, and then by loading the
    folder, unless the model is on the meta device because memory does not hold it. Other files beside the original
    weights, such as the tokenizer, are copied.

    Args:
        folder: a folder that already has the weights of the pruned model.
        model: the pruned model; it is not changed. Its own configuration may still have the old widths.
        before: shapes of the parameters and buffers of the unpruned model.

    Returns:
        A note for the report: that transformers can load the folder, or why it can't.
    """
    name = type(model).__name__
    file = folder / CONFIG
    _copy_companions(folder, model)
    try:
        with quiet():
            config = _fitting(model, {parameter: tuple(shape) for parameter, shape in before.items()})
            file.write_text(config.to_json_string(), encoding="utf-8", newline="\n")
            if not any(parameter.is_meta for parameter in model.parameters()):
                _check_loaded(folder, model)
    except _Unsayable as error:
        file.unlink(missing_ok=True)
        return f"{name}.from_pretrained can't load this folder ({error}); lbyl.load can"
    return f"transformers loads this folder as well: {name}.from_pretrained(folder)"


def follow_widths(model: nn.Module, before: Mapping[str, Sequence[int]]) -> str:
    """Give a pruned model a configuration with its widths, so that ``save_pretrained`` works.

    The old configuration, which the unpruned model may share, is not changed.

    Args:
        model: the pruned model.
        before: shapes of the parameters and buffers of the unpruned model.

    Returns:
        A note for the report if no configuration can express these widths, else "".
    """
    if not is_pretrained_model(model):
        return ""
    try:
        with quiet():
            config = _fitting(model, {parameter: tuple(shape) for parameter, shape in before.items()})
    except _Unsayable as error:
        return f"model.config still has the unpruned widths, because it can't express the new ones: {error}"
    _adopt(model, config)
    return ""


def _adopt(model: nn.Module, config: Any) -> None:
    """Replace the model's configuration, and those inside it, in all of its modules.

    A part may have a copy that differs, such as the decoder of T5. It gets a copy of the new one that differs likewise.
    """
    old: Any = model.config
    nested = {name: value for name, value in vars(old).items() if hasattr(value, "to_dict")}
    twins: dict[type, tuple[Any, Any]] = {type(value): (value, getattr(config, name)) for name, value in nested.items()}
    twins[type(old)] = old, config
    adopted = {id(before): (before, after) for before, after in twins.values()}  # old ones too, so that ids stay theirs
    for name in ("_name_or_path", "_attn_implementation", "_experts_implementation"):  # these are not stored in files
        if hasattr(old, name):
            setattr(config, name, getattr(old, name))
    for module in model.modules():
        own: Any = getattr(module, "config", None)
        if type(own) not in twins:
            continue
        if id(own) not in adopted:
            before, after = twins[type(own)]
            adopted[id(own)] = own, copy.deepcopy(after)
            for name, value in vars(own).items():
                if name not in vars(before) or vars(before)[name] != value:
                    setattr(adopted[id(own)][1], name, value)
        module.config = adopted[id(own)][1]


def _copy_companions(folder: Path, model: Any) -> None:
    """Copy the tokenizer and similar files from where the model was loaded, and write its generation settings."""
    place = Path(str(getattr(model, "name_or_path", "") or folder))
    for name in _COMPANIONS if place.is_dir() else ():
        source, target = place / name, folder / name
        if source.is_file() and not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
    generation = getattr(model, "generation_config", None)
    if generation is not None and not (folder / "generation_config.json").exists():
        generation.to_json_file(folder / "generation_config.json")


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
            raise _Unsayable(f"{name} differs after loading")


def _fitting(model: nn.Module, before: _Shapes) -> Any:
    """A configuration with the widths of ``model``: its own, or a changed copy."""
    config: Any = model.config
    name, after = type(config).__name__, architecture_of(model)
    if after.keys() != before.keys():
        raise _Unsayable("some layers were replaced by plain ones, which its class does not build")
    plain = {**copy.deepcopy(config.to_dict()), "architectures": [type(model).__name__]}
    for key in plain.keys() & {"dtype", "torch_dtype"}:  # the weights may have been converted since
        plain[key] = str(next(t for t in model.parameters() if t.is_floating_point()).dtype).removeprefix("torch.")
    if after != before and _trouble(model, plain) == "":
        return _config(model, plain)
    settings = _explicit(plain)
    base = _attempt(model, settings)
    if base is None or architecture_of(base) != before:
        raise _Unsayable(f"a model built from its {name} is not the unpruned one")
    if inside := _smaller_heads(model, settings):
        plain, settings = _with(plain, inside), _with(settings, inside)
        if (base := _attempt(model, settings)) is None:
            raise _Unsayable(f"its {name} does not allow heads of {next(iter(inside.values()))} channels")
        if rotary := said_as_factors(model, base.config):
            turned: dict[tuple[str, ...], Any] = {("rope_parameters",): dict(rotary)}
            plain, settings = _with(plain, turned), _with(settings, turned)
        before = architecture_of(base)
    decided = {field: _decides(model, settings, *field, before) for field in _fields(settings)}
    new, left = _solved(decided, _sizes(before), _sizes(after))
    if left:
        parameter, dim = min(left)
        raise _Unsayable(f"no number in {name} sets dimension {dim} of {parameter} to {after[parameter][dim]}")
    # A number is written only if it does not follow from others. The number of heads may decide no size at all.
    trouble: str | None = None
    for numbers in (new, {**_fewer_heads(model, settings), **new}):
        for candidate in (_with(plain, numbers), _with(settings, numbers)):
            candidate = _with(candidate, _constants(model, candidate))
            found = _trouble(model, candidate)
            if found == "":
                return _config(model, candidate)
            trouble = trouble or found
    raise _Unsayable(trouble or f"no model with these shapes can be built from its {name}")


def _trouble(model: nn.Module, settings: _Settings) -> str | None:
    """How a model with these settings computes differently; "" if it does not, None if its shapes differ."""
    built = _attempt(model, settings)
    if built is None or architecture_of(built) != architecture_of(model):
        return None
    trouble = _other_attribute(model, built)
    if not trouble and other_frequencies(model, built.config):
        trouble = "it can't say which rotary frequencies stay"
    return trouble


def _constants(model: nn.Module, settings: _Settings) -> dict[tuple[str, ...], float]:
    """New values of the numbers that norms add, where all norms that use a number of the configuration agree."""
    built = _attempt(model, settings)
    modules = dict(built.named_modules()) if built is not None else {}
    now: dict[float, set[float]] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            old = getattr(modules.get(path), name, None)
            if _EPS.search(name) and type(value) is float and type(old) is float:
                now.setdefault(old, set()).add(value)
    return {
        path: next(iter(now[value]))
        for path, value in _numbers(settings, float)
        if _EPS.search(path[-1]) and len(now.get(value, ())) == 1
    }


def _sizes(shapes: _Shapes) -> dict[tuple[str, int], int]:
    return {(parameter, dim): size for parameter, shape in shapes.items() for dim, size in enumerate(shape)}


def _decides(
    model: nn.Module, settings: _Settings, path: tuple[str, ...], value: int, before: _Shapes
) -> dict[tuple[str, int], Fraction]:
    """The sizes that a number decides, and by how much each changes when the number grows by one."""
    # Configurations check divisibility. These values pass: 1 divides all numbers, and divisors of a number divide its
    # double.
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
    decided: Mapping[tuple[tuple[str, ...], int], Mapping[tuple[str, int], Fraction]],
    before: Mapping[tuple[str, int], int],
    after: Mapping[tuple[str, int], int],
) -> tuple[dict[tuple[str, ...], int], set[tuple[str, int]]]:
    """The values that numbers must have to give the new sizes, and the sizes that no number explains.

    A size may depend on several numbers, as for queries, keys and values in one layer. Numbers that decide a size alone
    are solved first, and the others from what remains.
    """
    left = {axis: Fraction(after[axis] - size) for axis, size in before.items() if after[axis] != size}
    times = Counter(axis for slopes in decided.values() for axis in slopes)
    new: dict[tuple[str, ...], int] = {}
    for path, value in sorted(decided, key=lambda field: all(times[axis] > 1 for axis in decided[field])):
        slopes, name = decided[path, value], ".".join(path)
        if not slopes.keys() & left.keys():
            continue
        own = [axis for axis in slopes if times[axis] == 1] or list(slopes)
        wanted = {value + left.get(axis, 0) / slopes[axis] for axis in own}
        if len(wanted) > 1:
            raise _Unsayable(f"{name} is one number for all layers, but layers keep {min(wanted)} to {max(wanted)}")
        (number,) = wanted
        if number.denominator != 1:
            raise _Unsayable(f"{name} would be {number}, which is not a whole number")
        rest = {axis: left.pop(axis, Fraction(0)) - slope * (number - value) for axis, slope in slopes.items()}
        left |= {axis: size for axis, size in rest.items() if size}
        if number != value:
            new[path] = int(number)
    return new, set(left)


def _explicit(settings: _Settings) -> _Settings:
    """The same settings, with explicit values for numbers that follow from others."""
    settings = copy.deepcopy(settings)
    hidden, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    if settings.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        settings["head_dim"] = hidden // heads
    if settings.get("num_key_value_heads", 0) is None:
        settings["num_key_value_heads"] = heads
    if settings.get("n_inner", 0) is None and "n_embd" in settings:
        settings["n_inner"] = 4 * settings["n_embd"]
    return settings


def _numbers(settings: _Settings, kind: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Numbers of one type, including those in nested configurations."""
    for name, value in settings.items():
        if isinstance(value, dict) and name.endswith("config"):
            yield from _numbers(value, kind, (*path, name))
        elif type(value) is kind:
            yield (*path, name), value


def _fields(settings: _Settings) -> Iterator[tuple[tuple[str, ...], int]]:
    """Whole numbers that may be a width."""
    return ((path, value) for path, value in _numbers(settings, int) if _WIDTH.search(path[-1]))


def _with(settings: _Settings, values: Mapping[tuple[str, ...], Any]) -> _Settings:
    changed = copy.deepcopy(settings)
    for path, value in values.items():
        place = changed
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
    return changed


def _config(model: nn.Module, settings: _Settings) -> Any:
    """A configuration made from settings as if read from ``config.json``, with all checks of its class."""
    kind: Any = type(model.config)
    return kind.from_dict(json.loads(kind.from_dict(copy.deepcopy(settings)).to_json_string()))


def _attempt(model: nn.Module, settings: _Settings) -> nn.Module | None:
    """A model with these settings on the meta device; None if the configuration or the model refuses them."""
    kind: Any = type(model)
    try:
        with torch.device("meta"):
            return kind(_config(model, settings))
    except Exception:  # a model's own checks may raise anything
        return None


def _fewer_heads(model: nn.Module, settings: _Settings) -> dict[tuple[str, ...], int]:
    """The new number of heads, if it is the same in all layers and a number of the configuration."""
    numbers = {v for m in model.modules() for name, v in vars(m).items() if _HEADS.search(name) and type(v) is int}
    paths = [path for path, _ in _fields(settings) if _HEADS.search(path[-1])]
    return {paths[0]: numbers.pop()} if len(numbers) == len(paths) == 1 else {}


def _smaller_heads(model: nn.Module, settings: _Settings) -> dict[tuple[str, ...], int]:
    """The new size of heads, if it is the same in all layers and differs from that of the configuration."""
    sizes = {size for module in model.modules() if type(size := vars(module).get("head_dim")) is int}
    size = sizes.pop() if len(sizes) == 1 else None
    return {("head_dim",): size} if size is not None and settings.get("head_dim", size) != size else {}


def _other_attribute(model: nn.Module, built: nn.Module) -> str:
    """An attribute by which heads or norms of ``built`` compute differently; "" if there is none."""
    modules = dict(built.named_modules())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if _WITHIN.search(name) and type(value) in (int, float):
                found = getattr(modules.get(path), name, None)
                if found != value:
                    return f"{path}.{name} is {value}, but would be {found}"
    return ""
