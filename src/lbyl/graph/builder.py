"""The mutable state of one trace: rules write to it, and `freeze` turns it into a frozen Graph.

A *shadow* is an integer tensor of the shape of a traced value. It holds the id of the channel that each element belongs
to; ``NOBODY`` stands for no channel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lbyl.graph.pairs import Pairs
from lbyl.graph.program import CODE
from lbyl.graph.types import Depthwise, LayerNorm, Norm, Step
from lbyl.graph.union_find import NOBODY, Ids, compact, small, varies
from lbyl.runtime.reductions import Reduction, aten_name

_LARGEST_FREE_PARAMETER = 4_000_000


@dataclass(frozen=True)
class ParameterRef:
    """A parameter or buffer in the traced program, by name; ``turned`` is a transposed matrix, with its shape."""

    name: str
    shape: tuple[int, ...]
    turned: bool = False


@dataclass
class SlotRecord:
    """A slot while the trace runs: channel ids along one dimension of one parameter."""

    parameter: str
    dim: int
    ids: Tensor
    role: str  # "producer" | "carrier" | "consumer"
    blocks: int = 1


@dataclass
class ProducerRecord:
    """A producer while the trace runs; ``dim`` is its weight's output dimension."""

    layer: str
    weight: str
    bias: str | None
    ids: Tensor
    dim: int = 0
    stages: list[Norm | Depthwise] = field(default_factory=list)


@dataclass
class ConsumerRecord:
    """A consumer while the trace runs; see :class:`lbyl.graph.types.Consumer`."""

    layer: str
    weight: str
    bias: str | None
    op: str
    blocks: int
    calls: int = 1
    dim: int = 1
    experts: int = 0


@dataclass(frozen=True)
class AverageRecord:
    """A mean over channels, and the weight that corrects a cut; see :class:`lbyl.graph.types.Average`."""

    ids: Tensor
    module: str
    eps: float | None
    weight: str
    power: float
    reduction: Reduction | None = None


@dataclass(frozen=True)
class ShapeRecord:
    """A shape that the model's code may spell out, the module whose code that is, and a dimension that it leaves open.

    ``free`` is None if it leaves none open.
    """

    shadow: Tensor
    module: str
    free: int | None


