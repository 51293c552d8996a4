"""Cuts tensors: this is the only place where weights become smaller."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lbyl.errors import SurgeryError
from lbyl.runtime.contexts import set_modes
from lbyl.runtime.copying import copy_model, in_place_of, shape_and_dtype, tensors_of
from lbyl.selection.select import Selection
from lbyl.surgery.attributes import Attribute, attribute_of, set_attribute, set_attributes, turn_off_nested_tensors


@dataclass(frozen=True)
class Cut:
    """The kept indices along one dimension of one parameter or buffer.

    With ``blocks > 1`` the dimension is the input of a grouped convolution, or belongs to the experts of a mixture, of
    which each keeps its own indices: ``size`` and ``keep`` count the channels of all blocks, while each filter or
    expert stores ``size / blocks`` of them. The kept values are multiplied by ``scale``,
    which corrects a mean over fewer channels. With ``experts``, the indices are experts of a mixture, and so the blocks
    that other cuts of the same tensor count.
    """

    parameter: str
    dim: int
    size: int
    keep: tuple[int, ...]
    blocks: int = 1
    scale: float = 1.0
    experts: bool = False


def plan_cuts(selection: Selection) -> tuple[Cut, ...]:
    """The cuts for a selection: one for each dimension of a parameter or buffer."""
    stays: dict[tuple[str, int], Any] = {}
    scales: dict[str, float] = {}
    slots = {}
    for choice in selection.choices:
        kept = np.ones(choice.group.width + 1, dtype=bool)  # the last one is for NOT_OURS
        kept[list(choice.drop)] = False
        for slot in (*choice.group.carriers, *choice.group.consumers):
            key = slot.parameter, slot.dim
            slots[key] = slot
            here = kept[np.array(slot.channels)]
            stays[key] = here & stays[key] if key in stays else here
        for average in choice.group.averages:
            scales[average.weight] = (choice.group.width / len(choice.keep)) ** average.power
    cuts = []
    for key, slot in slots.items():
        keep = tuple(np.flatnonzero(stays[key]).tolist())
        scale = scales.pop(slot.parameter, 1.0)  # once, where two dimensions are cut
        cuts.append(Cut(slot.parameter, slot.dim, len(slot.channels), keep, slot.blocks, scale))
    return tuple(cuts)


def cut(model: nn.Module, cuts: Sequence[Cut], attributes: Sequence[Attribute] = ()) -> nn.Module:
    """Slice parameters and buffers of ``model`` in place, and update attributes that depend on their sizes.

    Raises:
        SurgeryError: a cut does not fit the model; nothing has been changed then.
    """
    replaced = _sliced(model, cuts)
    for path, module in model.named_modules():
        _replace(path, module, module, replaced)
    _finish(model, attributes)
    return model


@torch.no_grad()
def cut_in_place(
    model: nn.Module, cuts: Sequence[Cut], attributes: Sequence[Attribute], values: Mapping[str, Tensor]
) -> None:
    """Cut ``model`` in place as :func:`cut` does, and give some of its tensors these values, by name.

    Raises:
        SurgeryError: a cut does not fit the model; nothing has been changed then.
    """
    state = tensors_of(cut(model, cuts, attributes))
    for name, value in values.items():
        state[name].copy_(value)


def cut_copy(model: nn.Module, cuts: Sequence[Cut], attributes: Sequence[Attribute] = ()) -> nn.Module:
    """A cut copy of a model, which is not changed. Tensors that are cut are never copied as a whole.

    Raises:
        SurgeryError: a cut does not fit the model.
    """
    replaced = _sliced(model, cuts)
    twin = copy_model(model, replaced)
    for path, module in model.named_modules():
        _replace(path, module, twin.get_submodule(path), replaced)
    _finish(twin, attributes)
    return twin


def _finish(model: nn.Module, attributes: Sequence[Attribute]) -> None:
    modules = dict(model.named_modules())
    for item in attributes:
        module = modules.get(item.module)
        value = None if module is None else attribute_of(module, item.name)
        items = list(value) if isinstance(value, (list, tuple)) else []
        found = value if item.place is None else next(iter(items[item.place : item.place + 1]), None)
        # Widths that follow the tensors of their module are set already.
        if module is None or type(found) is not type(item.old) or found not in (item.old, item.new):
            raise SurgeryError(f"{item.module}: no attribute {item.name!r} holds {item.old}: another architecture?")
        if item.place is not None:
            items[item.place] = item.new
            kind: Any = type(value)
            made = kind(*items) if hasattr(value, "_fields") else kind(items)
            setattr(module, item.name, made)
        else:
            set_attribute(module, item.name, item.new)
    # Modules that cache what they computed from their weights drop it when their mode is set.
    modes = {module: module.training for module in modules.values()}
    model.train(model.training)
    set_modes(modes)
    turn_off_nested_tensors(model)


def _sliced(model: nn.Module, cuts: Sequence[Cut]) -> dict[int, Tensor]:
    """The sliced tensors, by the ids of those that they replace."""
    state = tensors_of(model)
    by_name: dict[str, list[Cut]] = defaultdict(list)
    for item in cuts:
        _check(item, state)
        if any(item.dim == other.dim for other in by_name[item.parameter]):
            raise SurgeryError(f"{item.parameter}: dimension {item.dim} is cut twice")
        by_name[item.parameter].append(item)
    replaced: dict[int, Tensor] = {}
    for name, items in by_name.items():
        old = state[name]
        new = old.detach()
        # Blocks of a grouped convolution are counted over all its rows, so columns are cut before rows.
        for item in sorted(items, key=lambda item: item.blocks == 1):
            new = _slice(new, item)  # which is a copy
            if item.scale != 1:
                new = new * item.scale
        new = new.contiguous()
        replaced[id(old)] = in_place_of(old, new)
    return replaced


def _replace(path: str, module: nn.Module, target: nn.Module, replaced: Mapping[int, Tensor]) -> None:
    """Put the sliced versions of a module's tensors into ``target``, with the attributes that follow."""
    before: dict[str, Tensor] = {}
    for name in ("_parameters", "_buffers"):
        for key, tensor in getattr(module, name).items():
            if tensor is not None and id(tensor) in replaced:
                before[key] = tensor
                getattr(target, name)[key] = replaced[id(tensor)]
    if before:
        set_attributes(path, target, before)


