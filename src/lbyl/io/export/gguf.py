"""The format GGUF of llama.cpp, for folders of language models in the form of Llama; written with the package gguf."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from lbyl.errors import ExportError, InputError
from lbyl.io.export.gguf_vocabulary import add_vocabulary
from lbyl.io.shards import FLOATING, Shards
from lbyl.runtime.documents import read_as, read_json
from lbyl.surgery.plan import of_huggingface

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""The architecture of llama.cpp for each type of model of transformers."""

_UNEVEN = "deci"
"""The architecture of llama.cpp that computes what "llama" does, and takes other widths in each layer."""

_PERMUTED = ("llama", _UNEVEN)
"""Architectures that rotate neighboring channels of a head, where transformers rotates the halves of a head."""


_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")

Count = Annotated[int, msgspec.Meta(gt=0, lt=2**31)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


@dataclass(frozen=True)
class _Kind:
    """The kind of a model, as its configuration says it."""

    model_type: str | None = None


@dataclass(frozen=True)
class _Config:
    """The fields of a configuration of these kinds that are read."""

    hidden_size: Count
    num_attention_heads: Count
    max_position_embeddings: Count
    rms_norm_eps: Positive
    head_dim: Count | None = None
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool | None = None
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Rope:
    """Rotary positions."""

    rope_theta: Positive


@dataclass(frozen=True)
class _LinearRope(_Rope):
    """Rotary positions that are all divided by a factor."""

    factor: Positive


@dataclass(frozen=True)
class _Llama3Rope(_LinearRope):
    """Rotary positions of Llama 3."""

    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Count


@dataclass(frozen=True)
class _FactorRope(_Rope):
    """Rotary positions that are each divided by a factor of their own."""

    short_factor: list[Positive]
    long_factor: list[Positive]
    attention_factor: Positive | None = None


_ROPES = {"default": _Rope, "linear": _LinearRope, "llama3": _Llama3Rope, "longrope": _FactorRope}
"""What is read of each type of rotary positions."""


@dataclass(frozen=True)
class _Layout:
    """Sizes of a model, read from its tensors: layers may differ.

    Attributes:
        head: channels of a head.
        heads: query heads of each layer.
        groups: key and value heads of each layer.
        neurons: hidden neurons of each layer.
    """

    head: int
    heads: tuple[int, ...]
    groups: tuple[int, ...]
    neurons: tuple[int, ...]

    @staticmethod
    def of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> _Layout:
        """The sizes of the tensors in a folder.

        Raises:
            ExportError: a layer has no attention or no feed-forward part, which llama.cpp needs.
        """
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        numbers = [int(found[1]) for name in shapes if (found := _LAYER.match(name))]
        if not numbers:
            raise ExportError(f"{folder} has no decoder layers; gguf takes folders of language models of transformers")
        count = 1 + max(numbers)
        if head < 2 or head % 2:
            raise ExportError(f"gguf: heads of {head} channels can't be rotated; head_dim in config.json is even")

        def rows(name: str) -> tuple[int, ...]:
            names = [f"model.layers.{index}.{name}.weight" for index in range(count)]
            for each in names:
                if len(shapes.get(each, ())) != 2:
                    raise ExportError(
                        f"{folder} has no {each}: GGUF holds no layer of this kind without it. Drop whole layers or "
                        "none, or export another format"
                    )
            return tuple(shapes[each][0] for each in names)

        heads, groups = ([size // head for size in rows(f"self_attn.{name}_proj")] for name in ("q", "k"))
        layout = _Layout(head, tuple(heads), tuple(groups), rows("mlp.gate_proj"))
        for name, shape in layout.shapes(config, shapes):
            if name not in shapes:
                raise ExportError(f"{folder} has no {name}, which every model of this kind has")
            if shapes[name] != shape:
                sizes = ("x".join(map(str, found)) for found in (shapes[name], shape))
                raise ExportError("{}: {} is {}, but must be {} here".format(folder, name, *sizes))
        return layout

    def shapes(
        self, config: Mapping[str, Any], found: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The shapes of all tensors that every model has."""
        hidden, rows = config["hidden_size"], found.get("model.embed_tokens.weight", (0,))[0]
        yield "model.embed_tokens.weight", (rows, hidden)
        yield "model.norm.weight", (hidden,)
        if not config.get("tie_word_embeddings"):
            yield "lm_head.weight", (rows, hidden)
        for index, sizes in enumerate(zip(self.heads, self.groups, self.neurons, strict=True)):
            start, (q, k, n) = f"model.layers.{index}", (sizes[0] * self.head, sizes[1] * self.head, sizes[2])
            for name, shape in (
                ("self_attn.q_proj", (q, hidden)),
                ("self_attn.k_proj", (k, hidden)),
                ("self_attn.v_proj", (k, hidden)),
                ("self_attn.o_proj", (hidden, q)),
                ("mlp.gate_proj", (n, hidden)),
                ("mlp.up_proj", (n, hidden)),
                ("mlp.down_proj", (hidden, n)),
                ("input_layernorm", (hidden,)),
                ("post_attention_layernorm", (hidden,)),
            ):
                yield f"{start}.{name}.weight", shape

    @property
    def even(self) -> bool:
        """Whether all layers have the same sizes."""
        return all(len(set(sizes)) == 1 for sizes in (self.heads, self.groups, self.neurons))


class GgufFormat:
    """One file with weights, vocabulary and chat template, for llama.cpp and what is built on it."""

    name = "gguf"
    runtime = "gguf.GGUFReader"

    def check_available(self) -> None:
        """Raise InputError if the package gguf is missing."""
        _package()

    def write_folder(self, folder: Path, file: Path) -> str:
        """Write a folder's model as one file, and compare the file's tensors with the folder's.

        Returns:
            A note about what the file can't say; "" if there is none.

        Raises:
            InputError: the folder is incomplete or damaged.
            ExportError: llama.cpp has no place for something in the model or in its tokenizer.
        """
        config, stored = _config(folder), Shards.of(folder)
        shapes = _shapes(stored)
        layout = _Layout.of(config, shapes, folder)
        architecture = _architecture(config, layout)
        gguf = _package()
        writer = gguf.GGUFWriter(None, architecture)
        note = _add_sizes(writer, config, layout)
        writer.add_name(folder.resolve().name)
        add_vocabulary(writer, gguf, folder, shapes["model.embed_tokens.weight"][0])
        tensors = _Tensors(gguf, config, stored, layout, architecture)
        writer.add_file_type(tensors.file_type())
        for name, array, kind in tensors:
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, kind)
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, array, _ in tensors:
            writer.write_tensor_data(array)
        writer.close()
        _check(gguf, file, tensors)
        return note


def _shapes(stored: Shards) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, which must be floating-point numbers."""
    found = stored.headers(stored.files)
    for name, (_, kind) in found.items():
        if kind not in FLOATING:
            raise ExportError(f"gguf: {name} is of type {kind}; pass the folder of the weights before quantization")
    return {name: shape for name, (shape, _) in found.items()}


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise InputError(f"gguf can't be imported ({error}); install lbyl[gguf]") from error


def _config(folder: Path) -> dict[str, Any]:
    """The configuration of a model; that of the unpruned one where no configuration says the widths.

    Raises:
        InputError: there is none.
        ExportError: its computations are not those of a model in the form of Llama.
    """
    place = folder / "config.json"
    if not place.is_file() and (folder / "lbyl.json").is_file():
        source = str(read_json(folder / "lbyl.json").get("plan", {}).get("source") or "")
        place = Path((of_huggingface(source) or (source, None))[0]) / "config.json"
    if not place.is_file():
        raise InputError(f"{folder} has no config.json; gguf takes folders of language models of transformers")
    config = read_json(place)
    kind = read_as(_Kind, config, str(place)).model_type
    if kind not in _ARCHITECTURES:
        raise ExportError(f"gguf: models of type {kind!r} are not supported; {', '.join(_ARCHITECTURES)} are")
    read_as(_Config, config, str(place))
    if config.get("hidden_act", "silu") != "silu":
        raise ExportError(f"gguf: the activation is {config['hidden_act']!r}, but llama.cpp computes silu here")
    return config


def _architecture(config: Mapping[str, Any], layout: _Layout) -> str:
    """The architecture that can hold the widths."""
    name = _ARCHITECTURES[config["model_type"]]
    if layout.even:
        return name
    if name != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise ExportError(
            f"gguf: layers of this {config['model_type']} model differ in width, and llama.cpp takes one width for all "
            "layers; compress with uniform_layers=True, or with the same ratio for all layers"
        )
    return _UNEVEN


def _add_sizes(writer: Any, config: Mapping[str, Any], layout: _Layout) -> str:
    """Write sizes, norms and rotary positions; a note if the context is shorter in the file."""
    known, note = config["max_position_embeddings"], ""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and window < known:
        known, note = window, f"llama.cpp knows no sliding window here, so the context ends after its {window} tokens"
    writer.add_context_length(known)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(len(layout.heads))
    even = layout.even
    writer.add_feed_forward_length(layout.neurons[0] if even else list(layout.neurons))
    writer.add_head_count(layout.heads[0] if even else list(layout.heads))
    writer.add_head_count_kv(layout.groups[0] if even else list(layout.groups))
    writer.add_key_length(layout.head)
    writer.add_value_length(layout.head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(layout.head)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(_package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind not in _ROPES:
        raise ExportError(f"gguf: rotary positions of type {kind!r} are not supported; {', '.join(_ROPES)} are")
    return note


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of rotary positions, which older configurations have in two places."""
    found = {"rope_theta": config.get("rope_theta") or 10000.0}
    found |= config.get("rope_scaling") or {}
    found |= config.get("rope_parameters") or {}
    found = {**found, "rope_type": found.get("rope_type", found.get("type", "default"))}
    if isinstance(kind := found["rope_type"], str) and kind in _ROPES:
        read_as(_ROPES[kind], found, "config.json, rotary positions")
    if kind == "llama3" and not found["low_freq_factor"] < found["high_freq_factor"]:
        raise ExportError("gguf: in config.json, low_freq_factor must be below high_freq_factor")
    if kind == "longrope" and (found["short_factor"] != found["long_factor"] or found.get("attention_factor") != 1):
        # Smaller heads have equal ones: they say which frequencies are left.
        raise ExportError(
            "gguf: rotary positions of type 'longrope' need equal short_factor and long_factor, and an "
            "attention_factor of 1, in config.json"
        )
    return found


def _rope_factors(rope: Mapping[str, Any], head: int) -> Tensor | None:
    """What llama.cpp divides each frequency by, in Llama 3 and where heads lost some frequencies; None elsewhere.

    Source: Grattafiori et al. 2024, "The Llama 3 Herd of Models" (arXiv 2407.21783), as transformers computes it.
    """
    if rope["rope_type"] == "longrope":
        if len(rope["short_factor"]) != head // 2:
            raise ExportError(
                f"gguf: in config.json, short_factor needs {head // 2} numbers for heads of {head} channels"
            )
        return torch.tensor(rope["short_factor"], dtype=torch.float32)
    if rope["rope_type"] != "llama3":
        return None
    low, high, whole = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for channel in range(0, head, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (channel / head)
        smooth = min(1.0, max(0.0, (whole / length - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(factors, dtype=torch.float32)


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a file in their order: name, content and type. One is in memory at a time."""

    gguf: Any
    config: Mapping[str, Any]
    stored: Shards
    layout: _Layout
    architecture: str

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, Any]]:
        factors = _rope_factors(_rope(self.config), self.layout.head)
        if factors is not None:
            yield "rope_freqs.weight", factors.numpy(), None
        kinds = {kind: number for number, kind in self.gguf.MODEL_ARCH_NAMES.items()}
        names = self.gguf.get_tensor_name_map(kinds[self.architecture], len(self.layout.heads))
        for name in sorted(self.stored.files):
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and self._tied()):
                continue
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise ExportError(f"gguf: llama.cpp has no place for {name} in a model of this kind")
            tensor = self.stored.read([name])[name]
            yield known, *self._encoded(self._permuted(name, tensor))

    def _tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings"))

    def _permuted(self, name: str, tensor: Tensor) -> Tensor:
        """Rows of queries and keys in the order that llama.cpp rotates: pairs (i, i + d/2) become neighbors."""
        layer = name.rpartition(".self_attn.")
        if self.architecture not in _PERMUTED or not layer[2].startswith(("q_proj", "k_proj")):
            return tensor
        rows = tensor.reshape(-1, 2, self.layout.head // 2, *tensor.shape[1:])
        return rows.transpose(1, 2).reshape(tensor.shape).contiguous()

    def _encoded(self, tensor: Tensor) -> tuple[np.ndarray, Any]:
        """Content and type: vectors in float32, matrices in their own precision."""
        if tensor.dim() == 1 or tensor.dtype == torch.float64:
            tensor = tensor.float()
        if tensor.dtype != torch.bfloat16:
            return tensor.numpy(), None
        return tensor.contiguous().view(torch.uint8).numpy(), self.gguf.GGMLQuantizationType.BF16

    def file_type(self) -> Any:
        """The type of the matrices, by the embedding."""
        kinds = {torch.bfloat16: "MOSTLY_BF16", torch.float16: "MOSTLY_F16"}
        name = "model.embed_tokens.weight"
        return self.gguf.LlamaFileType[kinds.get(self.stored.read([name])[name].dtype, "ALL_F32")]


def _check(gguf: Any, file: Path, tensors: _Tensors) -> None:
    """Raise ExportError unless the file holds these tensors."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, array, _ in tensors:
        # Bytes are compared, because NaN differs from itself.
        if name not in found or not np.array_equal(_bytes(found.pop(name).data), _bytes(array)):
            raise ExportError(f"{file.name} does not hold {name} as it was written; no file was kept")
    if found:
        raise ExportError(f"{file.name} holds {json.dumps(next(iter(found)))}, which was not written")


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
