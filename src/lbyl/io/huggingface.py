"""Finds a configuration with the widths of a pruned Hugging Face model, so that ``from_pretrained`` can load it.

A configuration has a few numbers for widths. Each applies to all layers or to a stage, and some widths have no number.
Which number decides which sizes is not taken from a list of architectures, but found out by building the model.

Nothing here imports transformers: if a model has a configuration, transformers is imported already.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lbyl.errors import first_line
from lbyl.io.config_numbers import (
    HEADS,
    Place,
    Settings,
    Shapes,
    Unbuildable,
    Unsayable,
    attempt,
    built_from,
    config_from,
    fields,
    name_at,
    numbers,
    solved,
    with_values,
)
from lbyl.io.quiet import quiet
from lbyl.io.rotary import other_frequencies, said_as_factors
from lbyl.surgery.plan import architecture_of

CONFIG = "config.json"

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

_PARAMETRIZED = re.compile(r"\.parametrizations\b.*")
"""The part of a parameter's name that follows its layer, where PyTorch computes a weight from it."""

_NAMED = 2
"""Number of layers that a sentence names."""


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
    except Unsayable as error:
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
    except Unsayable as error:
        return f"model.config still has the unpruned widths, because it can't express the new ones: {error}"
    _adopt(model, config)
    return ""


def _adopt(model: nn.Module, config: Any) -> None:
    """Replace the model's configuration, and those inside it, in all of its modules.

    A part may have a copy that differs, such as the decoder of T5. It gets a copy of the new one that differs likewise.
    """
    old: Any = model.config
    pairs: list[tuple[Any, Any]] = [
        *((value, getattr(config, name)) for name, value in vars(old).items() if hasattr(value, "to_dict")),
        (old, config),
    ]
    twins = {type(before): (before, after) for before, after in pairs}
    adopted = {id(before): (before, after) for before, after in pairs}  # old ones too, so that ids stay theirs
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
        raise Unsayable(f"{type(error).__name__}: {first_line(error)}") from error
    state, found = model.state_dict(), loaded.state_dict()
    for name in sorted(state.keys() | found.keys()):
        if (
            name not in state
            or name not in found
            or not torch.equal(state[name].cpu(), found[name].cpu().to(state[name].dtype))
        ):
            raise Unsayable(f"{name} differs after loading")


def _fitting(model: nn.Module, before: Shapes) -> Any:
    """A configuration with the widths of ``model``: its own, or a changed copy."""
    config: Any = model.config
    name, after = type(config).__name__, architecture_of(model)
    if after.keys() != before.keys():
        raise Unsayable(_replaced(before, after))
    plain = {**copy.deepcopy(config.to_dict()), "architectures": [type(model).__name__]}
    for key in plain.keys() & {"dtype", "torch_dtype"}:  # the weights may have been converted since
        plain[key] = str(next(t for t in model.parameters() if t.is_floating_point()).dtype).removeprefix("torch.")
    if after != before and _trouble(model, plain) == "":
        return config_from(model, plain)
    try:
        if architecture_of(built_from(model, plain)) != before:
            raise Unsayable(f"a model built from its {name} is not the unpruned one")
    except Unbuildable as error:
        raise Unsayable(f"no model can be built from its {name}: {error}") from error
    settings = _explicit(model, plain, before)
    if inside := _smaller_heads(model, settings):
        plain, settings = with_values(plain, inside), with_values(settings, inside)
        if (base := attempt(model, settings)) is None:
            raise Unsayable(f"its {name} does not allow heads of {next(iter(inside.values()))} channels")
        if rotary := said_as_factors(model, base.config):
            turned: dict[Place, Any] = {("rope_parameters",): dict(rotary)}
            plain, settings = with_values(plain, turned), with_values(settings, turned)
        before = architecture_of(base)
    new, missed = solved(model, settings, before, after)
    # A number is written only if it does not follow from others. The number of heads may decide no size at all. It may
    # also divide a width that decides sizes with it, and then what was solved for is wrong.
    heads, trouble = _fewer_heads(model, settings), None
    choices = (new, {**heads, **new}, {**new, **heads})
    tries = [with_values(start, values) for values in choices for start in (plain, settings)]
    for candidate in (one for index, one in enumerate(tries) if one not in tries[:index]):
        candidate = with_values(candidate, _constants(model, candidate))
        found = _trouble(model, candidate)
        if found == "":
            return config_from(model, candidate)
        trouble = trouble or found
    if not (trouble or missed):
        why = next((f" ({refused})" for candidate in tries if (refused := _refused(model, candidate))), "")
        way = "; ratio={'*mlp*': ...} leaves heads whole" if heads or "head" in why else ""
        missed = f"no model with these shapes can be built from its {name}{why}{way}"
    raise Unsayable(trouble or missed)


