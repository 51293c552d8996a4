"""Turns a checked ONNX file into a PyTorch network."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lbyl.errors import InputError, first_line
from lbyl.io.onnx.arrays import DTYPES, from_file, from_gates
from lbyl.io.onnx.file import OnnxFile, library, open_file
from lbyl.io.onnx.network import (
    UNNAMED,
    FileInput,
    Held,
    Known,
    Link,
    NumberLink,
    OnnxNetwork,
    Part,
    Program,
    Source,
    Step,
    Value,
)
from lbyl.io.onnx.numbers import Numbers
from lbyl.io.onnx.operators import find_operator

if TYPE_CHECKING:
    import onnx_ir as ir

_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinear", "DynamicQuantize", "ConvInteger", "MatMulInteger")
_CONTROL = ("If", "Loop", "Scan", "SequenceMap")
_STANDARD = ("", "ai.onnx")
_SEVERAL_OUTPUTS = ("Split", "SplitToSequence", "TopK", "LSTM", "GRU", "RNN", "Dropout")
_WAY_OUT = "compress the network in PyTorch, or only the part in front of this node (onnx.utils.extract_model)"
_VIEWS = ("Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand")
_FIX = "python -m onnxruntime.tools.make_dynamic_shape_fixed"
_FOLD = "python -m onnxruntime.tools.optimize_onnx_model --opt_level basic"
_MOVES = (*_VIEWS, "Tile", "Slice", "Gather")
_LARGEST_WEIGHT = 1e18
_LARGEST_APART = 2**16


@dataclass(frozen=True)
class Origin:
    """The place of a number in the file, and the node and operand that use it first (-1 for none yet).

    With ``size``, the number is the size of a constant along the axis ``index``.
    """

    value: str
    index: int
    node: int = -1
    operand: int = -1
    size: bool = False

    def used(self, node: int, operand: int) -> Origin:
        """The same origin with this node and operand as its first use, if there is none yet."""
        return self if self.node >= 0 else replace(self, node=node, operand=operand)


Origins = Sequence[Origin | None]


def read_onnx(path: Path) -> OnnxNetwork:
    """Read the network of a file, in evaluation mode.

    Raises:
        InputError: the file is damaged, or has an operator that lbyl can't read, which the error names.
    """
    file = open_file(path)
    return Reader(file, prepared(file)).network().eval()


def content(file: OnnxFile) -> ir.Model:
    """The file's content, with calls of its own functions inlined."""
    model = file.model()
    try:
        if model.functions:
            library("onnx_ir.passes.common").InlinePass()(model)
    except Exception as error:
        raise InputError(f"{file.path}: its functions can't be inlined: {first_line(error)}") from error
    return model


def prepared(file: OnnxFile) -> ir.Model:
    """The file's content with inlined functions, and with inferred shapes where possible."""
    passes, model = library("onnx_ir.passes.common"), content(file)
    with suppress(Exception):  # shapes only help to find the numbers of the file that are widths
        passes.ShapeInferencePass()(model)
    return model


class _Room(nn.Module):
    """A container for modules and tensors whose names in the file have dots."""


