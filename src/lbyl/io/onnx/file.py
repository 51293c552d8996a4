"""An ONNX file, checked before anything is made of it: what it holds, and that it points nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lbyl.errors import InputError, first_line
from lbyl.io.files import digest

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_LARGEST_TENSOR = 2**36
_INSTALL = "install lbyl[export]"


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """A checked file. Copies of a network share it, for nobody changes it.

    Attributes:
        path: where it is.
        sha256: of the file itself, without the files that hold its weights.
        opset: version of the standard operators that it uses.
    """

    path: Path
    sha256: str
    opset: int

    def __copy__(self) -> OnnxFile:
        return self

    def __deepcopy__(self, memo: object) -> OnnxFile:
        return self

    def model(self) -> ir.Model:
        """The file's content, read anew: whoever asks may change it.

        Raises:
            InputError: the file is not the one any more that was read first.
        """
        ir = library("onnx_ir")
        if digest(self.path) != self.sha256:
            raise InputError(f"{self.path} has changed since it was read")
        return ir.load(self.path)


def library(name: str) -> Any:
    """A package that reads or runs ONNX files.

    Raises:
        InputError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{name} can't be imported ({error}); {_INSTALL}") from error


def open_file(path: Path) -> OnnxFile:
    """Check a file, as far as it can be checked without running it.

    Raises:
        InputError: it can't be read, is damaged, holds no valid graph, or names weights outside its folder.
    """
    onnx = library("onnx")
    path = path.absolute()
    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        proto = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf raises errors of its own
        raise InputError(f"{path} is no ONNX file, or is cut short: {first_line(error)}") from error
    if not proto.graph.node:
        raise InputError(f"{path} is no ONNX file, or an empty one: its graph has no operator")
    _check_tensors(path, proto)
    try:
        if any(_is_external(tensor) for tensor in tensors(proto)):
            onnx.checker.check_model(str(path))
        else:
            onnx.checker.check_model(proto)
    except Exception as error:
        raise InputError(f"{path} is no valid ONNX file: {_said(error)}") from error
    versions = {item.domain: item.version for item in proto.opset_import}
    return OnnxFile(path, digest(path), versions.get("", versions.get("ai.onnx", 1)))


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors that a file stores: initializers, constants, and those in subgraphs and functions."""
    yield from _in_graph(proto.graph)
    for function in proto.functions:
        yield from _in_nodes(function.node)


def _in_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Any) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _in_graph(attribute.g)
            for graph in attribute.graphs:
                yield from _in_graph(graph)


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == 1


def _check_tensors(path: Path, proto: onnx.ModelProto) -> None:
    """Raise InputError for tensors that are larger than what is stored of them, or stored outside the folder."""
    onnx = library("onnx")
    for tensor in tensors(proto):
        told = f"{path}: tensor {tensor.name!r} is {'x'.join(map(str, tensor.dims)) or 'a scalar'}"
        if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > _LARGEST_TENSOR:
            raise InputError(f"{told}, which no file can hold")
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{told} of an unknown data type ({tensor.data_type})") from None
        needed = math.prod(tensor.dims) * np.dtype(dtype).itemsize
        if _is_external(tensor):
            _check_external(path, tensor, needed, told)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != needed and np.dtype(dtype).itemsize > 1:
            raise InputError(f"{told}, but {len(tensor.raw_data)} bytes of it are there, not {needed}")


def _check_external(path: Path, tensor: onnx.TensorProto, needed: int, told: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    where = Path(location)
    inside = location and not where.is_absolute() and ".." not in where.parts and ":" not in location
    file = (folder / where).resolve() if inside else folder
    if not inside or "\\" in location or not file.is_relative_to(folder) or file == folder:
        raise InputError(f"{told} and names its values at {location!r}, which is outside the file's folder")
    if not file.is_file():
        raise InputError(f"{told} and its values are in {location!r}, which is not there")
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or needed)
    except ValueError:
        raise InputError(f"{told}, with an offset or length that is no number") from None
    if offset < 0 or length < 0 or offset + length > file.stat().st_size or length < needed:
        raise InputError(f"{told}, and {location!r} is too short to hold its values")


def _said(error: Exception) -> str:
    """What the checker says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("==>", "Context", "Bad node spec"))]
    return (useful or lines or [type(error).__name__])[0][:300]
