"""Opens an ONNX file and checks it: its content must be valid, and it must not refer to files elsewhere."""

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
_LARGEST_FILLED = 2**28
_INSTALL = "install lbyl[export]"


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """A checked file. It never changes, so copies of a network share it.

    Attributes:
        path: the path of the file.
        sha256: SHA-256 of the file itself, without separate files that hold its weights.
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
        """The file's content, read again, so that the caller may change it.

        Raises:
            InputError: the file has changed since it was opened.
        """
        ir, onnx = library("onnx_ir"), library("onnx")
        if digest(self.path) != self.sha256:
            raise InputError(f"{self.path} has changed since it was read")
        proto = onnx.load(self.path, load_external_data=False)
        if not proto.graph.sparse_initializer:
            return ir.load(self.path)
        _fill(self.path, proto)  # the library leaves sparse initializers out
        model = library("onnx_ir.serde").deserialize_model(proto)
        library("onnx_ir.external_data").set_base_dir(model.graph, str(self.path.parent))
        return model


def library(name: str) -> Any:
    """Import a package that reads or runs ONNX files.

    Raises:
        InputError: the package is not installed.
    """
    import importlib
    import logging

    # Where nobody listens, Python writes what this package logs to stderr, tracebacks included. Errors say it better.
    logging.getLogger("onnx_ir").addHandler(logging.NullHandler())
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{name} can't be imported ({error}); {_INSTALL}") from error


def session(model: Path | bytes) -> Any:
    """A session of onnxruntime on the CPU, which logs nothing because its errors say the same.

    Raises:
        InputError: onnxruntime is not installed. Other exceptions are those that it raises for the model.
    """
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def open_file(path: Path) -> OnnxFile:
    """Open and check a file, without running it.

    Raises:
        InputError: the file can't be read, is damaged, holds no valid graph, or refers to weights outside its folder.
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
        raise InputError(f"{path} is not an ONNX file, or is truncated: {first_line(error)}") from error
    if not proto.graph.node:
        raise InputError(f"{path} is not an ONNX file, or is empty: its graph has no operator")
    _check_tensors(path, proto)
    try:
        if any(_is_external(tensor) for tensor in tensors(proto)):
            onnx.checker.check_model(str(path))
        else:
            onnx.checker.check_model(proto)
    except Exception as error:
        raise InputError(f"{path} is not a valid ONNX file: {_said(error)}") from error
    versions = {item.domain: item.version for item in proto.opset_import}
    return OnnxFile(path, digest(path), versions.get("", versions.get("ai.onnx", 1)))


def _fill(path: Path, proto: onnx.ModelProto) -> None:
    """Turn sparse initializers into full ones."""
    helper = library("onnx").numpy_helper
    for sparse in proto.graph.sparse_initializer:
        shape = tuple(sparse.dims)
        if math.prod(shape) > _LARGEST_FILLED:
            raise InputError(f"{path}: sparse tensor {sparse.values.name!r} has too many elements to be read as full")
        values, places = (helper.to_array(item, str(path.parent)) for item in (sparse.values, sparse.indices))
        full = np.zeros(shape, dtype=values.dtype)
        if places.ndim == 2:
            places = np.ravel_multi_index(tuple(places.T), shape)
        full.reshape(-1)[places] = values
        proto.graph.initializer.append(helper.from_array(full, sparse.values.name))
    del proto.graph.sparse_initializer[:]


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors in a file: initializers, constants, and those in subgraphs and functions."""
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
    """Raise InputError for a tensor whose data are missing, of the wrong size, or outside the file's folder."""
    onnx = library("onnx")
    for tensor in tensors(proto):
        told = f"{path}: tensor {tensor.name!r} is {'x'.join(map(str, tensor.dims)) or 'a scalar'}"
        if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > _LARGEST_TENSOR:
            raise InputError(f"{told}, which is too large for a file")
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{told} of an unknown data type ({tensor.data_type})") from None
        needed = math.prod(tensor.dims) * np.dtype(dtype).itemsize
        if _is_external(tensor):
            _check_external(path, tensor, needed, told)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != needed and np.dtype(dtype).itemsize > 1:
            raise InputError(f"{told}, but the file holds {len(tensor.raw_data)} bytes of it in place of {needed}")


def _check_external(path: Path, tensor: onnx.TensorProto, needed: int, told: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    where = Path(location)
    inside = location and not where.is_absolute() and ".." not in where.parts and ":" not in location
    file = (folder / where).resolve() if inside else folder
    if not inside or "\\" in location or not file.is_relative_to(folder) or file == folder:
        raise InputError(f"{told}, but its values are in {location!r}, which is outside the file's folder")
    if not file.is_file():
        raise InputError(f"{told}, but its values are in {location!r}, which does not exist")
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or needed)
    except ValueError:
        raise InputError(f"{told}, but its offset or length is not a number") from None
    if offset < 0 or length < 0 or offset + length > file.stat().st_size or length < needed:
        raise InputError(f"{told}, but {location!r} is too short to hold its values")


def _said(error: Exception) -> str:
    """The checker's error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("==>", "Context", "Bad node spec"))]
    return (useful or lines or [type(error).__name__])[0][:300]
