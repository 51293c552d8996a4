"""A language model without weights, from which networks with a single decoder layer are made.

A network of one layer computes masks and positions as the whole model does, and has the same names of layers and
weights. What is done to it is therefore the same, number by number, as what is done to that layer in the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbyl.errors import InputError, first_line
from lbyl.io.huggingface import is_language_model
from lbyl.io.quiet import quiet
from lbyl.io.sources import load_source
from lbyl.runtime.copying import copy_model, in_place_of, tensors_of
from lbyl.runtime.inputs import ExampleInputs

_STACK, _EMBEDDING, _NORM, _ROTARY = "layers", "embed_tokens", "norm", "rotary_emb"
"""The names of the parts of a model in the form of Llama."""


def pattern_names(model: nn.Module) -> list[str]:
    """The names that patterns of a ratio may match."""
    return [name for name, module in model.named_modules() if "weight" in module._parameters]


class LayerNetwork(nn.Module):
    """A model's decoder layers (one of them, or none) without embedding, last norm and output layer."""

    def __init__(self, prefix: str, base: nn.Module) -> None:
        super().__init__()
        self.prefix = prefix
        self.add_module(prefix, base)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The residual stream after the layer, from that before it."""
        base: Any = self.get_submodule(self.prefix)
        return base(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class Skeleton:
    """A causal language model on the meta device, where it takes no memory.

    Attributes:
        model: the model.
        prefix: the name of the part of it that holds the layers.
    """

    model: nn.Module
    prefix: str

    @staticmethod
    def of(folder: Path) -> Skeleton:
        """The model of a folder.

        Raises:
            InputError: the folder can't be read, or the model is not in the form of Llama: embedding, decoder layers,
                last norm, output layer, with nothing else that changes the residual stream.
        """
        with torch.device("meta"), quiet():
            model = load_source(f"hf:{folder}", pretrained=False, task="causal-lm")
        return Skeleton._checked(model, str(folder))

    @staticmethod
    def of_model(model: nn.Module) -> Skeleton:
        """The same for a model in memory, which is not changed.

        Raises:
            InputError: the model is not in the form of Llama.
        """
        if not is_language_model(model):
            raise InputError(f"{type(model).__name__} {_OTHERWISE}")
        nothing = {id(t): in_place_of(t, t.detach().to("meta")) for t in tensors_of(model).values()}
        return Skeleton._checked(copy_model(model, nothing).eval(), type(model).__name__)

    @staticmethod
    def _checked(model: Any, where: str) -> Skeleton:
        """The skeleton, or InputError if the model has another form."""
        if getattr(model.config, "quantization_config", None):
            raise InputError(f"{where} holds quantized weights by its configuration; pass the whole ones")
        prefix = str(getattr(model, "base_model_prefix", ""))
        base: Any = getattr(model, prefix, None)
        name = type(model).__name__
        parts = (_EMBEDDING, _NORM, _ROTARY)
        if not isinstance(base, nn.Module) or not all(isinstance(getattr(base, p, None), nn.Module) for p in parts):
            raise InputError(f"{name} {_OTHERWISE}")
        stack = getattr(base, _STACK, None)
        if isinstance(stack, nn.ModuleList) and not len(stack):
            raise InputError(f"{where}: by its configuration, the model has no layers")
        if not isinstance(stack, nn.ModuleList):
            raise InputError(f"{name} {_OTHERWISE}")
        found = Skeleton(model, prefix)
        for part in (found.base.embed_tokens, found.base.norm, found.base.layers[0]):
            if any(key not in part.state_dict() for key, _ in part.named_buffers()):
                raise InputError(f"{name} {_OTHERWISE}")  # it computes with numbers that are not stored
        found._check()
        return found

    def _check(self) -> None:
        """Raise InputError if the model changes the residual stream elsewhere than in its layers."""
        size = self.model.get_parameter(f"{self.prefix}.{_EMBEDDING}.weight").shape[1]
        stream = torch.randn(1, 4, size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                same = torch.equal(self._network(None, nn.ModuleList())(stream), stream)
        except Exception as error:  # code of other architectures may raise anything
            raise InputError(f"{type(self.model).__name__} {_OTHERWISE} ({first_line(error)})") from error
        if not same:
            raise InputError(f"{type(self.model).__name__} {_OTHERWISE}")

    @property
    def base(self) -> Any:
        """The part that holds the layers."""
        return self.model.get_submodule(self.prefix)

    @property
    def count(self) -> int:
        """The number of decoder layers."""
        return len(self.base.layers)

    def names(self, index: int) -> list[str]:
        """The names of a layer's tensors in the whole model."""
        start = f"{self.prefix}.{_STACK}.{index}."
        return [f"{start}{name}" for name in self.base.layers[index].state_dict()]

    def layer_names(self, index: int) -> list[str]:
        """The names in a layer that patterns of a ratio may match."""
        return [name for name in pattern_names(self.model) if name.startswith(f"{self.prefix}.{_STACK}.{index}.")]

    @property
    def embedding(self) -> list[str]:
        """The names of the embedding's tensors."""
        return [f"{self.prefix}.{_EMBEDDING}.{name}" for name in self.base.embed_tokens.state_dict()]

    def rest(self, stored: Mapping[str, object]) -> list[str]:
        """The names of all other tensors that are stored: last norm, and the output layer unless it is tied."""
        layers = {name for index in range(self.count) for name in self.names(index)}
        others = [name for name in self.model.state_dict() if name not in layers and name not in self.embedding]
        tied = self._tied()
        return [name for name in others if name in stored or name not in tied]

    def all_names(self, stored: Mapping[str, object]) -> list[str]:
        """The names of all tensors that are read, in the order in which they are."""
        layers = (name for index in range(self.count) for name in self.names(index))
        return [*self.embedding, *layers, *self.rest(stored)]

    def _tied(self) -> set[str]:
        """Names of tensors that are other names of the embedding, and need not be stored."""
        config: Any = self.model.config
        return {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set()

    def layer(self, index: int, tensors: Mapping[str, Tensor]) -> LayerNetwork:
        """The network of one layer, with weights by their names in the whole model."""
        start = f"{self.prefix}.{_STACK}.{index}."
        layer = _filled(self.base.layers[index], {n.removeprefix(start): t for n, t in tensors.items()})
        stack = nn.ModuleList()
        stack.add_module(str(index), layer)
        return self._network(index, stack)

    def _network(self, index: int | None, stack: nn.ModuleList) -> LayerNetwork:
        """The model with these layers only."""
        base: Any = copy.copy(self.base)
        base._modules = dict(base._modules)
        config: Any = copy.deepcopy(base.config)
        config.num_hidden_layers = len(stack)
        kinds = getattr(config, "layer_types", None)
        if kinds is not None:
            config.layer_types = [kinds[index]] if index is not None else []
        base.config, base.layers, base.norm = config, stack, nn.Identity()
        del base.embed_tokens
        base.rotary_emb = type(base.rotary_emb)(config=self.base.config)  # its table is computed, not stored
        return LayerNetwork(self.prefix, base).eval()

    def embedded(self, batches: list[ExampleInputs], tensors: Mapping[str, Tensor]) -> list[ExampleInputs]:
        """The residual stream before the first layer."""
        start = f"{self.prefix}.{_EMBEDDING}."
        embedding = _filled(self.base.embed_tokens, {n.removeprefix(start): t for n, t in tensors.items()})
        found = []
        with torch.no_grad():
            for batch in batches:
                kwargs = {"inputs_embeds": embedding(batch.kwargs["input_ids"])}
                if "attention_mask" in batch.kwargs:
                    kwargs["attention_mask"] = batch.kwargs["attention_mask"]
                found.append(ExampleInputs((), kwargs))
        return found

    def head(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Last norm and output layer, from the tensors that are not of a layer."""
        start = f"{self.prefix}.{_NORM}."
        norm = _filled(self.base.norm, {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
        weight = tensors.get("lm_head.weight", tensors.get(f"{self.prefix}.{_EMBEDDING}.weight"))
        assert weight is not None
        output = _filled(self.model.get_submodule("lm_head"), {"weight": weight})
        return nn.Sequential(norm, output).eval()


_OTHERWISE = (
    "is not made of an embedding, decoder layers, a norm and an output layer alone, as Llama, Mistral, Qwen2 and Qwen3 "
    "are, so it can't be compressed layer by layer; lbyl.compress takes it as a whole"
)


def _filled(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module on the meta device, with these tensors in place of its own."""
    made = copy.deepcopy(module)
    made.load_state_dict(dict(tensors), strict=True, assign=True)
    return made.eval()
