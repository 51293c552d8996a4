"""Finds attention whose heads can get fewer channels inside: plain products, also of rotated queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
        shared: how many heads share one key and one value.
        rotary: the module whose frequencies rotate pairs of channels (i, i + size / 2) of queries and keys by their
            positions; "" where nothing is rotated.
        scale: what products are multiplied by if that does not follow from the size; 0 for ``size ** -0.5``.
    """

    path: str
    count: int
    size: int
    parts: tuple[str, str, str] = ("qkv", "qkv", "qkv")
    out: str = "proj"
    shared: int = 1
    rotary: str = ""
    scale: float = 0.0

    @property
    def fused(self) -> bool:
        """Whether one linear layer makes queries, keys and values."""
        return self.parts[0] == self.parts[1]

    @property
    def groups(self) -> int:
        """The number of keys and values."""
        return self.count // self.shared

    def turned(self, size: int, pairs: Pairs) -> tuple[int, ...]:
        """The channels of queries and keys that stay: the first ``size``, or both of each pair that is rotated."""
        if not self.rotary:
            return tuple(range(size))
        return tuple(pair + half for half in (0, self.size // 2) for pair in pairs[self.rotary])


Pairs = dict[str, tuple[int, ...]]
"""The pairs of channels of queries and keys that stay, by the module that rotates them: i is i and i + size / 2."""


@dataclass(frozen=True)
class Call:
    """What an attention layer is called with.

    Attributes:
        x: the tokens, ``(batch, tokens, width)``.
        turns: cosines and sines of the angles by which queries and keys are rotated, ``(batch or 1, tokens, size)``.
        mask: what is added to the products, or, if boolean, which of them count, ``(batch, heads or 1, tokens, keys)``.
        causal: whether each token sees only those before it, if there is no mask.
    """

    x: Tensor
    turns: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    causal: bool = False

    @staticmethod
    def of(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """The call of a layer: its first tensor with three axes, a pair of such tensors, and a mask with four.

        None if there are no tokens.
        """
        given = (*args, *kwargs.values())
        x = next((value for value in given if isinstance(value, Tensor) and value.dim() == 3), None)
        if x is None:
            return None
        turns = next(((pair[0], pair[1]) for pair in given if isinstance(pair, (tuple, list)) and _is_pair(pair)), None)
        mask = next((value for value in given if isinstance(value, Tensor) and value.dim() == 4), None)
        return Call(x, turns, mask, vars(layer).get("is_causal") is True)

    def copied(self) -> Call:
        """The same with tensors of its own."""
        turns = self.turns and (self.turns[0].detach().clone(), self.turns[1].detach().clone())
        mask = None if self.mask is None else self.mask.detach().clone()
        return Call(self.x.detach().clone(), turns, mask, self.causal)


def _is_pair(pair: Any) -> bool:
    tensors = len(pair) == 2 and all(isinstance(each, Tensor) and each.dim() == 3 for each in pair)
    return tensors and pair[0].shape == pair[1].shape


@dataclass(frozen=True)
class HeadActivations:
    """What the heads of one layer compute.

    Attributes:
        queries: the queries, rotated if the layer rotates them.
        keys: the keys, rotated likewise; those that heads share are repeated.
        mixed: the values, as attention mixes them; these are what the layer after it reads.
    """

    queries: Float[Tensor, "batch heads tokens channels"]
    keys: Float[Tensor, "batch heads tokens channels"]
    mixed: Float[Tensor, "batch heads tokens channels"]

    @staticmethod
    def of(heads: Heads, layer: nn.Module, call: Call) -> HeadActivations:
        """Compute ``softmax(scale Q K^T) V`` of a layer."""
        batch, tokens, _ = call.x.shape
        made = [layer.get_submodule(part)(call.x) for part in (heads.parts[:1] if heads.fused else heads.parts)]
        parts = made[0].chunk(3, -1) if heads.fused else made
        q, k, v = (part.reshape(batch, tokens, -1, heads.size).transpose(1, 2) for part in parts)
        k, v = (part.repeat_interleave(heads.shared, 1) for part in (k, v))
        if call.turns is not None:
            q, k = (_rotated(part, *call.turns) for part in (q, k))
        scores = q @ k.transpose(-2, -1) * (heads.scale or heads.size**-0.5)
        return HeadActivations(q, k, _masked(scores, call).softmax(-1).to(v.dtype) @ v)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosines.unsqueeze(1) + torch.cat([-second, first], -1) * sines.unsqueeze(1)


def _masked(scores: Tensor, call: Call) -> Tensor:
    mask = call.mask
    if mask is None:
        if not call.causal:
            return scores
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask.clamp(min=lowest)


_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("to_q", "to_k", "to_v"), ("q", "k", "v"),
    ("wq", "wk", "wv"), ("W_q", "W_k", "W_v"), ("q_lin", "k_lin", "v_lin"), ("query_proj", "key_proj", "value_proj"),
)  # fmt: skip
_OUT = ("proj", "o_proj", "out_proj", "out", "to_out", "o", "wo", "W_o", "out_lin", "dense", "proj_out")
SIZES = ("head_dim", "head_size", "attention_head_size", "dim_head")
_COUNT = ("num_heads", "num_attention_heads", "n_heads", "heads", "n_head", "nhead")
SCALES = ("scale", "scaling")
FREQUENCIES = ("inv_freq", "original_inv_freq")
"""How known code calls the layers of attention, the size and number of heads, their scale, and rotary frequencies."""
_CHANGING = ("dynamic", "longrope")
"""Kinds of rotary positions whose frequencies are computed again in each call."""
_CLOSE = 1e-3
"""Largest relative difference between what a layer gives and what plain attention gives."""


def find_heads(model: nn.Module, inputs: ExampleInputs) -> tuple[tuple[Heads, ...], dict[str, str]]:
    """Find attention layers whose heads can get smaller, and why others can't.

    A layer counts if its children have names by which they are known, and if its output on the example inputs is that
    of attention: with biases of positions or norms, a change of basis of queries and keys would change more than their
    product.

    Args:
        model: the network; it is not changed.
        inputs: the example inputs.
    """
    found: list[Heads] = []
    others: dict[str, str] = {}
    with undisturbed(model), torch.no_grad():
        work = sharing_copy(model)
        layers = {path: heads for path, m in work.named_modules() if (heads := _described(path, m))}
        given: dict[str, Call | None] = {}
        calls: dict[str, tuple[Call | None, Tensor | None]] = {}

        def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            call = Call.of(module, args, kwargs) if path not in given else None
            given[path] = call and call.copied()

        def leave(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[path] = given[path], next(iter(output_tensors(output)), None)

        with module_hooks({path: work.get_submodule(path) for path in layers}, enter, leave):
            inputs.cloned().call(work)
        rotaries: dict[int, list[str]] = {}
        for path, frequencies in rotaries_of(work):
            rotaries.setdefault(2 * len(frequencies), []).append(path)
        for path, (call, output) in calls.items():
            layer, heads = work.get_submodule(path), layers[path]
            if call is None or output is None:
                others[path] = "it is not called once with tokens"
            elif why := _beyond(heads, layer, call, output):
                others[path] = why
            elif call.turns is None:
                found.append(heads)
            elif len(here := rotaries.get(heads.size, [])) != 1:
                others[path] = f"{len(here)} modules hold frequencies ({FREQUENCIES[0]}) of its rotary positions"
            elif (kind := vars(work.get_submodule(here[0])).get("rope_type")) in _CHANGING:
                others[path] = f"the frequencies of its rotary positions change with the length of texts ({kind})"
            else:
                found.append(replace(heads, rotary=here[0]))
    return tuple(found), others


def _beyond(heads: Heads, layer: nn.Module, call: Call, output: Tensor) -> str:
    """What a layer computes that smaller heads would not; "" if there is nothing."""
    if call.turns is not None and (heads.fused or call.turns[0].shape[-1] != heads.size or heads.size % 2):
        return "its rotary positions rotate a part of each head only, or one layer makes queries, keys and values"
    try:
        mixed = HeadActivations.of(heads, layer, call).mixed.transpose(1, 2).flatten(2)
    except RuntimeError:  # keys of other tokens, or a mask of another kind
        return "it computes more than plain attention: its keys or its mask have other sizes"
    if not _alike(layer.get_submodule(heads.out)(mixed), output):
        return "it computes more than plain attention: relative positions, norms, other rotations, or other scales"
    if not any(vars(layer).get(name) == heads.size for name in SIZES):
        return f"it holds no size of its heads ({SIZES[0]}) that could change"
    return ""


def rotaries_of(model: nn.Module) -> Iterator[tuple[str, Float[Tensor, " pairs"]]]:
    """The paths of the modules that hold rotary frequencies, with these: one for each pair of channels."""
    for path, module in model.named_modules():
        frequencies = dict(module.named_buffers(recurse=False)).get(FREQUENCIES[0])
        if frequencies is not None and frequencies.dim() == 1:
            yield path, frequencies


def _described(path: str, module: nn.Module) -> Heads | None:
    """The attention layer that a module is, by the names and sizes of its children; None if it is none."""
    children = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    out = next((name for name in _OUT if name in children), None)
    if out is None:
        return None
    width = children[out].in_features
    count = _count(module, width)
    if not count:
        return None
    size = width // count
    scale = next((scale for name in SCALES if isinstance(scale := vars(module).get(name), float)), 0.0)
    scale = 0.0 if abs(scale * size**0.5 - 1) < 1e-6 else scale
    if "qkv" in children and children["qkv"].out_features == 3 * width:
        return Heads(path, count, size, out=out, scale=scale)
    for parts in _SEPARATE:
        if all(part in children for part in parts):
            q, k, v = (children[part].out_features for part in parts)
            if q == width and k == v and k % size == 0 and width % k == 0:
                return Heads(path, count, size, parts, out, width // k, scale=scale)
    return None


def _count(module: nn.Module, width: int) -> int:
    """The number of heads: what the layer's own size of them makes, or as it or its configuration says; 0 if unknown.

    A layer that lost some heads has fewer than its configuration says.
    """
    size = next((size for name in SIZES if type(size := vars(module).get(name)) is int and size > 0), 0)
    if size and width % size == 0:
        return width // size
    holders = (module, getattr(module, "config", None))
    numbers = (getattr(holder, name, None) for holder in holders for name in _COUNT)
    count = next((number for number in numbers if type(number) is int and number > 0), 0)
    return count if count and width % count == 0 else 0


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).norm()) <= _CLOSE * float(b.norm())