@dataclass
class Builder:
    """Everything that the rules find out in one pass over the traced program."""

    parameters: Mapping[fx.Node, str] = field(default_factory=dict)
    """Which parameter each placeholder of the program stands for."""
    origins: dict[fx.Node, frozenset[str]] = field(default_factory=dict)
    """The inputs of the network that each value comes from, see `lbyl.graph.origins`."""
    numbers: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """The whole numbers that modules keep, by the modules' paths, see `lbyl.graph.numbers`."""
    factors: frozenset[float] = frozenset()
    """The numbers with a fraction, or of such a type, that modules keep."""
    widths: frozenset[int] = frozenset()
    """The lengths of all axes of parameters."""
    batch: int = 0
    """The number of rows of the network's first input."""
    ids: Ids = field(default_factory=Ids)
    slots: dict[tuple[str, int], SlotRecord] = field(default_factory=dict)
    """By parameter name and dimension."""
    seconds: dict[tuple[str, int], SlotRecord] = field(default_factory=dict)
    """The second channels along dimensions whose indices are pairs, see `lbyl.graph.pairs`; the first are in slots."""
    producers: dict[tuple[str, int], ProducerRecord] = field(default_factory=dict)
    """By weight name and output dimension."""
    consumers: dict[str, ConsumerRecord] = field(default_factory=dict)
    """By weight name."""
    tied: list[tuple[str, int]] = field(default_factory=list)
    """Weights and dimensions along which one layer reads channels that another layer makes with the same weight."""
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    """Channels that can't be cut, and why."""
    aside: list[tuple[Tensor, str]] = field(default_factory=list)
    """Channels that always stay, while others of the same layer may be cut, and why."""
    whole: dict[str, str] = field(default_factory=dict)
    """Parameters that an operation without a rule uses, and why none of their dimensions can be cut."""
    sums: list[Tensor] = field(default_factory=list)
    """Channels that a sum adds, made by different producers."""
    equal: list[tuple[Tensor, int]] = field(default_factory=list)
    """Channels that are split into a number of blocks of equal size."""
    fixed: list[tuple[Tensor, tuple[int, ...], Tensor, str]] = field(default_factory=list)
    """Shadows, dimensions of them that must keep their size, the channels that stay for it, and why."""
    starts: list[tuple[Tensor, fx.Node]] = field(default_factory=list)
    """Shadows of constants whose channels may be those of a layer, and the calls that made them."""
    shapes: list[ShapeRecord] = field(default_factory=list)
    """Shadows of values whose shape the model's code may spell out, and the module of that code."""
    computed: list[str] = field(default_factory=list)
    """Layers whose weight the model computes."""
    steps: list[tuple[Tensor, Step]] = field(default_factory=list)
    """Channels, and an operation that they pass through."""
    barriers: list[str] = field(default_factory=list)
    """Operations that the trace can't see through, and why."""
    averages: list[AverageRecord] = field(default_factory=list)
    """Means over channels that a weight can correct after a cut."""
    layer_norms: list[tuple[Tensor, LayerNorm]] = field(default_factory=list)
    """Channels, and a layer norm that takes its statistics over them."""
    products: list[tuple[Tensor, str]] = field(default_factory=list)
    """Channels that a layer multiplies in pairs and adds up, and the name of that layer."""
    distances: list[tuple[Tensor, str]] = field(default_factory=list)
    """Channels over which a distance or similarity is taken, and its name and layer."""
    joins: list[tuple[Tensor, str]] = field(default_factory=list)
    """Channels that were merged into one, and why."""
    statistics: dict[Reduction, Tensor] = field(default_factory=dict)
    """Channels that an operation reduces over, by operation."""
    relative: set[Reduction] = field(default_factory=set)
    """Those of them that are a mean by which channels are divided, so that only their relations count."""
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each operation was called in each module up to and including the current node."""
    scaled: dict[fx.Node, Any] = field(default_factory=dict)
    """Values that depend on how many channels there are, see `lbyl.graph.channel_means`."""
    shifted: set[fx.Node] = field(default_factory=set)
    """Values that may not be zero where the channels that they come from are, see `lbyl.graph.channel_means`."""
    experts: dict[str, int] = field(default_factory=dict)
    """How many matrices a weight stacks along its first dimension, by the weight's name."""
    pure: dict[fx.Node, ProducerRecord] = field(default_factory=dict)
    """Values that are a producer's output after nothing but linear maps of single channels, and that producer."""
    written: dict[fx.Node, Tensor] = field(default_factory=dict)
    """Values of which parts were written in place, as they were after the last one."""
    pieces: list[tuple[fx.Node, list[fx.Node]]] = field(default_factory=list)
    """These values, and the views of each of these parts, from the last one to the first."""
    alike: dict[tuple[str, str], int] = field(default_factory=dict)
    """Weights, and masks or factors over them that are cut with them, see `lbyl.graph.rewritten`.

    The number says by how many axes those of the mask come later in the weight.
    """
    read_in_parts: dict[str, str] = field(default_factory=dict)
    """Parameters whose parts multiply channels, as in ``x @ a[:n]``, and the layers that do so."""
    _free: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pairs = Pairs(self.ids)

    # -- ids ------------------------------------------------------------------------------------------

    def shadow(self, value: Any) -> Tensor | None:
        """The shadow of a traced value; a parameter gets one new id for each element at its first use."""
        if isinstance(value, Tensor):
            return compact(self.ids.find(small(value)).expand(value.shape))
        if isinstance(value, ParameterRef):
            if value.name not in self._free:
                count = int(torch.Size(value.shape).numel())
                if count > _LARGEST_FREE_PARAMETER:
                    return None
                self._free[value.name] = self.ids.fresh(count).reshape(value.shape)
            return self._free[value.name]
        return None

    def channels(self, shadow: Tensor, axis: int) -> Tensor | None:
        """Ids along ``axis``; None when they also change along another dimension."""
        shadow = compact(self.ids.find(small(shadow)).expand(shadow.shape))
        if any(varies(shadow, dim) for dim in range(shadow.dim()) if dim != axis % shadow.dim()):
            return None
        return shadow.movedim(axis, 0).reshape(shadow.shape[axis], -1)[:, 0]

    def gather(self, shadow: Tensor, axis: int) -> Tensor | None:
        """Ids along ``axis``, after the ids at each of its indices were merged into one channel.

        An example is a linear layer whose outputs a view spreads over an image: each channel of the image then holds
        several outputs of the layer. Nothing is merged where the ids do not change along ``axis``, or where some of
        them are ``NOBODY``; the result may then be None, as for :meth:`channels`.
        """
        ids = self.channels(shadow, axis)
        shadow = compact(self.ids.find(small(shadow)).expand(shadow.shape))
        if ids is not None or not varies(shadow, axis % shadow.dim()) or bool((small(shadow) == NOBODY).any()):
            return ids
        return self.channels(self.join(shadow, [d for d in range(shadow.dim()) if d != axis % shadow.dim()]), axis)

    def spread(self, ids: Tensor, axis: int, shape: Iterable[int]) -> Tensor:
        """A shadow of ``shape`` that holds ``ids`` along ``axis`` and is constant along all other axes."""
        shape = tuple(shape)
        view = [1] * len(shape)
        view[axis] = shape[axis]
        return ids.reshape(view).expand(shape)

    def follow(self, node: fx.Node) -> ProducerRecord | None:
        """The producer whose output is this node's first argument; None when other nodes use that value too."""
        source = node.args[0]
        while isinstance(source, fx.Node) and _is_same_value(source) and _read_once(source):
            source = source.args[0]
        return self.pure.get(source) if isinstance(source, fx.Node) and _read_once(source) else None

    def reduction(self, node: fx.Node, dim: int) -> Reduction:
        """The reduction along an axis that this node is."""
        place = layer_name(node), aten_name(node.target)
        return Reduction(*place, self.calls[place] - 1, dim)

    # -- findings -------------------------------------------------------------------------------------

    def slot(self, parameter: str, dim: int, ids: Tensor, role: str, blocks: int = 1) -> Tensor:
        """Record that ``ids`` run along a parameter's dimension; a second use merges with the first."""
        if self.pairs.among(ids):
            return self._slot_of_pairs(parameter, dim, ids)
        known = self.slots.get((parameter, dim))
        if known is None:
            self.slots[parameter, dim] = SlotRecord(parameter, dim, ids, role, blocks)
            return ids
        if known.role != role and "consumer" in (known.role, role):
            self.pin(
                torch.cat([known.ids, ids]),
                f"{parameter} is tied: one layer makes these channels with it and another one reads them",
            )
            known.role = role = "producer"
        mixed = (known.ids == NOBODY) != (ids == NOBODY)
        if bool(mixed.any()):
            why = (
                f"in another call {parameter} reads what can't be cut, such as an input or a state that starts as zeros"
            )
            self.pin(torch.cat([known.ids[mixed], ids[mixed]]), why)
            known.ids = torch.where(known.ids == NOBODY, ids, known.ids)
        self.ids.union(known.ids, ids)
        return known.ids

    def _slot_of_pairs(self, parameter: str, dim: int, pairs: Tensor) -> Tensor:
        """Record that pairs run along a parameter's dimension, as two slots that a cut only removes indices from."""
        known, place = self.seconds.get((parameter, dim)), (parameter, dim)
        if known is None and place in self.slots:
            self.pairs.merge([pairs])
            return self.slot(parameter, dim, self.ids.find(pairs), "carrier")
        first, second = self.pairs.split(pairs)
        if known is None:
            self.seconds[place] = SlotRecord(parameter, dim, second, "carrier")
        else:
            self.ids.union(known.ids, second)
        self.slot(parameter, dim, first, "carrier")
        return pairs

    def produce(
        self, node: fx.Node, layer: str, weight: str, bias: str | None, count: int, dim: int = 0, blocks: int = 1
    ) -> Tensor:
        """Give a layer ``count`` new channels, or the same ones again when it runs a second time.

        ``dim`` is the dimension of the weight that holds them, and ``blocks`` is as in :class:`lbyl.graph.types.Slot`.
        """
        record = self.producers.get((weight, dim))
        if record is None:
            record = ProducerRecord(layer, weight, bias, self.ids.fresh(count, issued=True), dim)
            self.producers[weight, dim] = record
            self.slot(weight, dim, record.ids, "producer", blocks)
            self.pure[node] = record
        else:
            # A layer that runs twice has no single batch norm after it.
            self.pure = {key: value for key, value in self.pure.items() if value is not record}
            if bias != record.bias:
                # Layers that share a weight may have different biases. Then no single filter describes them.
                self.step(record.ids, "bias", layer_name(node), parametric=True)
        if bias:
            self.slot(bias, 0, record.ids, "carrier")
        return record.ids

    def read(
        self,
        layer: str,
        weight: str,
        bias: str | None,
        op: str,
        ids: Tensor,
        blocks: int = 1,
        dim: int = 1,
        experts: int = 0,
    ) -> None:
        """Record that a layer mixes these channels along a dimension of its weight."""
        if self.pairs.among(ids):
            self.tie(weight, dim, ids)
            return
        if (weight, dim) in self.producers and blocks == 1:
            self.slot(weight, dim, ids, "producer")
            self.tied.append((weight, dim))
            return
        self.slot(weight, dim, ids, "consumer", blocks)
        if weight in self.consumers:
            self.consumers[weight].calls += 1
            if self.consumers[weight].dim != dim:
                self.pin(ids, f"layers read channels along two dimensions of {weight}")
        else:
            self.consumers[weight] = ConsumerRecord(layer, weight, bias, op, blocks, dim=dim, experts=experts)

    def tie(self, weight: str, dim: int, ids: Tensor) -> None:
        """Record that a layer reads these channels in a way that no restorer handles: a cut only removes columns."""
        self.slot(weight, dim, ids, "carrier")
        self.tied.append((weight, dim))

    def step(self, ids: Tensor, op: str, layer: str, parametric: bool = False) -> None:
        """Record that the channels pass through an operation."""
        self.steps.append((ids, Step(op, layer, parametric)))

    def pin(self, ids: Tensor, reason: str) -> None:
        """Forbid cutting these channels. The reason is shown in the report."""
        ids = torch.unique(small(ids))
        ids = ids[ids != NOBODY]
        if ids.numel():
            self.pins.append((ids, reason))

    def keep(self, ids: Tensor, reason: str) -> None:
        """Forbid cutting these channels, but not other channels of the same layer."""
        ids = torch.unique(small(ids))
        ids = ids[ids != NOBODY]
        self.ids.union(ids[:-1], ids[1:])  # since none of them is cut; a view of them then leaves no gaps
        self.aside.append((ids, reason))

    def fix(self, shadow: Tensor, dims: Iterable[int], reason: str, part: Tensor | None = None) -> None:
        """Forbid cutting along these dimensions, or only cutting channels in a part of the shadow.

        Whether they carry channels is decided at the end of the trace, when it is known which channels belong
        together. The inner dimension of an attention head, for one, carries none once the whole head is one channel.
        """
        rank, stay = shadow.dim(), compact(shadow if part is None else part)
        self.fixed.append((compact(shadow), tuple(d % rank for d in dims), stay, reason))

    def shaped(self, shadow: Tensor, node: fx.Node, free: int | None = None, module: str | None = None) -> None:
        """Record a shape that the model's code may spell out. As with `fix`, it is decided at the end what follows.

        ``free`` is the dimension that the code leaves open, and ``module`` the module of that code, if it is not that
        which made the call.
        """
        shadow = compact(shadow)
        if any(varies(shadow, d) for d in range(shadow.dim())):
            self.shapes.append(ShapeRecord(shadow, code_of(node) if module is None else module, free))

    def join(self, shadow: Tensor, dims: Iterable[int], why: str = "") -> Tensor:
        """Merge all channels along these dimensions into one, and return a shadow that is constant along them.

        ``why`` is shown to the user where all channels of a layer become one.
        """
        shadow = compact(shadow)
        for dim in sorted({d % shadow.dim() for d in dims}):
            if varies(shadow, dim):
                if why:
                    self.joins.append((shadow.narrow(dim, 0, 1), why))
                first = shadow.narrow(dim, 0, 1)
                size = small(shadow)
                self.ids.union(size.narrow(dim, 0, 1).expand(size.shape), size)
                shadow = first.expand(shadow.shape)
        return shadow

    def barrier(self, node: fx.Node, values: Iterable[Any], why: str) -> Any:
        """Pin every channel among ``values`` and return an output without channels."""
        values = list(_leaves(values))
        ids = [small(value).reshape(-1) for value in values if isinstance(value, Tensor)]
        names = [value.name for value in values if isinstance(value, ParameterRef)]
        ids += [self._free[name].reshape(-1) for name in names if name in self._free]
        for name in names:
            self.whole.setdefault(name, why)
        if ids and bool((torch.cat(ids) != NOBODY).any()):
            self.barriers.append(why)
            self.pin(torch.cat(ids), why)
        return nobody_like(node)

    def finish(self) -> None:
        """Give each parameter that the code uses directly a slot along the dimension with channels, or pin these.

        Constants that turned out to hold a layer's channels get the shape that the code spells out.
        """
        for shadow, node in self.starts:
            if bool(self.ids.issued(small(shadow)).any()):  # others are as wide as something else
                self.shaped(shadow, node)
        for name, shadow in self._free.items():
            roots = self.ids.find(shadow)
            shared = self.ids.issued(roots)
            if not bool(shared.any()):
                continue
            sides = [self._along(roots, shared, dim) for dim in range(shadow.dim())]
            found = [(dim, ids) for dim, ids in enumerate(sides) if ids is not None]
            if not found:
                self.pin(roots[shared], f"{name} carries channels along more than one dimension")
                continue
            dim, ids = next((side for side in found if bool((side[1] != NOBODY).all())), found[0])
            # What was not read, such as positions after the last one, is cut with what was.
            self.ids.union(roots.movedim(dim, -1), ids.expand(roots.movedim(dim, -1).shape))
            self.slots.setdefault((name, dim), SlotRecord(name, dim, ids, "carrier"))
            if name in self.read_in_parts:
                self.tied.append((name, dim))
        for record in (*self.slots.values(), *self.seconds.values()):
            if record.parameter in self.whole:
                self.pin(record.ids, self.whole[record.parameter])

    def _along(self, roots: Tensor, shared: Tensor, dim: int) -> Tensor | None:
        """The channel at each index of a dimension, of elements that are ``shared``; None if there are several."""
        rows, those = (x.movedim(dim, 0).reshape(x.shape[dim], -1) for x in (roots, shared))
        ids = torch.where(those, rows, NOBODY).amax(1)
        return ids if bool(((rows == ids[:, None]) | ~those).all()) else None


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def nobody_like(node: fx.Node) -> Any:
    """Shadows without channels for the outputs of a node."""
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        return torch.zeros((), dtype=torch.int64).expand(tuple(int(size) for size in val.shape))
    if isinstance(val, (list, tuple)):
        return [
            torch.zeros((), dtype=torch.int64).expand(tuple(int(s) for s in item.shape))
            if isinstance(item, Tensor)
            else item
            for item in val
        ]
    return val


def output_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's (single) output."""
    return tuple(int(size) for size in node.meta["val"].shape)


def layer_name(node: fx.Node) -> str:
    """Dotted name of the module that a node was traced in; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return path.split("@")[0]


def code_of(node: fx.Node) -> str:
    """Dotted name of the module whose code made a call: :func:`layer_name`, or a part of it whose method it called."""
    found = node.meta.get(CODE)
    return layer_name(node) if found is None else found


_SAME = ("to", "_to_copy", "alias", "detach", "clone", "contiguous")


def _is_same_value(node: fx.Node) -> bool:
    """Whether a node returns its argument in the same precision, as hooks do that move values to a device."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, fx.Node) or aten_name(node.target) not in _SAME:
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype


def _read_once(node: fx.Node) -> bool:
    """Whether one other node reads a value; checks that exported programs make of it do not count."""
    readers = [user for user in node.users if not str(user.target).startswith("aten._assert_tensor_metadata")]
    return len(readers) == 1
