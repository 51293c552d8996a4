"""Finds attention whose heads can get fewer channels inside: those that compute plain products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.intercept import module_hooks


@dataclass(frozen=True)
class Heads:
    """An attention layer whose queries, keys and values are made by linear layers: by one, or by three.

    Attributes:
        path: path of the layer, whose children are these linear layers.
        count: the number of heads.
        size: the number of channels of each head.
        parts: names of the children that make queries, keys and values; three times the same one if that makes all of
            them, one after the other, as in timm's vision transformers.
        out: name of the child that reads what the heads give.
    """

    path: str
    count: int
    size: int
    parts: tuple[str, str, str] = ("qkv", "qkv", "qkv")
    out: str = "proj"

    @property
    def fused(self) -> bool:
        """Whether one linear layer makes queries, keys and values."""
        return self.parts[0] == self.parts[1]


@dataclass(frozen=True)
class HeadActivations:
    """What the heads of one layer compute.

    Attributes:
        queries: the queries.
        keys: the keys.
        mixed: the values, as attention mixes them; these are what the layer after it reads.
    """

    queries: Float[Tensor, "batch heads tokens channels"]
    keys: Float[Tensor, "batch heads tokens channels"]
    mixed: Float[Tensor, "batch heads tokens channels"]

    @staticmethod
    def of(heads: Heads, layer: nn.Module, x: Float[Tensor, "batch tokens width"]) -> HeadActivations:
        """Compute ``softmax(Q K^T / sqrt(size)) V`` of a layer."""
        batch, tokens, _ = x.shape
        made = [layer.get_submodule(part)(x) for part in (heads.parts[:1] if heads.fused else heads.parts)]
        shape = (batch, tokens, 3, heads.count, heads.size)
        q, k, v = torch.cat(made, -1).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return HeadActivations(q, k, scores.softmax(-1) @ v)


def tokens_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tokens that an attention layer is called with: the first tensor with three axes."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() == 3), None)


_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("to_q", "to_k", "to_v"), ("q", "k", "v"),
    ("wq", "wk", "wv"), ("W_q", "W_k", "W_v"), ("q_lin", "k_lin", "v_lin"), ("query_proj", "key_proj", "value_proj"),
)  # fmt: skip
_OUT = ("proj", "o_proj", "out_proj", "out", "to_out", "o", "wo", "W_o", "out_lin", "dense", "proj_out")
SIZES = ("head_dim", "head_size", "attention_head_size", "dim_head")
_COUNT = ("num_heads", "num_attention_heads", "n_heads", "heads", "n_head", "nhead")
"""How code that is known calls the layers of attention, and the size and the number of heads."""

_CLOSE = 1e-3
"""Largest relative difference between what a layer gives and what plain attention gives."""


def find_heads(model: nn.Module, inputs: ExampleInputs) -> tuple[tuple[Heads, ...], dict[str, str]]:
    """Find attention layers whose heads can get smaller, and why others can't.

    A layer counts if its children have names by which they are known, and if its output on the example inputs is that
    of plain attention: with rotary positions, biases of positions, norms or masks, a change of basis of queries and
    keys would change more than their product.

    Args:
        model: the network; it is not changed.
        inputs: the example inputs.
    """
    found: list[Heads] = []
    others: dict[str, str] = {}
    with undisturbed(model), torch.no_grad():
        work = sharing_copy(model)
        layers = {path: heads for path, m in work.named_modules() if (heads := _described(path, m))}
        calls: dict[str, tuple[Any, Any]] = {}
        given: dict[str, Any] = {}

        def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = tokens_given(args, kwargs) if path not in given else None
            given[path] = None if x is None else x.detach().clone()

        def leave(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[path] = given[path], next(iter(output_tensors(output)), None)

        with module_hooks({path: work.get_submodule(path) for path in layers}, enter, leave):
            inputs.cloned().call(work)
        for path, (x, output) in calls.items():
            heads, layer = layers[path], work.get_submodule(path)
            if x is None or output is None:
                others[path] = "it is not called once with tokens"
                continue
            mixed = HeadActivations.of(heads, layer, x).mixed.transpose(1, 2).flatten(2)
            if not _alike(layer.get_submodule(heads.out)(mixed), output):
                others[path] = "it computes more than plain attention: rotary or relative positions, norms, or masks"
                continue
            if not any(vars(layer).get(name) == heads.size for name in SIZES):
                others[path] = f"it holds no size of its heads ({SIZES[0]}) that could change"
                continue
            found.append(heads)
    return tuple(found), others


def _described(path: str, module: nn.Module) -> Heads | None:
    """The attention layer that a module is, by the names and sizes of its children; None if it is none."""
    holders = (module, getattr(module, "config", None))
    numbers = (getattr(holder, name, None) for holder in holders for name in _COUNT)
    count = next((number for number in numbers if type(number) is int and number > 0), 0)
    children = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    out = next((name for name in _OUT if name in children), None)
    if not count or out is None or children[out].in_features % count:
        return None
    width = children[out].in_features
    size = width // count
    if "qkv" in children and children["qkv"].out_features == 3 * width:
        return Heads(path, count, size, out=out)
    for parts in _SEPARATE:
        if all(part in children and children[part].out_features == width for part in parts):
            return Heads(path, count, size, parts, out)
    return None


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).norm()) <= _CLOSE * float(b.norm())
