"""Attributes of modules that hold a width, and must change when tensors are cut."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lbyl.errors import SurgeryError
from lbyl.graph import Graph, Size
from lbyl.graph.channel_means import attributes_with
from lbyl.graph.numbers import numbers_of_settings
from lbyl.selection.select import Selection
from lbyl.surgery.rearranging import is_rearranging, set_length, shrinking_lengths


@dataclass(frozen=True)
class Attribute:
    """The change of a number that a module stores, or of one item in a list of numbers.

    Whole numbers are widths, and other numbers are constants that a module adds to a mean over channels. A name with a
    dot refers to a number in an object of the module, such as ``config.num_attention_heads``, or in a dictionary of a
    module that rearranges axes, such as ``axes_lengths.h``; the module gets its own copy of that object.
    """

    module: str
    name: str
    place: int | None
    old: int | float
    new: int | float


_NO_WIDTH = re.compile(
    "window|patch|kernel|stride|pad|dilat|resol|image|img|grid|pool|position|(?<!split_)index|depth|seq|bucket|dist"
    "|layer|vocab|step|context|horizon|rotary|rope|head_dim|(?<!all_)head_size|dim_head|per_head|key_dim|d_kv"
    "|value_groups|n_rep"
)
"""Attributes that may equal a width by chance: spatial sizes, and sizes within heads, which are cut as a whole."""


_KNOWN = (nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase)
"""Modules whose numbers follow from their weights (:func:`set_attributes`), also where two of them are equal."""


def plan_attributes(model: nn.Module, graph: Graph, selection: Selection) -> tuple[Attribute, ...]:
    """Find the numbers of modules that their views and splits use: numbers of heads, widths, split sizes.

    Modules may state in ``size_axes`` the axis that each of their ``sizes`` refers to. Otherwise, a whole number of the
    module that equals a size that shrinks is taken to be that size, unless the code only takes so many steps or rows of
    something, and verification checks the result. If two equal sizes shrink to different ones, no attribute is changed.
    """
    index_of = {group.name: index for index, group in enumerate(graph.groups)}
    gone = {(index_of[c.group.name], channel) for c in selection.choices for channel in c.drop}
    wanted: dict[tuple[str, int], set[int]] = defaultdict(set)
    for size in graph.sizes:
        wanted[size.module, size.value].add(size.value - sum(column in gone for column in size.columns))
    shrinking = {key: next(iter(new)) for key, new in wanted.items() if len(new) == 1}
    places = {path for path, _ in wanted}
    found = []
    for path, module in model.named_modules():
        if path not in places or isinstance(module, _KNOWN):
            continue
        axes = getattr(module, "size_axes", None)
        if axes is not None:
            found += _along_axes(path, module, axes, [size for size in graph.sizes if size.module == path], gone)
            continue
        if is_rearranging(module):
            found += _in_pattern(path, module, [size for size in graph.sizes if size.module == path], gone)
            continue
        candidates: dict[int, list[tuple[str, int | None]]] = defaultdict(list)
        for name, value in vars(module).items():
            if _NO_WIDTH.search(name) and not (_PER_KEY.search(name) and _has_one_key(module)):
                continue
            if (path, name) in graph.lengths:
                continue
            for place, item in enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]:
                if type(item) is int and shrinking.get((path, item), item) != item:
                    candidates[item].append((name, place))
        for old, names in candidates.items():
            # A number of heads may equal the size of one.
            heads = [(name, place) for name, place in names if _counts_heads(name) or _PER_KEY.search(name)]
            for name, place in heads or names:
                found.append(Attribute(path, name, place, old, shrinking[path, old]))
        idle = {name: part for name, part in module.named_children() if f"{path}.{name}".lstrip(".") not in places}
        found += _of_children(path, idle, shrinking)
        for name, item in numbers_of_settings(module):
            if shrinking.get((path, item), item) != item and not _NO_WIDTH.search(name.rpartition(".")[2]):
                found.append(Attribute(path, name, None, item, shrinking[path, item]))
    return (*found, *_constants(model, selection))


def _of_children(
    path: str, children: Mapping[str, nn.Module], shrinking: Mapping[tuple[str, int], int]
) -> list[Attribute]:
    """Shapes and numbers of heads that children keep for methods that the module itself calls (relative positions)."""
    found = []
    for child, part in children.items():
        where = f"{path}.{child}".lstrip(".")
        for name, value in vars(part).items():
            shape = "shape" in name and isinstance(value, (list, tuple))
            if not shape and not _counts_heads(name):
                continue
            for place, item in enumerate(value) if shape else [(None, value)]:
                if type(item) is int and shrinking.get((path, item), item) != item:
                    found.append(Attribute(where, name, place, item, shrinking[path, item]))
    return found


_PER_KEY = re.compile("value_groups|n_rep")
"""Attributes with the number of heads that share a key."""


def _has_one_key(module: nn.Module) -> bool:
    """Whether all heads share one key, so that their number is the number of heads that share it."""
    places = (vars(module), vars(vars(module).get("config", nn.Module())))
    keys = (value for place in places for name, value in place.items() if re.search("(kv|value)_heads", name))
    return any(type(value) is int and value == 1 for value in keys)


def _counts_heads(name: str) -> bool:
    return "head" in name and "dim" not in name and "size" not in name


def attribute_of(module: nn.Module, name: str) -> Any:
    """The value of a module's attribute, or of an attribute of its attribute; None if there is none."""
    holder, _, inner = name.rpartition(".")
    if holder == _LENGTHS and is_rearranging(module):
        return vars(module)[_LENGTHS].get(inner)
    value: Any = module
    for part in name.split("."):
        value = getattr(value, "__dict__", {}).get(part)
    return value


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Set the value that :func:`attribute_of` gives. An object that holds it is copied, because it may be shared."""
    holder, _, inner = name.rpartition(".")
    if not holder:
        setattr(module, name, value)
        return
    if holder == _LENGTHS and is_rearranging(module):
        set_length(module, inner, value)
        return
    own = copy.copy(getattr(module, holder))
    setattr(own, inner, value)
    setattr(module, holder, own)


_LENGTHS = "axes_lengths"
"""The attribute in which a module that rearranges axes keeps the lengths of some of them, by name."""


def _in_pattern(
    path: str, module: Any, sizes: Sequence[Size], gone: Collection[tuple[int, int]]
) -> Iterator[Attribute]:
    """The lengths of axes that a module keeps which rearranges them by a pattern."""
    for name, old, new in shrinking_lengths(module, sizes, gone):
        yield Attribute(path, f"{_LENGTHS}.{name}", None, old, new)


def _along_axes(
    path: str, module: Any, axes: Sequence[int], sizes: Sequence[Size], gone: Collection[tuple[int, int]]
) -> Iterator[Attribute]:
    """The numbers of a module that states in ``size_axes`` the axis that each of its ``sizes`` refers to."""
    for place, (old, axis) in enumerate(zip(module.sizes, axes, strict=True)):
        alike = [size for size in sizes if size.value == old and axis % size.rank == size.axis]
        wanted = {size.value - sum(column in gone for column in size.columns) for size in alike}
        if len(wanted) == 1 and wanted != {old}:
            yield Attribute(path, "sizes", place, old, wanted.pop())


def _constants(model: nn.Module, selection: Selection) -> Iterator[Attribute]:
    """The constants that are added to means over channels, which are scaled like these means."""
    for choice in selection.choices:
        for average in choice.group.averages:
            if not average.eps:
                continue
            names = attributes_with(model, average.module, average.eps)
            if len(names) != 1:
                raise SurgeryError(
                    f"{average.module}: {len(names)} of its attributes hold {average.eps}, which it adds to a mean "
                    "over channels, but exactly one must hold it; exclude the groups under this mean"
                )
            new = average.eps * choice.group.width / len(choice.keep)
            yield Attribute(average.module, names[0], None, average.eps, new)


def set_attributes(path: str, module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Update the widths that a module stores to the sizes of its tensors."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.modules.conv._ConvNd) and "weight" in before:
        assert isinstance(weight, Tensor)
        old, transposed = before["weight"], module.transposed
        if transposed and module.groups == old.shape[0]:  # depthwise: the number of groups is the width
            module.groups = weight.shape[0]
        elif not transposed and module.groups > 1 and old.shape[1] == 1:
            multiplier = old.shape[0] // module.groups
            if weight.shape[0] % multiplier:
                raise SurgeryError(f"{path}: {weight.shape[0]} filters do not fit a channel multiplier of {multiplier}")
            module.groups = weight.shape[0] // multiplier
        first, second = weight.shape[0], weight.shape[1] * module.groups
        module.in_channels, module.out_channels = (first, second) if transposed else (second, first)
    elif isinstance(module, nn.Linear) and "weight" in before:
        assert isinstance(weight, Tensor)
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and isinstance(weight, Tensor):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.Bilinear) and isinstance(weight, Tensor):
        module.out_features, module.in1_features, module.in2_features = weight.shape
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and isinstance(weight, Tensor):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm) and isinstance(weight, Tensor):
        if module.num_groups > 1:  # groups are cut as a whole; a single group becomes narrower
            module.num_groups = module.num_groups * len(weight) // module.num_channels
        module.num_channels = len(weight)
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        last = "_l0" if isinstance(module, nn.RNNBase) else ""
        module.input_size = module.get_parameter(f"weight_ih{last}").shape[1]
        module.hidden_size = module.get_parameter(f"weight_hh{last}").shape[1]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len({**module._parameters, **module._buffers}[next(iter(before))])  # pyright: ignore
    elif type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and hasattr(module, "nf"):
        # Of transformers: a linear layer whose weight is stored input first.
        vars(module).update(nx=weight.shape[0], nf=weight.shape[1])
    else:
        _set_by_value(module, before)


def turn_off_nested_tensors(model: nn.Module) -> None:
    """Turn off what leaves out padding in PyTorch's encoders where it does not work: with an odd number of heads.

    PyTorch looks at this number when such an encoder is made, and would fail at its first batch with pads.
    """
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and getattr(encoder, "use_nested_tensor", False):
            heads = (m.num_heads for m in encoder.modules() if isinstance(m, nn.MultiheadAttention))
            encoder.use_nested_tensor = not any(number % 2 for number in heads)


def changed_groups(before: nn.Module, after: nn.Module) -> tuple[Attribute, ...]:
    """The numbers of convolutions whose number of groups a cut has changed.

    They follow from the tensors of a depthwise convolution. But it may have become one by an earlier cut, and then they
    do not follow from those of the unpruned one, from which the plan of both cuts starts.
    """
    modules = dict(after.named_modules())
    return tuple(
        Attribute(path, name, None, getattr(module, name), getattr(twin, name))
        for path, module in before.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd)
        and isinstance(twin := modules.get(path), nn.modules.conv._ConvNd)
        and twin.groups != module.groups
        for name in ("groups", "in_channels", "out_channels")
        if getattr(module, name) != getattr(twin, name)
    )


_WIDTHS = (
    "num_channels",
    "num_features",
    "num_parameters",
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "embedding_dim",
)


def _set_by_value(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """For unknown modules: update well-known attributes that hold an old width."""
    for key, old in before.items():
        new: Any = module._parameters.get(key)
        new = new if new is not None else module._buffers[key]
        for attribute in _WIDTHS:
            value = getattr(module, attribute, None)
            dim = 1 if attribute.startswith("in_") and old.dim() > 1 else 0
            if isinstance(value, int) and value == old.shape[dim] != new.shape[dim]:
                setattr(module, attribute, new.shape[dim])
