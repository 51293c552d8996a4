"""Cutting tensors, and putting new ones in their place: nothing else gives a model another weight."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lbyl.errors import SurgeryError
from lbyl.graph import Graph
from lbyl.modes import duplicate, set_modes
from lbyl.selection import Selection


@dataclass(frozen=True)
class Cut:
    """Keep these indices of one dimension of one parameter or buffer.

    With ``blocks > 1`` the dimension is the input of a grouped convolution: ``size`` and ``keep`` count all
    its input channels, of which the parameter stores ``size / blocks`` columns a filter. ``scale`` is what the values
    that stay are multiplied by, to make up for a mean over fewer channels.
    """

    parameter: str
    dim: int
    size: int
    keep: tuple[int, ...]
    blocks: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class Attribute:
    """Set a whole number that a module keeps, or one place in a list of them, to what is left of it.

    A number that is no whole one is the constant that a module adds to a mean over channels.
    """

    module: str
    name: str
    place: int | None
    old: int | float
    new: int | float


_NO_WIDTH = re.compile(
    "window|patch|kernel|stride|pad|dilat|resol|image|img|grid|pool|position|index|depth|seq|bucket|dist|layer|vocab"
    "|head_dim|head_size|dim_head|per_head|key_dim|d_kv|value_groups|n_rep"
)
"""Names of numbers that equal a width by chance: sizes in space, and within heads, which go whole."""


def plan_attributes(model: nn.Module, graph: Graph, selection: Selection) -> tuple[Attribute, ...]:
    """Numbers that modules keep and that views and splits in them go by: heads, widths, split sizes.

    Whichever whole number of such a module equals a size that shrinks is taken for it; verification judges.
    Where two sizes of the same value shrink to different ones, neither is touched.
    """
    index_of = {group.name: index for index, group in enumerate(graph.groups)}
    gone = {(index_of[c.group.name], channel) for c in selection.choices for channel in c.drop}
    wanted: dict[tuple[str, int], set[int]] = defaultdict(set)
    for size in graph.sizes:
        wanted[size.module, size.value].add(size.value - sum(column in gone for column in size.columns))
    shrinking = {key: next(iter(new)) for key, new in wanted.items() if len(new) == 1}
    places = {path for path, _ in shrinking}
    found = []
    for path, module in model.named_modules():
        if path not in places:
            continue
        candidates: dict[int, list[tuple[str, int | None]]] = defaultdict(list)
        for name, value in vars(module).items():
            if _NO_WIDTH.search(name):
                continue
            for place, item in enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]:
                if type(item) is int and shrinking.get((path, item), item) != item:
                    candidates[item].append((name, place))
        for old, names in candidates.items():
            # A number of heads may equal the size of one.
            heads = [(name, place) for name, place in names if "head" in name and "dim" not in name]
            for name, place in heads or names:
                found.append(Attribute(path, name, place, old, shrinking[path, old]))
    return (*found, *_constants(model, selection))


def _constants(model: nn.Module, selection: Selection) -> Iterator[Attribute]:
    """The constants that are added to means over channels, which grow as those means do."""
    for choice in selection.choices:
        for average in choice.group.averages:
            if not average.eps:
                continue
            module = model.get_submodule(average.module)
            names = [name for name, value in vars(module).items() if type(value) is float and value == average.eps]
            if len(names) != 1:
                raise SurgeryError(
                    f"{average.module}: {len(names)} of its attributes hold {average.eps}, which it adds to a mean "
                    "over channels; it would have to be one"
                )
            new = average.eps * choice.group.width / len(choice.keep)
            yield Attribute(average.module, names[0], None, average.eps, new)


def plan_cuts(selection: Selection) -> tuple[Cut, ...]:
    """Every slice that a selection asks for, each parameter's dimension once."""
    stays: dict[tuple[str, int], Any] = {}
    scales: dict[str, float] = {}
    slots = {}
    for choice in selection.choices:
        kept = np.ones(choice.group.width + 1, dtype=bool)  # the last one is for NOT_OURS
        kept[list(choice.drop)] = False
        for slot in (*choice.group.carriers, *choice.group.readers):
            key = slot.parameter, slot.dim
            slots[key] = slot
            here = kept[np.array(slot.channels)]
            stays[key] = here & stays[key] if key in stays else here
        for average in choice.group.averages:
            scales[average.weight] = (choice.group.width / len(choice.keep)) ** average.power
    cuts = []
    for key, slot in slots.items():
        keep = tuple(np.flatnonzero(stays[key]).tolist())
        scale = scales.get(slot.parameter, 1.0)
        cuts.append(Cut(slot.parameter, slot.dim, len(slot.channels), keep, slot.blocks, scale))
    return tuple(cuts)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, non-persistent buffers and tied names among them."""
    modules = list(model.named_modules(remove_duplicate=False))
    # As `named_parameters` and `named_buffers` have them, each of which walks through all modules by itself.
    both = [("_parameters", name, module) for name, module in modules]
    both += [("_buffers", name, module) for name, module in modules]
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for kind, prefix, module in both
        for name, tensor in getattr(module, kind).items()
        if tensor is not None
    }


@torch.no_grad()
def lay_on(model: nn.Module, changes: Mapping[str, Sequence[Callable[[Tensor], object]]]) -> nn.Module:
    """The model itself, once each change was made to the parameter or buffer of its name, in place."""
    state = tensors_of(model)
    for name, those in changes.items():
        for change in those:
            change(state[name])
    return model


def standing_for(model: nn.Module, values: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """New parameters and buffers by the ids of those whose place they take in a copy of the model.

    Raises:
        SurgeryError: a name that the model has not, or a shape that does not fit.
    """
    state = tensors_of(model)
    for name, value in values.items():
        if name not in state:
            raise SurgeryError(f"the model has no parameter or buffer {name!r}")
        if state[name].shape != value.shape:
            raise SurgeryError(f"{name}: the model has {_size(state[name])}, the new value is {_size(value)}")
    return {id(state[name]): _in_place_of(state[name], value) for name, value in values.items()}


def borrowing(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of a model for evaluation that has the model's own parameters, not copies of them, and some new values.

    It is there to be run and to be cut into another copy: nobody may write to its parameters. Buffers are copied, for
    a forward pass may write to these, and so are embeddings that keep their rows below a norm.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    written = {id(table.weight) for table in tables if table.max_norm is not None}
    borrowed = [p for p in model.parameters() if type(p) is nn.Parameter and id(p) not in written]
    twins: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in borrowed}
    return duplicate(model, twins | standing_for(model, values or {})).eval()


def _in_place_of(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def cut(model: nn.Module, cuts: Sequence[Cut], attributes: Sequence[Attribute] = ()) -> nn.Module:
    """Slice parameters and buffers of ``model`` itself, and set the attributes that follow from their sizes.

    Raises:
        SurgeryError: a cut that does not fit the model; it is raised before anything is changed.
    """
    replaced = _sliced(model, cuts)
    for path, module in model.named_modules():
        _replace(path, module, module, replaced)
    _finish(model, attributes)
    return model


def cut_copy(model: nn.Module, cuts: Sequence[Cut], attributes: Sequence[Attribute] = ()) -> nn.Module:
    """A cut copy of a model; what shrinks is never copied whole. The model itself is not changed.

    Raises:
        SurgeryError: a cut that does not fit the model.
    """
    replaced = _sliced(model, cuts)
    twin = duplicate(model, replaced)
    for path, module in model.named_modules():
        _replace(path, module, twin.get_submodule(path), replaced)
    _finish(twin, attributes)
    return twin


def _finish(model: nn.Module, attributes: Sequence[Attribute]) -> None:
    modules = dict(model.named_modules())
    for item in attributes:
        module = modules.get(item.module)
        value = None if module is None else vars(module).get(item.name)
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
            setattr(module, item.name, item.new)
    # Modules that cache what they computed from their weights drop it when their mode is set.
    modes = {module: module.training for module in modules.values()}
    model.train(model.training)
    set_modes(modes)


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
        # Blocks of a grouped convolution are counted over all its rows, so they go before the rows do.
        for item in sorted(items, key=lambda item: item.blocks == 1):
            new = _slice(new, item)  # which is a copy
            if item.scale != 1:
                new = new * item.scale
        new = new.contiguous()
        replaced[id(old)] = _in_place_of(old, new)
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
        _set_attributes(path, target, before)


def _slice(tensor: Tensor, item: Cut) -> Tensor:
    keep = torch.from_numpy(np.array(item.keep, dtype=np.int64))
    if item.blocks == 1:
        return tensor.index_select(item.dim, keep.to(tensor.device))
    width = item.size // item.blocks
    parts = []
    for number, rows in enumerate(tensor.chunk(item.blocks, 0)):
        inside = keep[(keep >= number * width) & (keep < (number + 1) * width)] - number * width
        parts.append(rows.index_select(1, inside.to(tensor.device)))
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
            f"the model has {_size(tensor)}: another architecture?"
        )
    keep = item.keep
    if not keep or keep[0] < 0 or keep[-1] >= item.size or sorted(set(keep)) != list(keep):
        raise SurgeryError(f"{item.parameter}: kept indices must rise within 0..{item.size - 1}, and not be empty")
    if item.blocks > 1:
        counts = [0] * item.blocks
        for index in keep:
            counts[index // stored] += 1
        if len(set(counts)) > 1 or item.dim != 1 or tensor.shape[0] % item.blocks:
            raise SurgeryError(f"{item.parameter}: a grouped convolution must keep equally many channels a block")


def _set_attributes(path: str, module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Widths that a module remembers follow its tensors."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.modules.conv._ConvNd) and "weight" in before:
        assert isinstance(weight, Tensor)
        old, transposed = before["weight"], module.transposed
        if module.groups > 1 and old.shape[1] == 1:  # depthwise: the number of groups is the width
            multiplier = old.shape[0] // module.groups
            if weight.shape[0] % multiplier:
                raise SurgeryError(f"{path}: {weight.shape[0]} filters do not fit a channel multiplier of {multiplier}")
            module.groups = weight.shape[0] // multiplier
        first, second = weight.shape[0], weight.shape[1] * module.groups
        module.in_channels, module.out_channels = (first, second) if transposed else (second, first)
    elif isinstance(module, nn.Linear) and "weight" in before:
        assert isinstance(weight, Tensor)
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding) and isinstance(weight, Tensor):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and isinstance(weight, Tensor):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm) and isinstance(weight, Tensor):
        if module.num_groups > 1:  # groups go as a whole, and a single one gets narrower
            module.num_groups = module.num_groups * len(weight) // module.num_channels
        module.num_channels = len(weight)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len({**module._parameters, **module._buffers}[next(iter(before))])  # pyright: ignore
    else:
        _set_by_value(module, before)


_WIDTHS = (
    "num_channels",
    "num_features",
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "embedding_dim",
)


def _set_by_value(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """For unknown modules: a well-known attribute that held an old width gets the new one."""
    for key, old in before.items():
        new: Any = module._parameters.get(key)
        new = new if new is not None else module._buffers[key]
        for attribute in _WIDTHS:
            value = getattr(module, attribute, None)
            dim = 1 if attribute.startswith("in_") and old.dim() > 1 else 0
            if isinstance(value, int) and value == old.shape[dim] != new.shape[dim]:
                setattr(module, attribute, new.shape[dim])


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
