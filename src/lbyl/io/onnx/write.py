"""Writes a cut network as the ONNX file that it was read from, with new weights and widths and no other changes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lbyl.errors import InputError, SurgeryError
from lbyl.io.onnx.arrays import to_file, to_gates
from lbyl.io.onnx.check import TOLERANCE, compared
from lbyl.io.onnx.file import library
from lbyl.io.onnx.network import Link, NumberLink, OnnxNetwork
from lbyl.io.onnx.read import Reader, content, prepared
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.inputs import ExampleInputs

if TYPE_CHECKING:
    import onnx_ir as ir

_New = tuple[Link, np.ndarray]
"""A use of a constant, and the value that it needs now."""


def write_onnx(network: OnnxNetwork, path: Path, inputs: ExampleInputs | None = None) -> None:
    """Write the file of a network that was cut.

    Graph, names, operators, metadata and open sizes are kept. Weights get the network's values, and numbers that are
    widths are updated. Weights that were stored in a separate file are stored so again, beside ``path``. Weights that
    the file stores in half precision and turns into another one stay so if the network's outputs allow it.

    Args:
        network: the network.
        path: the file to write.
        inputs: inputs to try the weights in half precision on; by default those that the file states.

    Raises:
        SurgeryError: a width depends on a number of the file that would need two values.
        InputError: the original file is missing or has changed.
    """
    limit = TOLERANCE * (_MARGIN if inputs is None else _SMALL_MARGIN)
    rounded = _write(network, path, None)
    while rounded:
        found = _difference(network, path, inputs)
        if found <= limit:
            return
        # Roundings are independent of each other, so that the squares of their effects add up.
        count = int(len(rounded) * _SMALL_MARGIN * (limit / found) ** 2)
        rounded = _write(network, path, sorted(rounded, key=lambda name: -rounded[name])[:count])


_MARGIN, _SMALL_MARGIN = 0.5, 0.9
"""The share of the tolerance that rounded weights may take: on other inputs than those of the check, and on them."""


def _difference(network: OnnxNetwork, path: Path, inputs: ExampleInputs | None) -> float:
    """The relative difference of a file whose weights were rounded from its network; infinite if it is not known."""
    try:
        given = inputs or ExampleInputs(network.example_inputs(generator=torch.Generator().manual_seed(0)))
        return compared(path, network.program.inputs, network, given, math.inf)
    except (InputError, RuntimeError):  # as for inputs that only their user knows
        return math.inf


def _write(network: OnnxNetwork, path: Path, narrow: Collection[str] | None) -> dict[str, int]:
    """Write the file. Returns the weights that were rounded to the type in which the file stores them, and their sizes.

    ``narrow`` names those that may be rounded; None for all.
    """
    ir: Any = library("onnx_ir")
    program = network.program
    editor = _Editor(content(program.file), Reader(program.file, prepared(program.file)), narrow)
    # Asked first, because weights that are cut are in memory afterwards.
    external = any(_is_external(value.const_value) for value in editor.graph.initializers.values())
    editor.weights(network, program.links)
    editor.numbers(network, program.numbers)
    editor.clear()
    editor.refresh()
    if external:
        ir.save(editor.model, path, external_data=f"{path.name}.data")
    else:
        ir.save(editor.model, path)
    return editor.rounded


def _is_external(tensor: Any) -> bool:
    return type(tensor).__name__ == "ExternalTensor"


class _Editor:
    """Changes a file's content to fit a network's tensors and numbers.

    Attributes:
        rounded: the weights that were rounded to the type in which the file stores them, and their sizes.
    """

    def __init__(self, model: ir.Model, reader: Reader, narrow: Collection[str] | None) -> None:
        reader.network()
        self.model, self.graph, self.reader = model, model.graph, reader
        self.nodes = list(model.graph)
        self.place = {id(node): place for place, node in enumerate(self.nodes)}
        self.narrow = narrow
        self.rounded: dict[str, int] = {}
        self.left: list[ir.Value] = []

    def weights(self, network: OnnxNetwork, links: tuple[Link, ...]) -> None:
        """Set constants to the values of the network's tensors."""
        state = tensors_of(network)
        stored: dict[str, dict[str, list[_New]]] = defaultdict(lambda: defaultdict(list))
        for link, new in self._needed(state, links):
            leaf = self.reader.leaf[link.value]
            stored[self.reader.stored(leaf)][leaf].append((link, new))
        for name, by_leaf in stored.items():
            old = self.reader.constants
            same = all(_equal(new, old[leaf]) for leaf, found in by_leaf.items() for _, new in found)
            if not same and not self._stored(name, by_leaf):
                for leaf, found in by_leaf.items():
                    self._replaced(leaf, found)
        for place, node in enumerate(self.nodes):
            unused = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
            beta = node.attributes.get("beta")
            if unused is not None and beta is not None and beta.value == 0:
                # It is multiplied by zero, but would have to fit the layer's width.
                array = self.reader.constants.get(str(unused.name), np.zeros(2, dtype=np.float32))
                if array.size > 1:
                    self._rewire(place, 2, np.zeros(1, dtype=array.dtype))

    def _needed(self, state: Mapping[str, torch.Tensor], links: tuple[Link, ...]) -> Iterator[_New]:
        """Each use of a constant, and the value that it needs now; the parts of one use are put together."""
        parts: dict[tuple[int, int], list[Link]] = defaultdict(list)
        for link in links:
            if link.part is None:
                yield link, to_file(state[link.path], link.layout, link.scale, self.reader.constants[link.value])
            else:
                parts[link.node, link.operand].append(link)
        for (place, operand), found in parts.items():
            old, first = self.reader.constants[found[0].value], found[0].part
            assert first is not None
            new = to_gates([state[link.path] for link in found], 1 if first.half is None else 2, first.gates, old)
            if operand == 2 and new.shape != old.shape:
                self._without_states(place)
            yield found[0], new

    def _without_states(self, place: int) -> None:
        """Leave out the first states of a recurrent layer, which are zeros of another width than it has now."""
        node, before = self.nodes[place], self.reader.nodes[place]
        for operand in (5, 6):
            value = node.inputs[operand] if operand < len(node.inputs) else None
            if value is not None and self.reader.is_zero(before.inputs[operand]):
                node.replace_input_with(operand, None)
                self.left.append(value)

    def _stored(self, name: str, by_leaf: Mapping[str, Sequence[_New]]) -> bool:
        """Change a constant in the file that is used as it is, or turned, reshaped or in another type.

        Returns False if it has other uses, or would need several values.
        """
        value, old = self._value(name), self.reader.constants[name]
        edges = {(link.node, link.operand) for found in by_leaf.values() for link, _ in found}
        if value is None or not self._edges(value, views=True) <= edges:
            return False
        shapes: dict[int, tuple[int, ...]] = {}
        backs = [self._back(leaf, new, shapes) for leaf, found in by_leaf.items() for _, new in found]
        arrays = [array for array in backs if array is not None]
        if len(arrays) < len(backs) or any(not _equal(array, arrays[0]) for array in arrays):
            return False
        new = arrays[0]
        if new.dtype != old.dtype:
            rounded = new.astype(old.dtype)
            exact = _equal(rounded.astype(new.dtype), new)
            allowed = self.narrow is None or name in self.narrow
            if not exact and allowed and np.isfinite(rounded.astype(new.dtype)).all():
                self.rounded[name] = new.size
                new = rounded
            elif exact:
                new = rounded
        self._store(value, new)
        for place, shape in shapes.items():
            self._resize(place, shape)
        return True

    def _back(self, leaf: str, new: np.ndarray, shapes: dict[int, tuple[int, ...]]) -> np.ndarray | None:
        """What the file would have to store for a constant to become ``new``; None if nothing would do.

        Args:
            leaf: the constant's name.
            new: its new value.
            shapes: gets the new shape of the output of each node on the way, by the node's position.
        """
        array: np.ndarray | None = new
        for name, node in self.reader.path(leaf):
            if array is None:
                return None
            shapes[self.reader.order[id(node)]] = array.shape
            before = self.reader.constants[str(node.inputs[0].name)].shape  # pyright: ignore[reportOptionalMemberAccess]
            array = _undone(node, array, self.reader.constants[name].shape, before)
        return array

    def _resize(self, place: int, shape: tuple[int, ...]) -> None:
        """Change the sizes in the operand of a Reshape or Expand to those of its new output."""
        node = self.nodes[place]
        if node.op_type not in ("Reshape", "Expand") or len(node.inputs) < 2 or node.inputs[1] is None:
            return
        name = str(node.inputs[1].name)
        was, old = self.reader.constants[str(node.outputs[0].name)].shape, self.reader.constants[name]
        sizes = old.copy()
        for axis in range(-len(old), 0):
            if old[axis] == was[axis]:  # and not -1, 0 or 1, which follow
                sizes[axis] = shape[axis]
        if not _equal(sizes, old):
            self._number(name, (place, 1), sizes)

    def _replaced(self, leaf: str, found: Sequence[_New]) -> None:
        """Give the uses of a constant that can't be changed for all of them constants of their own."""
        old, first = self.reader.constants[leaf], found[0][1]
        value = self._value(leaf)
        edges = {(link.node, link.operand) for link, _ in found}
        if value is not None and all(_equal(new, first) for _, new in found) and self._edges(value) <= edges:
            self._store(value, first)
            return
        made: list[tuple[np.ndarray, ir.Value]] = []
        for link, new in found:
            if _equal(new, old):
                continue  # the original constant stays for the uses that are not cut
            if link.node < 0:
                raise SurgeryError(f"{link.value!r} is an output of the file, and would change with its layer")
            shared = next((other for array, other in made if _equal(array, new)), None)
            made.append((new, self._rewire(link.node, link.operand, new, shared)))

    def numbers(self, network: OnnxNetwork, links: tuple[NumberLink, ...]) -> None:
        """Set numbers that are widths to the values in the network's modules."""
        changes: dict[tuple[int, int], dict[int, tuple[int, str]]] = defaultdict(dict)
        for link in links:
            kept = getattr(network.get_submodule(link.module), link.name)
            new = kept if link.place is None else kept[link.place]
            if link.attribute:
                self._attribute(link, new)
                continue
            assert link.index is not None
            known = changes[link.node, link.operand].setdefault(link.index, (new, link.value))
            if known[0] != new:
                raise SurgeryError(f"{link.module}: {link.value!r} of the file would have to be {known[0]} and {new}")
        for (node, operand), wanted in changes.items():
            name = next(iter(wanted.values()))[1]
            old = self.reader.constants[name]
            array = old.copy()
            for index, (new, _) in wanted.items():
                array.reshape(-1)[index] = new
            if _equal(array, old):
                continue
            self._number(name, (node, operand), array)

    def _number(self, name: str, edge: tuple[int, int], array: np.ndarray) -> None:
        """Change the numbers in one operand of one node; other nodes that use the same constant keep theirs."""
        value = self._value(name)
        if value is not None and self._edges(value) == {edge}:
            self._store(value, array)
        else:
            self._rewire(*edge, array)

    def _attribute(self, link: NumberLink, new: int) -> None:
        ir: Any = library("onnx_ir")
        node = self.nodes[link.node]
        old = node.attributes[link.attribute].value
        if link.index is None:
            if int(old) != new:
                node.attributes[link.attribute] = ir.AttrInt64(link.attribute, int(new))
        elif int(old[link.index]) != new:
            changed = [int(item) for item in old]
            changed[link.index] = int(new)
            node.attributes[link.attribute] = ir.AttrInt64s(link.attribute, changed)

    def _value(self, name: str) -> ir.Value | None:
        """An initializer or the output of a Constant node; None for values computed from constants."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        found = self.reader.producers.get(name)
        node = None if found is None else self.nodes[found]
        return node.outputs[0] if node is not None and node.op_type == "Constant" else None

    def _edges(self, value: ir.Value, views: bool = False) -> set[tuple[int, int]]:
        """The (node, operand) pairs that use a value, also through nodes that only pass it on.

        With ``views``, also through nodes that turn, reshape or repeat it, or change its type.
        """
        edges: set[tuple[int, int]] = set()
        if value.is_graph_output():
            edges.add((-1, -1))
        for use in value.uses():
            if use.node.op_type in ("Shape", "Size"):
                continue  # which follow by themselves
            through = views and use.idx == 0 and str(use.node.outputs[0].name) in self.reader.views
            if use.node.op_type == "Identity" or through:
                edges |= self._edges(use.node.outputs[0], views)
            else:
                edges.add((self.place.get(id(use.node), -1), use.idx))
        return edges

    def _store(self, value: ir.Value, array: np.ndarray) -> None:
        ir: Any = library("onnx_ir")
        made = ir.tensor(array, name=value.name)
        node = value.producer()
        if node is None:
            value.const_value = made
        else:
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", made)
        if value.shape is not None:
            value.shape = ir.Shape(array.shape)
        if value.type is not None:
            value.type = ir.TensorType(made.dtype)

    def _rewire(self, place: int, operand: int, array: np.ndarray, shared: ir.Value | None = None) -> ir.Value:
        """Give one operand of one node a constant of its own, or one that others have got."""
        ir: Any = library("onnx_ir")
        node: ir.Node = self.nodes[place]
        old = node.inputs[operand]
        while old is not None and len(old.uses()) == 1 and not old.is_graph_output():
            passes = old.producer()
            if passes is None or passes.op_type != "Identity":
                break
            node, operand, old = passes, 0, passes.inputs[0]  # which then stays in the graph
        if old is not None:
            self.left.append(old)
        if shared is not None:
            node.replace_input_with(operand, shared)
            return shared
        base = f"{old.name if old is not None else 'constant'}_{node.outputs[0].name}"
        name, number = base, 1
        while name in self.reader.names or name in self.graph.initializers:
            name, number = f"{base}_{number}", number + 1
        made = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(made.dtype), const_value=made)
        self.graph.initializers[name] = value
        if (self.model.ir_version or 4) < 4:  # before version 4, initializers must also be inputs
            self.graph.inputs.append(value)
        node.replace_input_with(operand, value)
        return value

    def clear(self) -> None:
        """Remove constants that nothing uses any more, and the nodes that only computed them."""
        while self.left:
            value = self.left.pop()
            node = value.producer()
            if value.uses() or value.is_graph_output():
                continue
            if node is None:
                if value.name in self.graph.initializers:
                    if value in self.graph.inputs:  # as old files list their initializers
                        self.graph.inputs.remove(value)
                    del self.graph.initializers[str(value.name)]
            elif node.graph is not None and not any(out.uses() or out.is_graph_output() for out in node.outputs):
                self.left += [item for item in node.inputs if item is not None]
                self.graph.remove(node, safe=True)

    def refresh(self) -> None:
        """Update the shapes that the file states."""
        passes = library("onnx_ir.passes.common")
        stated: list[tuple[ir.Value, Any, Any]] = []
        promised = [(value, value.shape) for value in self.graph.outputs]
        for node in self.nodes:
            for value in node.outputs:
                if value.name and not value.is_graph_output():
                    stated.append((value, value.shape, value.type))
                    value.shape = None
        try:
            passes.ShapeInferencePass()(self.model)
        except Exception:  # the shapes are optional, so they are left out
            for value, _, _ in stated:
                value.shape = None
        for value, shape, kind in stated:
            value.shape, value.type = None if shape is None else _merged(shape, value.shape), kind
        for value, shape in promised:
            value.shape = None if shape is None else _merged(shape, value.shape, shape)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def _merged(before: Any, now: Any, unknown: Any = None) -> Any:
    """The stated shape with updated sizes; those that are no longer known are left open, or taken from ``unknown``."""
    ir: Any = library("onnx_ir")
    if now is None or len(now) != len(before):
        return unknown
    sizes = []
    for axis, (old, new) in enumerate(zip(before, now, strict=True)):
        known = new if isinstance(new, int) else None if unknown is None else unknown[axis]
        sizes.append(known if isinstance(old, int) else old)
    return ir.Shape(sizes)


def _undone(node: ir.Node, array: np.ndarray, was: Sequence[int], before: Sequence[int]) -> np.ndarray | None:
    """The operand that a node turns into ``array``; None if there is none.

    Args:
        node: a node that only moves or repeats numbers, or changes their type.
        array: its new output.
        was: the shape that its output had.
        before: the shape that its operand had.
    """
    if node.op_type in ("Identity", "Cast"):
        return array
    if node.op_type == "Transpose":
        order = node.attributes.get("perm")
        axes = list(range(len(was)))[::-1] if order is None else [int(axis) for axis in order.value]
        return np.ascontiguousarray(array.transpose(np.argsort(axes)))
    if node.op_type == "Expand":
        for axis in range(-len(was), 0):
            if was[axis] != (before[axis] if -axis <= len(before) else 1):
                first = array.take([0], axis)
                if not np.array_equal(np.broadcast_to(first, array.shape), array):
                    return None
                array = first
        return array.reshape(array.shape[len(was) - len(before) :])
    if tuple(was) == array.shape:
        return array.reshape(before)
    sizes = [new for old, new in zip(was, array.shape, strict=True) if old != 1]
    if [size for size in before if size != 1] != [size for size in was if size != 1] or 0 in array.shape:
        return None
    return array.reshape([1 if size == 1 else sizes.pop(0) for size in before])