class Reader:
    """Reads a file once, node by node.

    Attributes:
        constants: all constants of the file and values computed from them, by name.
        leaf: the original name of each constant, because Identity nodes may pass it on under other names.
        producers: the position of the node that makes each value.
        names: the names of all values.
    """

    def __init__(self, file: OnnxFile, model: ir.Model) -> None:
        self.file, self.model = file, model
        self.opsets = {domain or "": version for domain, version in model.opset_imports.items()}
        self.made = OnnxNetwork()
        self.steps: list[Step] = []
        self.links: list[Link] = []
        self.number_links: list[NumberLink] = []
        self.constants: dict[str, np.ndarray] = {}
        self.origins: dict[str, Origins] = {}
        self.leaf: dict[str, str] = {}
        self.hosted: set[str] = set()
        self.held: dict[tuple[str, str, float], Tensor] = {}
        self.views: dict[str, ir.Node] = {}
        self.bare: dict[str, str] = {}
        self.done: set[int] = set()
        self.nodes = list(model.graph)
        self.order = {id(node): place for place, node in enumerate(self.nodes)}
        self.producers = {
            str(value.name): place for place, node in enumerate(self.nodes) for value in node.outputs if value.name
        }
        self.names = {*self.producers, *graph_names(model.graph)}

    def network(self) -> OnnxNetwork:
        """The network of the file."""
        graph = self.model.graph
        for name, value in graph.initializers.items():
            if value.const_value is None:
                raise InputError(f"{self.file.path}: initializer {name!r} has no value")
            self.constant(name, value.const_value.numpy())
        inputs = tuple(self._input(value) for value in graph.inputs if value.name not in graph.initializers)
        for place, node in enumerate(self.nodes):
            if place not in self.done:
                self._read(node, place)
        outputs = tuple(self.source(value) for value in graph.outputs)
        if not outputs or any(output is None for output in outputs):
            raise InputError(f"{self.file.path} has an output that no operator makes")
        steps, outputs = tuple(self.steps), tuple(output for output in outputs if output is not None)
        self.made.program = Program(
            self.file, inputs, outputs, steps, tuple(self.links), tuple(self.number_links), _last_uses(steps, outputs)
        )
        return self.made

    def _input(self, value: ir.Value) -> FileInput:
        name = str(value.name)
        kind = int(value.dtype) if value.dtype is not None else 0
        if kind not in DTYPES:
            raise InputError(f"{self.file.path}: input {name!r} is not a tensor of numbers")
        if value.shape is None:
            raise InputError(f"{self.file.path}: input {name!r} has no shape; export the network with input shapes")
        sizes = tuple(size if isinstance(size, int) and size > 0 else _symbol(size) for size in value.shape)
        return FileInput(name, DTYPES[kind], sizes)

    # -- one node ---------------------------------------------------------------------------------------

    def _read(self, node: ir.Node, place: int) -> None:
        self._check(node)
        if node.op_type == "Constant":
            self.constant(str(node.outputs[0].name), _constant(node, self.where(node)))
            return
        values = [self.named(value) for value in node.inputs]
        if node.op_type == "CastLike" and values[0] in self.constants and values[1] not in self.constants:
            kind = node.inputs[1].dtype if node.inputs[1] is not None else None
            if kind is not None and self.constants[str(values[0])].dtype == kind.numpy():
                self._pass_on(node, str(values[0]))
                return
        known = [name is None or name in self.constants for name in values]
        if all(known) and node.op_type not in ("RandomNormal", "RandomUniform"):
            self._fold(node, values)
            return
        hosted = [known or name in self.hosted for known, name in zip(known, values, strict=True)]
        if all(hosted) and not self._is_lookup(node, values):
            self._on_numbers(node, values)
            return
        build = find_operator(node.op_type)
        if build is None:
            raise InputError(f"{self.where(node)} is an operator that lbyl can't read; {_WAY_OUT}")
        made = _Node(self, node, place)
        extra = next((index for index in range(1, made.outputs) if made.is_used(index)), None)
        if extra is not None and node.op_type not in _SEVERAL_OUTPUTS:
            raise made.refuse(f"its output {self._output_of(node, extra)} is used; {_WAY_OUT}")
        build(made)

    def _is_lookup(self, node: ir.Node, values: Sequence[str | None]) -> bool:
        """Whether a node looks up rows of a table of weights, as positions, whose indices follow from a shape."""
        table = self.constants.get(str(values[0])) if node.op_type == "Gather" else None
        return table is not None and table.ndim == 2 and _is_real(table) and table.size > 64

    def _output_of(self, node: ir.Node, index: int) -> str:
        """The name that the operator's definition gives to an output."""
        with suppress(Exception):
            schema = library("onnx").defs.get_schema(node.op_type, self.opsets.get("", 1), "")
            return str(schema.outputs[index].name)
        return str(node.outputs[index].name)

    def _pass_on(self, node: ir.Node, name: str) -> None:
        """Record that the node's output is a constant under another name."""
        other = str(node.outputs[0].name)
        self.constants[other] = self.constants[name]
        self.leaf[other] = other
        if name in self.origins:
            self.origins[other] = self.origins[name]

    def _check(self, node: ir.Node) -> None:
        where, name = self.where(node), node.op_type
        if name.startswith(_QUANTIZED):
            raise InputError(f"{where} is part of a quantized network; compress the float network, then quantize it")
        if name in _CONTROL:
            why = self._decides(node) if name == "If" else "; export the network without it"
            raise InputError(f"{where} is control flow, which lbyl can't read{why}")
        if node.domain not in _STANDARD:
            raise InputError(
                f"{where} has the domain {node.domain!r}, whose operators lbyl can't read; export the network without "
                "them, or take the file as it was before a runtime's optimizer wrote them"
            )

    def _decides(self, node: ir.Node) -> str:
        """What decides which branch of an If runs, and how to get a file without it."""
        by_size: set[str] = set()
        by_value: set[str] = set()
        inputs = {str(value.name) for value in self.model.graph.inputs} - set(self.model.graph.initializers)
        left, seen = [(value, False) for value in node.inputs], set()
        while left:
            value, sized = left.pop()
            if value is None or (value.name, sized) in seen:
                continue
            seen.add((value.name, sized))
            if value.name in inputs:
                (by_size if sized else by_value).add(repr(value.name))
            made = value.producer()
            if made is not None:
                left += [(item, sized or made.op_type in ("Shape", "Size")) for item in made.inputs]
        if by_value:
            told = ", ".join(sorted(by_value))
            return f": which branch runs depends on the values of {told}; export the network for one of them"
        if not by_size:
            return f"; {_FOLD} removes it, because constants decide which branch runs"
        told = ", ".join(sorted(by_size))
        return f": which branch runs depends on the sizes of {told}; fix all sizes of the inputs ({_FIX}), then {_FOLD}"

    def where(self, node: ir.Node) -> str:
        """The name of a node in errors."""
        return f"{self.file.path}: node {node.name or node.outputs[0].name!r} ({node.op_type})"

    def named(self, value: ir.Value | None) -> str | None:
        """The name of a value; None if the operand is left out."""
        return None if value is None or not value.name else value.name

    def _numbers(self, node: ir.Node) -> Numbers:
        serde = library("onnx_ir.serde")
        return Numbers(serde.serialize_node(node), self.opsets, self.model.ir_version or 8)

    def _fold(self, node: ir.Node, values: Sequence[str | None]) -> None:
        """Compute a node that depends only on constants."""
        arrays = [None if name is None else self.constants[name] for name in values]
        found = self._numbers(node)(*arrays)
        names = [str(value.name) for value in node.outputs if value.name]
        for name, array in zip(names, found, strict=True):
            self.constants[name] = array
        self.origins[names[0]] = self._moved(node, values, len(found[0].reshape(-1))) or [None] * found[0].size
        self.leaf[names[0]] = self.leaf[str(values[0])] if node.op_type == "Identity" else names[0]
        if node.op_type in _VIEWS and values[0] is not None:
            self.views[names[0]] = node

    def _on_numbers(self, node: ir.Node, values: Sequence[str | None]) -> None:
        """Make a step for arithmetic on shapes, which is computed each time the network runs."""
        names = tuple(str(value.name or "") for value in node.outputs)
        sources = tuple(self._number(name) for name in values)
        self.steps.append(
            Step(self.where(node), sources, tuple(name for name in names if name), "", self._numbers(node))
        )
        self.hosted.update(names)
        moved = self._moved(node, values, None)
        if moved is not None:
            self.origins[names[0]] = moved

    def _number(self, name: str | None) -> Source:
        if name is None:
            return None
        return Known(self.constants[name]) if name in self.constants else Value(name)

    def late_constant(self, value: ir.Value | None) -> np.ndarray | None:
        """The value of a constant whose node comes later in the file; None if it is not a constant."""
        node = None if value is None else value.producer()
        if value is None or node is None:
            return None
        if node.op_type != "Constant" and not all(
            item is None or str(item.name) in self.constants or self.late_constant(item) is not None
            for item in node.inputs
        ):
            return None
        place = self.order.get(id(node), -1)
        if place < 0 or len(node.inputs) > 4:
            return None
        if place not in self.done:
            self.done.add(place)
            self._read(node, place)
        return self.constants.get(str(value.name))

    # -- constants --------------------------------------------------------------------------------------

    def constant(self, name: str, array: np.ndarray) -> None:
        """Record a constant of the file."""
        self.constants[name] = array
        self.leaf[name] = name
        if array.dtype.kind in "iu" and array.ndim < 2 and array.size <= 64:
            self.origins[name] = [Origin(name, index) for index in range(array.size)]

    def _moved(self, node: ir.Node, values: Sequence[str | None], count: int | None) -> Origins | None:
        """The origins of the numbers in a node's output, if the node only moves numbers; None if unknown."""
        place = self.order[id(node)]
        first = self.origin(values[0], place, 0) if values else None
        array = self.constants.get(values[0] or "") if values else None
        if array is not None and node.op_type == "Shape":
            sizes: Origins = [Origin(str(values[0]), axis, size=True) for axis in range(array.ndim)]
            start, end = (node.attributes[name].value if name in node.attributes else None for name in ("start", "end"))
            return sizes[start:end]
        if node.op_type == "Expand" and first is not None and len(first) == count:
            return first
        shape = node.inputs[0].shape if values and node.inputs[0] is not None else None
        table = node.op_type in ("Concat", "Gather", "Slice") and shape is not None and len(shape) > 1
        if table or (array is not None and array.ndim > 1):
            # Parts of a table are not in the order of its numbers.
            return [None] * count if count is not None else self.unknown(node)
        if node.op_type in ("Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape"):
            return first
        if node.op_type == "Concat":
            parts = [self.origin(name, place, operand) for operand, name in enumerate(values)]
            return None if any(part is None for part in parts) else [item for part in parts for item in part or ()]
        if node.op_type in ("Gather", "Slice") and first is not None:
            rest = [self.constants.get(name) if name else None for name in values[1:]]
            if any(array is None and name for array, name in zip(rest, values[1:], strict=True)):
                return None
            taken = self._numbers(node)(np.arange(len(first)), *rest)[0].reshape(-1)
            return [first[int(index)] for index in taken]
        if count is None and node.op_type in ("Gather", "Slice"):
            count = self._taken(node, values)
        return [None] * count if count is not None else self.unknown(node)

    def _taken(self, node: ir.Node, values: Sequence[str | None]) -> int | None:
        """How many numbers a node selects, if this follows from its indices; else None."""
        indices = [self.constants.get(name) if name else None for name in values[1:3]]
        if node.op_type == "Gather":
            return None if indices[0] is None else indices[0].size
        step = self.constants.get(values[4] or "") if len(values) > 4 else np.ones(1)
        if len(indices) < 2 or any(index is None or index.size != 1 for index in (*indices, step)):
            return None
        if step is None or step.reshape(-1)[0] != 1:
            return None
        start, end = (int(index.reshape(-1)[0]) for index in indices if index is not None)
        return end - start if 0 <= start < end < 16 or start < end < 0 else None

    def origin(self, name: str | None, node: int, operand: int) -> Origins | None:
        """The origins of the numbers that a node uses; None if it is not known how many there are."""
        if name is None:
            return None
        if name in self.origins:
            return [item and item.used(node, operand) for item in self.origins[name]]
        return [None] * self.constants[name].size if name in self.constants else None

    def unknown(self, node: ir.Node) -> Origins | None:
        """Unknown origins for a node's output, as many as the file's shapes state."""
        shape = node.outputs[0].shape
        sizes = [size if isinstance(size, int) else -1 for size in shape] if shape is not None else [-1]
        return None if min(sizes, default=1) < 0 else [None] * math.prod(sizes)

    def source(self, value: ir.Value | None, node: int = -1, operand: int = -1) -> Source:
        """An operand of a step: a value, a tensor of the network, or a constant."""
        name = self.named(value)
        if name is None or name not in self.constants:
            return None if name is None else Value(name)
        array = self.constants[name]
        if not _is_real(array) or array.size == 1:
            return Known(array)
        leaf = self.leaf[name]
        path = self.bare.get(leaf)
        if path is None:
            path = self._hold(leaf, from_file(array, "same", 1.0))
            # A file often stores equal vectors of unrelated layers as one constant, so each use gets its own tensor.
            if array.size > _LARGEST_APART:
                self.bare[leaf] = path
        self.links.append(Link(path, name, "same", 1.0, node, operand))
        return Held(path)

    def path(self, name: str) -> Iterator[tuple[str, ir.Node]]:
        """The nodes that turn a constant of the file into this one, from the last to the first, with their outputs."""
        while name in self.views:
            yield name, self.views[name]
            name = str(self.views[name].inputs[0].name)  # pyright: ignore[reportOptionalMemberAccess]

    def is_zero(self, value: ir.Value | None) -> bool:
        """Whether a value holds zeros only, whatever its shape; also if it is left out."""
        name = self.named(value)
        if value is None or name is None:
            return True
        if name in self.constants:
            return not self.constants[name].any()
        node = value.producer()
        if node is None:
            return False
        if node.op_type == "ConstantOfShape":
            filled = node.attributes.get("value")
            return filled is None or not _attribute(filled).any()
        moved = node.inputs if node.op_type == "Concat" else node.inputs[:1] if node.op_type in _MOVES else ()
        return bool(moved) and all(self.is_zero(item) for item in moved)

    def stored(self, name: str) -> str:
        """The name of the constant that this one only is a view of, or copies of; its own name if it was computed."""
        for _, node in self.path(name):
            name = str(node.inputs[0].name)  # pyright: ignore[reportOptionalMemberAccess]
        return name

    def is_stored(self, name: str) -> bool:
        """Whether a constant is in the file, or is a view of such a constant."""
        place = self.producers.get(self.stored(name))
        copied = any(node.op_type == "Expand" for _, node in self.path(name))
        return not copied and (place is None or self.nodes[place].op_type == "Constant")

    def stored_as(self, name: str, layout: str, axes: int) -> tuple[str, str]:
        """The constant in the file and the layout of a layer's weight that only was turned and changed in type."""
        # Layers that use a table as it is and turned have one weight, as the tied layers of language models.
        start, turned = name, layout == "transposed"
        for _, node in self.path(name):
            order = node.attributes.get("perm")
            if node.op_type == "Transpose" and axes == 2 and (order is None or list(order.value) == [1, 0]):
                turned = not turned
            elif node.op_type not in ("Cast", "Identity"):
                return start, layout
            name = str(node.inputs[0].name)  # pyright: ignore[reportOptionalMemberAccess]
        if self.constants[name].dtype != self.constants[start].dtype and not _is_real(self.constants[name]):
            return start, layout
        return name, layout if layout == "flat" else "transposed" if turned else "same"

    def _hold(self, name: str, tensor: Tensor) -> str:
        path = self.place(name)
        room, leaf = self._room(path)
        real = tensor.is_floating_point() and self.is_stored(name)
        if real and bool(torch.isfinite(tensor).all()) and float(tensor.abs().max()) < _LARGEST_WEIGHT:
            room.register_parameter(leaf, nn.Parameter(tensor))
        else:
            room.register_buffer(leaf, tensor)
        return path

    # -- modules ----------------------------------------------------------------------------------------

    def place(self, name: str) -> str:
        """An unused path in the network for a name of the file."""
        # PyTorch marks repeated calls of a module with an "@" after its name.
        parts = [part or "_" for part in name.replace("@", "_").split(".")]
        room: nn.Module = self.made
        for index, part in enumerate(parts[:-1]):
            found = room._modules.get(part)
            if (found is None and hasattr(room, part)) or (found is not None and not isinstance(found, _Room)):
                part = _free(room, part)
                found = None
            if found is None:
                found = _Room()
                room.add_module(part, found)
            parts[index] = part
            room = found
        parts[-1] = _free(room, parts[-1])
        return ".".join(parts)

    def _room(self, path: str) -> tuple[nn.Module, str]:
        parent, _, leaf = path.rpartition(".")
        return self.made.get_submodule(parent), leaf

    def add(self, name: str, module: nn.Module) -> str:
        """Add a module under a name of the file, and return its path."""
        path = self.place(name)
        room, leaf = self._room(path)
        room.add_module(leaf, module)
        return path


