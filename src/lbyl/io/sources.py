"""Loads models and weights: from a library by name, a transformers folder, a file, or the user's factory."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lbyl.errors import InputError, LbylError, first_line
from lbyl.io.network_files import is_file, read_network
from lbyl.runtime.checks import named_kind
from lbyl.runtime.cluster import OWN_FILES
from lbyl.surgery.plan import of_huggingface

FORMS = "timm:NAME, torchvision:NAME, hf:DIR, model.onnx, model.pt2, package.module:factory or file.py:factory"


def load_source(source: str, pretrained: bool = True, task: str | None = None) -> nn.Module:
    """Build a model, in evaluation mode.

    Args:
        source: one of ``timm:NAME``, ``torchvision:NAME``, ``hf:DIR``, ``model.onnx``, ``model.pt2``,
            ``package.module:factory``, ``file.py:factory``; a factory is called without arguments and returns the
            module. ``DIR`` is a folder that ``save_pretrained`` wrote, or a name whose files transformers has in its
            cache; nothing is downloaded. ``hf/TASK:DIR`` also says the task.
        pretrained: load the published weights (``timm`` and ``torchvision`` only).
        task: the task of a model in ``hf:DIR``; one of ``lbyl.io.sources.TASKS``. None uses the architecture that its
            configuration names.

    Raises:
        InputError: the form, library, name or factory is unknown, weights can't be loaded, or a file is damaged or has
            operators that lbyl can't read.
    """
    if isinstance(source, str) and is_file(source):
        return read_network(Path(source))
    kind, separator, name = source.rpartition(":") if isinstance(source, str) else ("", "", "")
    if not separator or not kind or not name:
        raise InputError(f"{source!r} names no model; write {FORMS}")
    if (found := of_huggingface(source)) is not None:
        return _huggingface(found[0], pretrained, task or found[1]).eval()
    if task is not None:
        raise InputError(f"task={task!r} is for hf:DIR; {source} has none")
    if kind == "timm":
        return _timm(name, pretrained).eval()
    if kind == "torchvision":
        return _torchvision(name, pretrained).eval()
    model = _factory(kind, name)
    if fault := _no_network(model):
        raise InputError(f"{source} returned {fault}")
    return model.eval()


def _no_network(made: object) -> str:
    """Why what a factory returned can't be cut, and what it should return; "" where it can be."""
    # The module of such a program has methods of its own in place of train and eval, which refuse.
    if isinstance(made, torch.export.ExportedProgram) or "eval" in getattr(made, "__dict__", {}):
        return (
            "an exported program; return the nn.Module that was exported, or write it with "
            "torch.export.save(program, 'model.pt2'), which is a source as well"
        )
    if isinstance(made, torch.jit.ScriptModule):
        return "a TorchScript module, which can't be cut; return the nn.Module that was scripted or traced"
    if not isinstance(made, nn.Module):
        return f"{named_kind(made)}, not a torch.nn.Module"
    return ""


TASKS = {
    "base": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
}
"""The tasks that a model of transformers can be loaded for, as its own command line names them."""


def _huggingface(place: str, pretrained: bool, task: str | None) -> nn.Module:
    """Load a model of transformers from a folder or the cache; code that comes with the weights is not run."""
    if task is not None and task not in TASKS:
        raise InputError(f"task={task!r}: choose one of {', '.join(TASKS)}")
    transformers = _library("transformers", "lbyl[language]")
    source = f"hf:{place}"
    try:
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=True)
        named = next((n for n in config.architectures or () if hasattr(transformers, n)), None)
        kind = getattr(transformers, TASKS[task] if task else named or TASKS["base"])
        if pretrained:
            return kind.from_pretrained(place, local_files_only=True)
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    except Exception as error:  # the files may make transformers raise anything
        told = first_line(error)
        hint = "DIR is a folder that save_pretrained wrote, or a name that transformers has in its cache"
        raise InputError(f"{source} can't be loaded: {told}; {hint}") from error


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a state dict from ``.safetensors``, or from a ``.pth`` that is read with ``weights_only=True``.

    Raises:
        InputError: there is no such file, only unpickling could read it, or its keys or shapes do not fit.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no weights at {file}")
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            with warnings.catch_warnings():  # the warning would repeat the error
                warnings.simplefilter("ignore")
                state = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"{file} is not a readable safetensors file: {error}") from error
    except OSError as error:
        raise InputError(f"{file} can't be read: {error.strerror or error}") from error
    except Exception as error:
        raise InputError(
            f"{file} can't be read with weights_only=True, and lbyl never unpickles code; "
            "save the state dict as .safetensors"
        ) from error
    while isinstance(state, Mapping):
        inside = next((state[key] for key in _NESTED if isinstance(state.get(key), Mapping)), None)
        if inside is None:
            break
        state = inside
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise InputError(f"{file} holds no state dict (names to tensors)")
    try:
        model.load_state_dict(_unwrapped(dict(state), model.state_dict().keys()))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise InputError(f"{file} does not fit {type(model).__name__}: {' '.join(lines[1:2] or lines)}") from error
    return model


