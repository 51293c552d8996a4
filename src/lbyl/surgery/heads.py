"""Cuts the inside of heads, of which the first channels or some rotated pairs stay, and verifies what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lbyl.errors import VerificationError
from lbyl.graph.heads import FREQUENCIES, SCALES, SIZES, Heads, Pairs
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.surgery.attributes import Attribute
from lbyl.surgery.cuts import Cut
from lbyl.surgery.verification import allowed_difference, difference


def plan_heads(model: nn.Module, layers: Sequence[Heads], size: int, pairs: Pairs) -> tuple[Cut, ...]:
    """The cuts after which each head has ``size`` channels: its first ones, or the pairs that stay of rotated ones."""
    cuts = []
    for each in layers:
        layer, first, turned = model.get_submodule(each.path), range(size), each.turned(size, pairs)
        kept = (each.count, turned), (each.groups, turned), (each.groups, first)
        wanted = dict(zip(each.parts, kept, strict=True))
        if each.fused:
            wanted = {each.parts[0]: (3 * each.count, first)}
        for part, (heads, channels) in wanted.items():
            rows = tuple(head * each.size + channel for head in range(heads) for channel in channels)
            names = [f"{part}.{name}" for name, _ in layer.get_submodule(part).named_parameters()]
            cuts += [Cut(f"{each.path}.{name}", 0, heads * each.size, rows) for name in names]
        columns = tuple(head * each.size + channel for head in range(each.count) for channel in first)
        cuts.append(Cut(f"{each.path}.{each.out}.weight", 1, each.count * each.size, columns))
    for rotary, stay in pairs.items():
        held = model.get_submodule(rotary).named_buffers(rotary, recurse=False)
        cuts += [Cut(name, 0, len(each), stay) for name, each in held if name.rpartition(".")[2] in FREQUENCIES]
    return tuple(cuts)


_WIDTHS = ("attn_dim", "all_head_size", "inner_dim")
"""How code calls the width of all heads together."""


def head_attributes(model: nn.Module, layers: Sequence[Heads], size: int) -> tuple[Attribute, ...]:
    """The changed numbers: sizes of heads, of all together, and the scale of their products if it follows from them."""
    found: list[Attribute] = []
    for each in layers:
        own = vars(model.get_submodule(each.path))
        found += [Attribute(each.path, name, None, each.size, size) for name in SIZES if own.get(name) == each.size]
        whole = each.count * each.size
        found += [
            Attribute(each.path, name, None, whole, each.count * size) for name in _WIDTHS if own.get(name) == whole
        ]
        scales = [name for name in SCALES if isinstance(own.get(name), float)] if not each.scale else []
        found += [Attribute(each.path, name, None, own[name], size**-0.5) for name in scales]
    return tuple(found)


def rescaled(values: Mapping[str, Tensor], layers: Sequence[Heads], size: int) -> dict[str, Tensor]:
    """The same values with queries that make up for the other scale of products: ``sqrt(size / size before)``."""
    new = dict(values)
    for each in layers:
        if each.scale:
            continue
        for name in (f"{each.path}.{each.parts[0]}.weight", f"{each.path}.{each.parts[0]}.bias"):
            if name in new:
                factor = torch.ones(len(new[name]), dtype=torch.float64)
                factor[: each.count * each.size] = (size / each.size) ** 0.5
                shape = [-1] + [1] * (new[name].dim() - 1)
                new[name] = (new[name].double() * factor.to(new[name].device).view(shape)).to(new[name].dtype)
    return new


def verify_heads(masked: nn.Module, smaller: nn.Module, inputs: ExampleInputs) -> float:
    """Compare a network with smaller heads with the whole one that has zeros in place of the channels that are gone.

    Args:
        masked: the whole network with these zeros.
        smaller: the network with smaller heads.
        inputs: the example inputs.

    Returns:
        The largest relative difference of an output.

    Raises:
        VerificationError: the smaller network computes something else.
    """
    with undisturbed(masked), undisturbed(smaller), torch.no_grad():
        expected, found = (output_tensors(inputs.cloned().call(network)) for network in (masked, smaller))
    worst = difference(expected, found)
    if not worst <= allowed_difference(expected):
        raise VerificationError(
            f"with smaller heads the network computes something else than with zeros in them (relative difference "
            f"{worst:.1e}); leave out head_dim (--head-dim)"
        )
    return worst