def _slice(tensor: Tensor, item: Cut) -> Tensor:
    keep = torch.from_numpy(np.array(item.keep, dtype=np.int64))
    if item.blocks == 1:
        return tensor.index_select(item.dim, keep.to(tensor.device))
    width = item.size // item.blocks
    parts = []
    for number, rows in enumerate(tensor.chunk(item.blocks, 0)):
        inside = keep[(keep >= number * width) & (keep < (number + 1) * width)] - number * width
        parts.append(rows.index_select(item.dim, inside.to(tensor.device)))
    return torch.cat(parts)


def _check(item: Cut, state: Mapping[str, Tensor]) -> None:
    tensor = state.get(item.parameter)
    if tensor is None:
        raise SurgeryError(f"the model has no parameter or buffer {item.parameter!r}: another architecture?")
    stored = item.size // item.blocks if item.blocks else 0
    fits = item.blocks >= 1 and stored * item.blocks == item.size
    if not fits or not 0 <= item.dim < tensor.dim() or tensor.shape[item.dim] != stored:
        raise SurgeryError(
            f"{item.parameter}: the cut expects {item.size} channels in dimension {item.dim}, "
            f"the model has {shape_and_dtype(tensor)}: another architecture?"
        )
    keep = item.keep
    if not keep or keep[0] < 0 or keep[-1] >= item.size or sorted(set(keep)) != list(keep):
        raise SurgeryError(f"{item.parameter}: kept indices must rise within 0..{item.size - 1}, and not be empty")
    if item.blocks > 1:
        counts = Counter(index // stored for index in keep)
        even = len(counts) == item.blocks and len(set(counts.values())) == 1
        if not even or item.dim < 1 or tensor.shape[0] % item.blocks:
            raise SurgeryError(
                f"{item.parameter}: grouped convolutions and experts must keep equally many channels in each block"
            )
