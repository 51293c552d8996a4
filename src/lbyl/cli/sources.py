"""Turns options into models, example inputs and data, and settings back into text."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from lbyl.cli.app import Stage, err
from lbyl.cli.names import import_plugins, is_factory
from lbyl.cli.settings import Settings
from lbyl.cli.texts import InputSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def check_output(path: Path) -> None:
    """Raise the error for a folder that `save` can't write, before any time is spent."""
    from lbyl.errors import InputError
    from lbyl.io.artifact import check_free

    check_free(path)
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent} is not writable; choose another place for {path.name}")


def load_model(
    source: str, weights: Path | None, pretrained: bool, task: str | None = None, builder: str | None = None
) -> nn.Module:
    """The model of a source, with its published weights or the ones in a file; or the network of a saved folder.

    ``builder`` is the source of what such a folder is loaded into, if its plan does not know that.
    """
    from lbyl.errors import InputError
    from lbyl.io.artifact import is_saved, load
    from lbyl.io.sources import load_source, load_weights

    if weights is not None and not weights.is_file():
        raise InputError(f"no weights at {weights}")
    if is_saved(source):
        model = load(source, load_source(builder, pretrained=False) if builder else None)
    else:
        model = load_source(source, pretrained and weights is None, task)
    return model if weights is None else load_weights(model, weights)


def example_inputs(source: str, model: nn.Module | None, texts: list[str] | None, seed: int) -> Any:
    """Random inputs of the shapes in ``--input``, or of the source's default shapes; tokens if it has a tokenizer."""
    import torch

    from lbyl.errors import InputError
    from lbyl.io.comparison import described_inputs
    from lbyl.io.network_files import example_of_program
    from lbyl.io.onnx.network import OnnxNetwork
    from lbyl.surgery.plan import of_huggingface, remembered

    specs = [InputSpec.parse(text) for text in texts or []]
    own = _precision(model)
    if not specs and model is not None and (plan := remembered(model)):
        described = described_inputs(plan, seed)
        return described if own is None else described.to(torch.device("cpu"), own)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, OnnxNetwork):
        types = [getattr(torch, spec.dtype) if spec.stated else None for spec in specs]
        return model.example_inputs([spec.shape for spec in specs] or None, generator, dtypes=types or None)
    if not specs and model is not None and (example := example_of_program(model)) is not None:
        return example
    of_transformers = model is not None and of_huggingface(source) is not None
    if not specs and model is not None and of_transformers:
        from lbyl.io.texts import example_tokens

        tokens = example_tokens(model)
        if tokens is not None:
            return _with_decoder_tokens(model, tokens)
    if not specs:
        shape = _default_shape(source, model)
        if shape is None:
            if of_transformers and hasattr(model, "get_input_embeddings"):
                raise InputError(
                    f"{source} has no tokenizer that could make a default input; pass --input: --input int64:1x32 for "
                    "a model of texts, --input 1x3x224x224 for one of images"
                )
            raise InputError(f"{source} has no default input; pass --input, such as --input 1x3x224x224")
        specs = [InputSpec(shape)]

    def make(number: int, spec: InputSpec) -> Tensor:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            return torch.randn(spec.shape, generator=generator).to(dtype if spec.stated else own or dtype)
        if number == 1 and of_huggingface(source) is not None:  # the attention mask
            return torch.ones(spec.shape, dtype=dtype)
        # Zero is a valid token, index and mask in every vocabulary; a random number is not.
        return torch.zeros(spec.shape, dtype=dtype)

    try:
        made = tuple(make(number, spec) for number, spec in enumerate(specs))
    except (RuntimeError, MemoryError) as error:
        shapes = ", ".join("x".join(map(str, spec.shape)) for spec in specs)
        raise InputError(f"there is no memory for inputs of {shapes}; pass a smaller --input") from error
    if type(model).__module__.startswith(_DETECTORS) and all(image.dim() == 3 for image in made):
        return (list(made),)
    return _with_decoder_tokens(model, made) if model is not None and of_transformers else made


