"""Finds attention whose heads can get fewer channels inside: fused queries, keys and values, and plain products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.intercept import module_hooks


@dataclass(frozen=True)
class Heads:
    """An attention layer whose queries, keys and values are one linear layer, as in timm's vision transformers.

    Attributes:
        path: path of the layer, whose children ``qkv`` and ``proj`` are linear layers.
        count: the number of heads.
        size: the number of channels of each head.
    """

    path: str
    count: int
    size: int


@dataclass(frozen=True)
class HeadActivations:
    """What the heads of one layer compute.

    Attributes:
        queries: the queries.
        keys: the keys.
        mixed: the values, as attention mixes them; these are what the layer ``proj`` reads.
    """

    queries: Float[Tensor, "batch heads tokens channels"]
    keys: Float[Tensor, "batch heads tokens channels"]
    mixed: Float[Tensor, "batch heads tokens channels"]

    @staticmethod
    def of(layer: Any, x: Float[Tensor, "batch tokens width"]) -> HeadActivations:
        """Compute ``softmax(Q K^T / sqrt(size)) V`` of a layer."""
        batch, tokens, _ = x.shape
        q, k, v = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return HeadActivations(q, k, scores.softmax(-1) @ v)


_CLOSE = 1e-3
"""Largest relative difference between what a layer gives and what plain attention gives."""


def find_heads(model: nn.Module, inputs: ExampleInputs) -> tuple[tuple[Heads, ...], dict[str, str]]:
    """Find attention layers whose heads can get smaller, and why others can't.

    A layer counts if its output on the example inputs is that of plain attention: with rotary positions, biases of
    positions, norms or masks, a change of basis of queries and keys would change more than their product.

    Args:
        model: the network; it is not changed.
        inputs: the example inputs.
    """
    found: list[Heads] = []
    others: dict[str, str] = {}
    with undisturbed(model), torch.no_grad():
        work = sharing_copy(model)
        layers = {path: m for path, m in work.named_modules() if _is_fused(m)}
        calls: dict[str, tuple[Any, Any]] = {}
        given: dict[str, Any] = {}

        def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given[path] = args[0].detach().clone() if args and path not in given else None

        def leave(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[path] = given[path], output

        with module_hooks(layers, enter, leave):
            inputs.cloned().call(work)
        for path, (x, output) in calls.items():
            layer: Any = layers[path]
            if not isinstance(x, Tensor) or x.dim() != 3 or not isinstance(output, Tensor):
                others[path] = "it is not called once with tokens"
                continue
            mixed = HeadActivations.of(layer, x).mixed.transpose(1, 2).flatten(2)
            if not _alike(layer.proj(mixed), output):
                others[path] = "it computes more than plain attention: rotary or relative positions, norms, or masks"
                continue
            found.append(Heads(path, layer.num_heads, layer.qkv.out_features // (3 * layer.num_heads)))
    return tuple(found), others


def _is_fused(module: nn.Module) -> bool:
    first, last, heads = (getattr(module, name, None) for name in ("qkv", "proj", "num_heads"))
    if not isinstance(first, nn.Linear) or not isinstance(last, nn.Linear) or type(heads) is not int:
        return False
    return first.out_features == 3 * last.in_features and last.in_features % heads == 0


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).norm()) <= _CLOSE * float(b.norm())