def _refused(model: nn.Module, settings: Settings) -> str:
    """Why no model can be built with these settings; "" if it can."""
    try:
        built_from(model, settings)
    except Unbuildable as error:
        return str(error)
    return ""


def _trouble(model: nn.Module, settings: Settings) -> str | None:
    """How a model with these settings computes differently; "" if it does not, None if its shapes differ."""
    built = attempt(model, settings)
    if built is None or architecture_of(built) != architecture_of(model):
        return None
    trouble = _other_attribute(model, built)
    if not trouble and other_frequencies(model, built.config):
        trouble = "it can't say which rotary frequencies stay"
    return trouble


def _constants(model: nn.Module, settings: Settings) -> dict[Place, float]:
    """New values of the numbers that norms add, where all norms that use a number of the configuration agree."""
    now = _attributes(model, settings, _EPS, float)
    return {
        path: next(iter(now[value]))
        for path, value in numbers(settings, float)
        if _EPS.search(name_at(path)) and len(now.get(value, ())) == 1
    }


def _attributes(model: nn.Module, settings: Settings, pattern: re.Pattern[str], kind: type) -> dict[Any, set[Any]]:
    """Values of attributes of one type, by what they are in a model with these settings.

    Attributes of a module whose parts have such attributes too are left out. It may count heads that are in its layers,
    and its own number is not changed when these are cut.
    """
    built = attempt(model, settings)
    modules = dict(built.named_modules()) if built is not None else {}
    now = {
        path: [(name, value) for name, value in vars(module).items() if pattern.search(name) and type(value) is kind]
        for path, module in model.named_modules()
    }
    inside = [path.split(".") for path, mine in now.items() if path and mine]
    around = {".".join(parts[:end]) for parts in inside for end in range(len(parts))}
    found: dict[Any, set[Any]] = {}
    for path in now.keys() - around:
        for name, value in now[path]:
            if type(old := getattr(modules.get(path), name, None)) is kind:
                found.setdefault(old, set()).add(value)
    return found


def _replaced(before: Shapes, after: Shapes) -> str:
    """The sentence for layers with other parameters than before, such as one whose weight was computed from two."""
    others = [name for name in (*before, *after) if (name in before) != (name in after)]
    layers = list(dict.fromkeys(_PARAMETRIZED.sub("", name.rpartition(".")[0]) for name in others))
    more = f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
    were = "was replaced by a plain one" if len(layers) == 1 else "were replaced by plain ones"
    return f"{', '.join(layers[:_NAMED])}{more} {were}, which its class does not build"


def _explicit(model: nn.Module, settings: Settings, before: Shapes) -> Settings:
    """The same settings, with explicit values for numbers that follow from others, if the model stays the same."""
    hidden, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    follow: dict[str, Any] = {}
    if settings.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        follow["head_dim"] = hidden // heads
    if settings.get("num_key_value_heads", 0) is None:
        follow["num_key_value_heads"] = heads
    if settings.get("n_inner", 0) is None and "n_embd" in settings:
        follow["n_inner"] = 4 * settings["n_embd"]
    for name, value in follow.items():  # a class may compute such a number itself, or from other ones
        explicit = with_values(settings, {(name,): value})
        built = attempt(model, explicit)
        if built is not None and architecture_of(built) == before:
            settings = explicit
    return settings


def _fewer_heads(model: nn.Module, settings: Settings) -> dict[Place, int]:
    """The new numbers of heads, where all layers that use a number of the configuration have the same."""
    now = _attributes(model, settings, HEADS, int)
    return {
        path: next(iter(now[value]))
        for path, value in fields(settings)
        if HEADS.search(str(path[-1])) and len(now.get(value, ())) == 1  # not of single stages
    }


def _smaller_heads(model: nn.Module, settings: Settings) -> dict[Place, int]:
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