_NESTED = ("state_dict", "model_state_dict", "model", "net", "module", "ema", "state_dict_ema", "model_ema", "params")
"""Keys under which training programs store the weights in a checkpoint; the first one found is used."""
_PREFIXES = ("module.", "model.", "net.", "network.", "_forward_module.")


def _unwrapped(state: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """A state dict without the prefixes of wrappers such as DataParallel, torch.compile and Lightning.

    Entries without the prefix that all weights of the model have (a loss, a counter) are left out.
    """
    if not any("_orig_mod." in name for name in expected):
        state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    if not expected or state.keys() >= set(expected):
        return state
    for prefix in _PREFIXES:
        under = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        # If all entries have the prefix but do not fit, the later error should say so.
        if under and (under.keys() >= set(expected) or len(under) == len(state)):
            return _unwrapped(under, expected)
    return state


def _timm(name: str, pretrained: bool) -> nn.Module:
    timm = _library("timm")
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}; timm.list_models() lists them")
    return _download(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained), pretrained)


def _torchvision(name: str, pretrained: bool) -> nn.Module:
    models = _library("torchvision.models")
    if name not in models.list_models():
        raise InputError(f"torchvision has no model {name!r}; torchvision.models.list_models() lists them")
    options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if not pretrained and "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # detectors and segmenters would fetch those of their backbones
    if not pretrained and name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return _download(f"torchvision:{name}", lambda: models.get_model(name, **options), pretrained)


def _download(source: str, build: Any, pretrained: bool) -> nn.Module:
    try:
        return build()
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained:
            raise InputError(f"{source}: the model can't be built ({first_line(error)})") from error
        raise InputError(
            f"{source}: the model or its pretrained weights can't be loaded ({first_line(error)}); "
            "pass --weights FILE, or --no-pretrained for random ones"
        ) from error


def _library(name: str, package: str = "lbyl[vision]") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{name} can't be imported ({error}); install {package}") from error


def load_function(source: str) -> Callable[..., Any]:
    """Load a user's function, ``package.module:function`` or ``file.py:function``. This runs the module.

    Raises:
        InputError: there is no such file, module or function.
    """
    place, separator, name = source.rpartition(":") if isinstance(source, str) else ("", "", "")
    if not separator or not place or not name:
        raise InputError(f"{source!r} names no function; write package.module:function or file.py:function")
    return _function(place, name, "function")


def _factory(place: str, name: str) -> Any:
    factory = _function(place, name, "factory")
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise InputError(f"{place}:{name}() failed: {type(error).__name__}: {error}") from error


def load_module(place: str) -> ModuleType:
    """Import a user's module, ``package.module``, or run a file, ``file.py``. Both execute the user's code.

    Raises:
        InputError: there is no such file or module, or it raises an error.
    """
    try:
        return _run_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except LbylError:
        raise
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {error}"
        told = f"can't be run: {why}" if place.endswith(".py") else f"can't be imported ({why})"
        raise InputError(f"{place} {told}") from error


def _run_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise InputError(f"no file {file}")
    spec = importlib.util.spec_from_file_location(f"{OWN_FILES}{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _function(place: str, name: str, kind: str) -> Callable[..., Any]:
    try:
        module = load_module(place)
    except InputError as error:
        raise InputError(f"{error}" if place.endswith(".py") else f"{error}; write {FORMS}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{place} has no {kind} {name!r}")
    return function