def graph_names(graph: ir.Graph) -> set[str]:
    """Names of a graph's inputs and initializers."""
    return {str(value.name) for value in graph.inputs} | set(graph.initializers)


def _free(room: nn.Module, name: str) -> str:
    while hasattr(room, name):
        name += "_"
    return name


class _Node:
    """A node while it is read: see :class:`lbyl.io.onnx.operators.base.Node`."""

    def __init__(self, reader: Reader, node: ir.Node, place: int) -> None:
        self._reader, self._node, self._place = reader, node, place
        self.operator, self.opset = node.op_type, reader.opsets.get("", 1)
        self.attributes: Mapping[str, Any] = {name: _attribute(item) for name, item in node.attributes.items()}
        self.operands, self.outputs = len(node.inputs), len(node.outputs)
        self._bias: ir.Node | None = None
        self._made = tuple(str(value.name or "") for value in node.outputs)
        self._path = ""
        self.where = reader.where(node)

    def _value(self, index: int) -> ir.Value | None:
        return self._node.inputs[index] if index < len(self._node.inputs) else None

    def source(self, index: int) -> Source:
        return self._reader.source(self._value(index), self._place, index)

    def constant(self, index: int) -> np.ndarray | None:
        return self._reader.constants.get(self._reader.named(self._value(index)) or "")

    def is_used(self, output: int) -> bool:
        if output >= self.outputs or not self._node.outputs[output].name:
            return False
        value = self._node.outputs[output]
        return bool(value.uses()) or value.is_graph_output()

    def is_constant(self, index: int) -> bool:
        return self.constant(index) is not None

    def run(self, function: Callable[..., Any], *sources: Source, floating: bool = False) -> None:
        self._reader.steps.append(Step(self.where, sources, self._made, "", function, floating))

    def numbers(self, function: Callable[..., Any], *sources: Source) -> None:
        self.run(function, *sources)
        self._reader.hosted.update(self._made)
        moved = self._reader.unknown(self._node)
        if moved is not None:
            self._reader.origins[self._made[0]] = moved

    def first(self, function: Callable[..., Any], *sources: Source) -> Source:
        name = f"{self._made[0]} (operand)"
        self._reader.steps.append(Step(self.where, sources, (name,), "", function))
        return Value(name)

    def layer(self, module: nn.Module, held: Mapping[str, tuple[int, str, float]], *sources: Source) -> None:
        reader = self._reader
        for name, (operand, layout, scale) in held.items():
            node, value = (self._node, self._value(operand)) if operand >= 0 else self._operand_of_bias(operand)
            constant = reader.named(value) or ""
            array = reader.constants[constant]
            key = (*reader.stored_as(reader.leaf[constant], layout, array.ndim), scale)
            held_before = reader.held.get(key)
            if held_before is None:
                made = from_file(array, layout, scale)
                held_before = made if name in module._buffers else nn.Parameter(made)
                if array.size > max(array.shape, default=1):  # as above, no vectors
                    reader.held[key] = held_before
            table: dict[str, Any] = module._buffers if name in module._buffers else module._parameters
            table[name] = held_before
        self._path = reader.add(self._name(next(iter(held.values()))[0]), module)
        for name, (operand, layout, scale) in held.items():
            node, value = (self._node, self._value(operand)) if operand >= 0 else self._operand_of_bias(operand)
            place = operand if operand >= 0 else -operand - 1
            link = Link(f"{self._path}.{name}", reader.named(value) or "", layout, scale, reader.order[id(node)], place)
            reader.links.append(link)
        reader.steps.append(Step(self.where, sources, self._made, self._path))

    def _operand_of_bias(self, operand: int) -> tuple[ir.Node, ir.Value | None]:
        assert self._bias is not None
        return self._bias, self._bias.inputs[-operand - 1]

    def _name(self, operand: int) -> str:
        """The layer's name: that of its weight without the last part, or else that of the node."""
        value = self._value(operand)
        prefix, _, last = self._reader.leaf[self._reader.named(value) or ""].rpartition(".")
        return prefix if prefix and last in ("weight", "w_0") else self._node.name or self._made[0]

    def recurrent(self, module: nn.RNNBase, gates: Sequence[int], *sources: Source) -> None:
        reader, path = self._reader, self._reader.add(self._name(1), module)
        self._path = path
        for direction in range(2 if module.bidirectional else 1):
            end = "_reverse" if direction else ""
            for name, operand, half in _TENSORS:
                array, value = self.constant(operand), reader.named(self._value(operand))
                if array is None or value is None:
                    continue
                setattr(module, f"{name}{end}", nn.Parameter(from_gates(array, direction, half, gates)))
                part = Part(direction, half, tuple(gates))
                reader.links.append(Link(f"{path}.{name}{end}", value, "part", 1.0, self._place, operand, part))
        self.width("hidden_size", "hidden_size")
        reader.steps.append(Step(self.where, sources, self._made, path))

    def is_number(self, index: int) -> bool:
        name = self._reader.named(self._value(index)) or ""
        return name in self._reader.constants or name in self._reader.hosted

    def is_zero(self, index: int) -> bool:
        return self._reader.is_zero(self._value(index))

    def sized(self, module: Any, *sources: Source, sizes: list[tuple[int, str]]) -> None:
        reader = self._reader
        found: list[tuple[int | None, NumberLink | None]] = []
        path = self._path = reader.add(self._node.name or self._made[0], module)
        for operand, attribute in sizes:
            if attribute:
                numbers = list(self.attributes.get(attribute) or [])
                for index, item in enumerate(numbers):
                    link = NumberLink(path, "sizes", len(found), "", index, self._place, -1, attribute)
                    found.append((int(item), link))
                continue
            name = reader.named(self._value(operand)) or ""
            origins = reader.origin(name, self._place, operand)
            if origins is None:
                found = []
                break
            for origin in origins:
                if origin is None:
                    found.append((None, None))
                else:
                    array = reader.constants[origin.value]
                    if origin.size:
                        found.append((array.shape[origin.index], None))
                        continue
                    value = int(array.reshape(-1)[origin.index])
                    edge = origin.node, origin.operand
                    link = NumberLink(path, "sizes", len(found), origin.value, origin.index, *edge)
                    found.append((value, link))
        module.sizes = [size for size, _ in found]
        reader.number_links += [link for _, link in found if link is not None]
        reader.steps.append(Step(self.where, sources, self._made, path))

    def bias(self, width: int, axis: int) -> int | None:
        reader, out = self._reader, self._node.outputs[0]
        uses = list(out.uses())
        if len(uses) != 1 or out.is_graph_output() or width == 1:
            return None
        node, place = uses[0].node, uses[0].idx
        if node.op_type != "Add" or node.domain not in ("", "ai.onnx") or len(node.inputs) != 2:
            return None
        other = reader.constants.get(reader.named(node.inputs[1 - place]) or "")
        if other is None:
            other = reader.late_constant(node.inputs[1 - place])
        if other is None or other.size != width or other.ndim <= axis or other.shape[other.ndim - 1 - axis] != width:
            return None
        if (other.ndim > axis + 2 and axis > 0) or not _is_real(other):
            return None
        self._bias = node
        reader.done.add(reader.order[id(node)])
        self._made = (str(node.outputs[0].name),)
        return -(1 - place) - 1

    def width(self, name: str, attribute: str) -> None:
        if attribute in self.attributes:
            link = NumberLink(self._path, name, None, "", None, self._place, -1, attribute)
            self._reader.number_links.append(link)

    def refuse(self, why: str) -> Exception:
        return InputError(f"{self.where} can't be read: {why}" + ("" if ";" in why else f"; {_WAY_OUT}"))


