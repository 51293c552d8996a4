"""Writes a cut network as the ONNX file that it was read from, with new weights and widths and no other changes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lbyl.errors import SurgeryError
from lbyl.io.onnx.arrays import to_file
from lbyl.io.onnx.file import library
from lbyl.io.onnx.network import Link, NumberLink, OnnxNetwork
from lbyl.io.onnx.read import Reader, content, prepared
from lbyl.runtime.copying import tensors_of

if TYPE_CHECKING:
    import onnx_ir as ir


def write_onnx(network: OnnxNetwork, path: Path) -> None:
    """Write the file of a network that was cut.

    Graph, names, operators, metadata and open sizes are kept. Weights get the network's values, and numbers that are
    widths are updated. Weights that were stored in a separate file are stored so again, beside ``path``.

    Raises:
        SurgeryError: a width depends on a number of the file that would need two values.
        InputError: the original file is missing or has changed.
    """
    ir: Any = library("onnx_ir")
    program = network.program
    editor = _Editor(content(program.file), Reader(program.file, prepared(program.file)))
    # Asked first, because weights that are cut are in memory afterwards.
    external = any(_is_external(value.const_value) for value in editor.graph.initializers.values())
    editor.weights(network, program.links)
    editor.numbers(network, program.numbers)
    editor.refresh()
    if external:
        ir.save(editor.model, path, external_data=f"{path.name}.data")
    else:
        ir.save(editor.model, path)


def _is_external(tensor: Any) -> bool:
    return type(tensor).__name__ == "ExternalTensor"


class _Editor:
    """Changes a file's content to fit a network's tensors and numbers."""

    def __init__(self, model: ir.Model, reader: Reader) -> None:
        reader.network()
        self.model, self.graph, self.reader = model, model.graph, reader
        self.nodes = list(model.graph)
        self.place = {id(node): place for place, node in enumerate(self.nodes)}

    def weights(self, network: OnnxNetwork, links: tuple[Link, ...]) -> None:
        """Set constants to the values of the network's tensors."""
        state = tensors_of(network)
        by_leaf: dict[str, list[tuple[Link, np.ndarray]]] = defaultdict(list)
        for link in links:
            old = self.reader.constants[link.value]
            new = to_file(state[link.path], link.layout, link.scale, old)
            by_leaf[self.reader.leaf[link.value]].append((link, new))
        for leaf, found in by_leaf.items():
            old = self.reader.constants[leaf]
            first = found[0][1]
            if all(_equal(new, old) for _, new in found):
                continue
            edges = {(link.node, link.operand) for link, _ in found}
            alike = all(_equal(new, first) for _, new in found)
            value = self._value(leaf)
            if alike and value is not None and self._edges(value) <= edges:
                self._store(value, first)
                continue
            if alike and self._reshaped(leaf, first, edges):
                continue
            for link, new in found:
                if _equal(new, old):
                    continue  # the original constant stays for the uses that are not cut
                if link.node < 0:
                    raise SurgeryError(f"{link.value!r} is an output of the file, and would change with its layer")
                self._rewire(link.node, link.operand, new)

    def _reshaped(self, name: str, new: np.ndarray, edges: set[tuple[int, int]]) -> bool:
        """Store a constant that the file reshapes before its use; returns False if that is not possible."""
        place = self.reader.producers.get(name, -1)
        node = self.nodes[place]
        if node.op_type not in ("Reshape", "Unsqueeze") or not self._edges(node.outputs[0]) <= edges:
            return False
        value = self._value(str(node.inputs[0].name)) if node.inputs[0] is not None else None
        if value is None or self._edges(value) != {(place, 0)} or self.reader.constants[str(value.name)].ndim != 1:
            return False
        if node.op_type == "Reshape":
            shape = node.inputs[1]
            if shape is None or shape.name not in self.reader.constants:
                return False
            old = self.reader.constants[str(shape.name)]
            sizes = [now if was > 0 else was for was, now in zip(old.tolist(), new.shape, strict=True)]
            if sizes != old.tolist():
                self._number(str(shape.name), (place, 1), np.array(sizes, dtype=old.dtype))
        self._store(value, new.reshape(-1))
        return True

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

    def _edges(self, value: ir.Value) -> set[tuple[int, int]]:
        """The (node, operand) pairs that use a value, also through nodes that only pass it on."""
        edges: set[tuple[int, int]] = set()
        if value.is_graph_output():
            edges.add((-1, -1))
        for use in value.uses():
            if use.node.op_type in ("Shape", "Size"):
                continue  # which follow by themselves
            if use.node.op_type == "Identity":
                edges |= self._edges(use.node.outputs[0])
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

    def _rewire(self, place: int, operand: int, array: np.ndarray) -> None:
        """Give one operand of one node its own constant."""
        ir: Any = library("onnx_ir")
        node = self.nodes[place]
        old = node.inputs[operand]
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

    def refresh(self) -> None:
        """Update the shapes that the file states, and remove unused constants."""
        passes = library("onnx_ir.passes.common")
        stated: list[tuple[ir.Value, Any, Any]] = []
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


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def _merged(before: Any, now: Any) -> Any:
    """The stated shape with updated sizes; sizes that are no longer known are left open."""
    ir: Any = library("onnx_ir")
    if now is None or len(now) != len(before):
        return None
    sizes = zip(before, now, strict=True)
    return ir.Shape([old if not isinstance(old, int) else new if isinstance(new, int) else None for old, new in sizes])
