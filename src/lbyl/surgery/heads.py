"""Cuts the inside of heads, of which the first channels stay, and verifies what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lbyl.errors import SurgeryError, VerificationError
from lbyl.graph.heads import SIZES, Heads
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.surgery.attributes import Attribute
from lbyl.surgery.cuts import Cut
from lbyl.surgery.verification import allowed_difference, difference


def plan_heads(model: nn.Module, layers: Sequence[Heads], size: int) -> tuple[Cut, ...]:
    """The cuts after which each head has ``size`` channels, its first ones."""
    cuts = []
    for each in layers:
        layer, parts = model.get_submodule(each.path), 3 if each.fused else 1
        rows, columns = (
            tuple(head * each.size + channel for head in range(heads) for channel in range(size))
            for heads in (parts * each.count, each.count)
        )
        for part in dict.fromkeys(each.parts):
            names = [f"{part}.{name}" for name, _ in layer.get_submodule(part).named_parameters()]
            cuts += [Cut(f"{each.path}.{name}", 0, parts * each.count * each.size, rows) for name in names]
        cuts.append(Cut(f"{each.path}.{each.out}.weight", 1, each.count * each.size, columns))
    return tuple(cuts)


_WIDTHS = ("attn_dim", "all_head_size", "inner_dim")
_SCALES = ("scale", "scaling")
"""How code calls the width of all heads together, and the factor of their products."""


def head_attributes(model: nn.Module, layers: Sequence[Heads], size: int) -> tuple[Attribute, ...]:
    """The changed numbers: sizes of heads, of all together, and the scale of their products.

    Raises:
        SurgeryError: a layer scales products in another way.
    """
    found: list[Attribute] = []
    for each in layers:
        own = vars(model.get_submodule(each.path))
        found += [Attribute(each.path, name, None, each.size, size) for name in SIZES if own.get(name) == each.size]
        whole = each.count * each.size
        found += [
            Attribute(each.path, name, None, whole, each.count * size) for name in _WIDTHS if own.get(name) == whole
        ]
        for name in _SCALES:
            if isinstance(scale := own.get(name), float):
                if abs(scale * each.size**0.5 - 1) > 1e-6:
                    raise SurgeryError(f"{each.path} multiplies its products by {scale}, and not by head_dim ** -0.5")
                found.append(Attribute(each.path, name, None, scale, size**-0.5))
    return tuple(found)


def rescaled(values: Mapping[str, Tensor], layers: Sequence[Heads], size: int) -> dict[str, Tensor]:
    """The same values with queries that make up for the other scale of products: ``sqrt(size / size before)``."""
    new = dict(values)
    for each in layers:
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