def _precision(model: nn.Module | None) -> torch.dtype | None:
    """The type of a model's weights, if all are floating-point numbers of one type."""
    weights = model.parameters() if model is not None else ()
    found = {tensor.dtype for tensor in weights if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 else None


_DECODED = "decoder_input_ids"
_BEGUN = 8
"""Number of tokens that a decoder is given where the encoder is not given tokens, but images or sound."""


def _with_decoder_tokens(model: nn.Module, inputs: tuple[Tensor, ...] | dict[str, Tensor]) -> Any:
    """The inputs of a model of transformers, and tokens of its decoder if it runs only with them.

    These are all its start token, so that they fit texts of any length. Some models make tokens from those of the
    encoder instead, and are left to do so.
    """
    import inspect

    import torch

    from lbyl.runtime.inputs import ExampleInputs, outputs_if_taken

    def runs(inputs: Mapping[str, Tensor]) -> bool:
        return outputs_if_taken(model, ExampleInputs.of(inputs)) is not None

    names = list(inspect.signature(model.forward).parameters)
    given = dict(zip(names, inputs, strict=False)) if isinstance(inputs, tuple) else inputs
    if _DECODED not in names or _DECODED in given or len(given) < len(inputs) or runs(given):
        return inputs
    first = next(iter(given.values()))
    shape = first.shape if first.dim() == 2 and not first.is_floating_point() else (len(first), _BEGUN)
    settings = [getattr(model, name, None) for name in ("config", "generation_config")]
    starts = [getattr(own, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad") for own in settings]
    start = next((token for token in starts if isinstance(token, int)), 0)
    more = {**given, _DECODED: torch.full(shape, start, dtype=torch.int64)}
    return more if runs(more) else inputs


_DETECTORS = "torchvision.models.detection"
"""Models from here are called with a list of images, which may differ in size."""


def check_images(settings: Settings) -> None:
    """Raise an error for a folder without images or texts, before any time is spent."""
    if settings.data is not None:
        from lbyl.io.images import find_images
        from lbyl.io.texts import has_texts

        if not has_texts(settings.data):
            find_images(settings.data)


@dataclass(frozen=True)
class Prepared:
    """A model, its example inputs, notes, and the arguments of `lbyl.compress` and `lbyl.sweep` for the options."""

    model: nn.Module
    inputs: Any
    arguments: dict[str, Any]
    notes: tuple[str, ...] = ()


def prepare(source: str, settings: Settings, stage: Stage) -> Prepared:
    """Run plugins, load the model, and turn the options into arguments."""
    from lbyl.io.artifact import is_saved

    import_plugins(settings.plugin)
    if not is_factory(source):
        settings.check_names()
    model = load_model(source, settings.weights, not settings.no_pretrained, settings.task, settings.builder)
    settings.check_names()  # the module of a factory may have registered them
    kept = is_saved(source)
    origin = origin_of(model, source)
    inputs = example_inputs(origin, model, settings.input, settings.seed)
    batches, notes = None, ()
    if settings.data is not None:
        stage(f"reading {settings.data}")
        batches, left = _read_batches(settings.data, origin, model, inputs, settings)
        notes = _left_out(left)
    restorer = settings.restorer(batches, model, inputs)
    stage("tracing")
    arguments: dict[str, Any] = {
        "scope": settings.scope.value,
        "criterion": settings.criterion,
        "seed": settings.seed,
        "verify": not settings.no_verify,
        "strict": settings.strict,
        "submodule": settings.submodule,
        "source": None if kept else _with_task(source, settings.task),
        "progress": stage.follow,
    }
    if restorer is None:
        arguments["effort"] = settings.effort.value
    else:
        arguments["restore"] = restorer
    return Prepared(model, inputs, arguments, notes)


def _with_task(source: str, task: str | None) -> str:
    """The source with the task of a model of transformers, which is needed to build it again."""
    from lbyl.surgery.plan import of_huggingface

    found = of_huggingface(source)
    return source if found is None or task is None else f"hf/{task}:{found[0]}"


def origin_of(model: nn.Module, source: str) -> str:
    """Where a network comes from: its source, or that of the network that a saved folder was compressed from."""
    from lbyl.surgery.plan import remembered

    plan = remembered(model)
    return plan.source or "" if plan else source


def _read_batches(
    folder: Path, source: str, model: nn.Module, inputs: Any, settings: Settings
) -> tuple[list[Any], tuple[str, ...]]:
    """Batches of the texts or images in a folder, preprocessed as the model expects, and what was left out and why."""
    from lbyl.io.images import preprocessing, read_images
    from lbyl.io.texts import read_texts
    from lbyl.moments.token_inputs import token_ids
    from lbyl.runtime.inputs import ExampleInputs

    given = ExampleInputs.of(inputs)
    if token_ids(given) is not None:
        return read_texts(folder, model, given, settings.seed)
    example, sized = given.tensors()[0], bool(settings.input)
    preprocess, mode = preprocessing(source, model, example.shape, sized=sized, mean=settings.mean, std=settings.std)
    batches, left = read_images(folder, preprocess, mode, settings.seed)
    return [batch.to(example.dtype) for batch in batches], left


_NAMED = 5


def _left_out(left: tuple[str, ...]) -> tuple[str, ...]:
    """A note on the files of a folder that could not be read, which is printed as well."""
    if not left:
        return ()
    more = f", and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    note = f"left out of --data: {'; '.join(left[:_NAMED])}{more}"
    err.print(Text(f"note: {note}"))
    return (note,)


def _default_shape(source: str, model: nn.Module | None) -> tuple[int, ...] | None:
    from lbyl.surgery.plan import of_huggingface

    if source.startswith("torchvision:"):
        return (1, 3, 224, 224)
    if of_huggingface(source) is not None:
        config = getattr(model, "config", None)
        side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        return (1, channels, *(side if isinstance(side, list | tuple) else (side, side))) if side else None
    if source.startswith("timm:"):
        config = getattr(model, "pretrained_cfg", None)
        size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        return (1, *size) if size else None
    return None


def setting(value: Any) -> str:
    """A setting of a plan as text for a terminal, quoted for a shell."""
    from lbyl.runtime.settings import printed

    return printed(value, lambda plain: shlex.quote(plain) if isinstance(plain, str) else repr(plain))