_TENSORS = (("weight_ih_l0", 1, None), ("weight_hh_l0", 2, None), ("bias_ih_l0", 3, 0), ("bias_hh_l0", 3, 1))
"""The tensors of PyTorch's recurrent layers, the operands that hold them, and which half of a bias they are."""


def _attribute(item: ir.Attr) -> Any:
    """The value of an attribute, with tensors as arrays."""
    value = item.value
    return value.numpy() if hasattr(value, "numpy") and not isinstance(value, (str, bytes)) else value


def _constant(node: ir.Node, where: str) -> np.ndarray:
    for name, item in node.attributes.items():
        if name == "value":
            return np.asarray(item.value.numpy())
        if name in ("value_int", "value_ints"):
            return np.asarray(item.value, dtype=np.int64)
        if name in ("value_float", "value_floats"):
            return np.asarray(item.value, dtype=np.float32)
    raise InputError(f"{where} holds no numbers")


def _is_real(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _symbol(size: Any) -> str:
    return str(getattr(size, "value", None) or UNNAMED)


def _last_uses(steps: Sequence[Step], outputs: Sequence[Source]) -> dict[int, tuple[str, ...]]:
    last: dict[str, int] = {}
    for number, step in enumerate(steps):
        last.update((source.name, number) for source in step.sources if isinstance(source, Value))
        last.update((name, number) for name in step.outputs if name and name not in last)
    for output in outputs:
        if isinstance(output, Value):
            last.pop(output.name, None)
    uses: dict[int, list[str]] = defaultdict(list)
    for name, number in last.items():
        uses[number].append(name)
    return {number: tuple(names) for number, names in uses.items()}
