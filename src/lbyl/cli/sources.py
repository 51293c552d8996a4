"""Turns options into models, example inputs and images, and settings back into text."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbyl.cli.app import Stage
from lbyl.cli.names import import_plugins, is_factory
from lbyl.cli.settings import Settings
from lbyl.cli.texts import InputSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


def check_output(path: Path) -> None:
    """Refuse a folder that `save` would refuse, before any time is spent."""
    from lbyl.errors import InputError
    from lbyl.io.artifact import check_free

    check_free(path)
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent} is not writable; choose another place for {path.name}")


def load_model(source: str, weights: Path | None, pretrained: bool) -> nn.Module:
    """The model of a source, with its published weights or the ones in a file."""
    from lbyl.errors import InputError
    from lbyl.io.sources import load_source, load_weights

    if weights is not None and not weights.is_file():
        raise InputError(f"no weights at {weights}")
    model = load_source(source, pretrained and weights is None)
    return model if weights is None else load_weights(model, weights)


def example_inputs(source: str, model: nn.Module | None, texts: list[str] | None, seed: int) -> tuple[Tensor, ...]:
    """Seeded inputs of the shapes that ``--input`` gives, or of the source's own."""
    import torch

    from lbyl.errors import InputError
    from lbyl.io.onnx.network import OnnxNetwork

    specs = [InputSpec.parse(text) for text in texts or []]
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, OnnxNetwork):
        return model.example_inputs([spec.shape for spec in specs] or None, generator)
    if not specs:
        shape = _default_shape(source, model)
        if shape is None:
            raise InputError(f"{source} doesn't say what it is called with; pass --input, such as --input 1x3x224x224")
        specs = [InputSpec(shape)]

    def make(spec: InputSpec) -> Tensor:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            return torch.randn(spec.shape, generator=generator).to(dtype)
        # Zero is a valid token, index and mask in every vocabulary; a random number is not.
        return torch.zeros(spec.shape, dtype=dtype)

    return tuple(make(spec) for spec in specs)


def check_images(settings: Settings) -> None:
    """Refuse a folder without images, before any time is spent."""
    if settings.data is not None:
        from lbyl.io.images import find_images

        find_images(settings.data)


@dataclass(frozen=True)
class Prepared:
    """A model, its example inputs, and the arguments of `lbyl.compress` and `lbyl.sweep` that the options give."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    arguments: dict[str, Any]


def prepare(source: str, settings: Settings, stage: Stage) -> Prepared:
    """Run plugins, load the model, and turn the options into arguments."""
    import_plugins(settings.plugin)
    if not is_factory(source):
        settings.check_names()
    model = load_model(source, settings.weights, not settings.no_pretrained)
    settings.check_names()  # the module of a factory may have registered them
    inputs = example_inputs(source, model, settings.input, settings.seed)
    batches = None
    if settings.data is not None:
        stage(f"reading images from {settings.data}")
        batches = _read_batches(settings.data, source, model, inputs[0], settings)
    restorer = settings.restorer(batches, model, inputs)
    stage("tracing")
    arguments: dict[str, Any] = {
        "scope": settings.scope.value,
        "criterion": settings.criterion,
        "seed": settings.seed,
        "verify": not settings.no_verify,
        "strict": settings.strict,
        "submodule": settings.submodule,
        "source": source,
        "progress": stage.follow,
    }
    if restorer is not None:
        arguments["restore"] = restorer
    return Prepared(model, inputs, arguments)


def _read_batches(folder: Path, source: str, model: nn.Module, example: Tensor, settings: Settings) -> list[Tensor]:
    """Batches of the images in a folder, preprocessed as the model expects."""
    from lbyl.io.images import preprocessing, read_images

    sized = bool(settings.input)
    preprocess, mode = preprocessing(source, model, example.shape, sized=sized, mean=settings.mean, std=settings.std)
    return [batch.to(example.dtype) for batch in read_images(folder, preprocess, mode, settings.seed)]


def _default_shape(source: str, model: nn.Module | None) -> tuple[int, ...] | None:
    if source.startswith("torchvision:"):
        return (1, 3, 224, 224)
    if source.startswith("timm:"):
        config = getattr(model, "pretrained_cfg", None)
        size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        return (1, *size) if size else None
    return None


def setting(value: Any) -> str:
    """A settings object as Python would print it."""
    if isinstance(value, Mapping) and "name" in value:
        fields = ", ".join(f"{key}={setting(item)}" for key, item in value.items() if key != "name")
        return f"{value['name']}({fields})"
    return shlex.quote(value) if isinstance(value, str) else repr(value)
