"""Small ONNX files, built node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def real(seed: int, *shape: int) -> np.ndarray:
    fan = max(1, int(np.prod(shape[1:])))
    return (np.random.default_rng(seed).normal(size=shape) / np.sqrt(fan)).astype(np.float32)


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """A node by its names, with spaces between; it is called after its first output."""
    name = attributes.pop("name", f"make {outputs.split()[0]}")
    domain = attributes.pop("domain", "")
    names = [item if item != "_" else "" for item in inputs.split()]
    return helper.make_node(operator, names, outputs.split(), name=name, domain=domain, **attributes)


def constant(name: str, array: Any) -> onnx.NodeProto:
    """A Constant node."""
    return node("Constant", "", name, value=numpy_helper.from_array(np.asarray(array), name))


def model(
    nodes: Sequence[onnx.NodeProto],
    initializers: Mapping[str, Any],
    inputs: Mapping[str, Sequence[Any]] | None = None,
    outputs: Mapping[str, Sequence[Any]] | None = None,
    opset: int = 17,
    types: Mapping[str, int] | None = None,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model; sizes that are names are open."""
    types = types or {}

    def infos(shapes: Mapping[str, Sequence[Any]]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), list(shape))
            for name, shape in shapes.items()
        ]

    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in initializers.items()]
    graph = helper.make_graph(
        list(nodes), "net", infos(inputs or {"x": ("batch", 3, 16, 16)}), infos(outputs or {"y": ("batch", 5)}), stored
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    made = helper.make_model(graph, opset_imports=imports, ir_version=8, producer_name="by hand")
    made.metadata_props.add(key="classes", value="a,b,c,d,e")
    return made


def convnet() -> onnx.ModelProto:
    """Convolutions (one with a bias that is added, one depthwise), a batch norm, and a view with a width in it."""
    stored = {
        "stem.weight": real(0, 12, 3, 3, 3),
        "norm.weight": 1 + real(1, 12) / 4,
        "norm.bias": real(2, 12),
        "norm.mean": real(3, 12),
        "norm.var": 1 + np.abs(real(4, 12)),
        "depth.weight": real(5, 12, 1, 3, 3),
        "depth.bias": real(6, 12),
        "second_bias": real(8, 1, 16, 1, 1),
        "head.weight": real(9, 16, 5),
        "head.bias": real(10, 5),
        "one": np.array([0]),
        "width": np.array([16]),
    }
    nodes = [
        constant("second_weight", real(7, 16, 12, 1, 1)),
        node("Conv", "x stem.weight", "a", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", "a norm.weight norm.bias norm.mean norm.var", "b"),
        node("Relu", "b", "c"),
        node("Conv", "c depth.weight depth.bias", "d", group=12, pads=[1, 1, 1, 1]),
        node("Relu", "d", "e"),
        node("Conv", "e second_weight", "f"),
        node("Add", "f second_bias", "g"),
        node("Relu", "g", "h"),
        node("GlobalAveragePool", "h", "i"),
        node("Shape", "i", "s"),
        node("Gather", "s one", "count", axis=0),
        node("Concat", "count width", "shape", axis=0),
        node("Reshape", "i shape", "j"),
        node("MatMul", "j head.weight", "k"),
        node("Add", "k head.bias", "y"),
    ]
    return model(nodes, stored)


def attention(heads: int = 4, size: int = 6) -> onnx.ModelProto:
    """Token ids, a mask, attention with heads in its views (one constant for all of them), a split, and slices."""
    width, inner = 20, heads * size
    stored = {
        "table": real(0, 50, width),
        "qkv": real(1, width, 3 * inner),
        "qkv_bias": real(2, 3 * inner),
        "out": real(3, inner, width),
        "out_bias": real(4, width),
        "up": real(5, width, 2 * 16),
        "up_bias": real(6, 2 * 16),
        "down": real(7, 16, width),
        "head": real(8, width, 5),
        "sizes": np.array([inner, inner, inner]),
        "halves": np.array([0]), "sixteen": np.array([16]), "end": np.array([2**31 - 1]), "last": np.array([-1]),
        "view": np.array([0, -1, heads, size]),
        "back": np.array([0, -1, inner]),
        "scale": np.array(size**-0.5, dtype=np.float32),
        "far": np.array(1e4, dtype=np.float32),
        "one": np.array(1.0, dtype=np.float32),
        "axes": np.array([1, 2]),
        "first": np.array([1]),
    }  # fmt: skip
    views = [node("Reshape", f"{n} view", f"{n}v") for n in "qkv"]
    turned = [node("Transpose", f"{n}v", f"{n}t", perm=[0, 2, 3, 1] if n == "k" else [0, 2, 1, 3]) for n in "qkv"]
    nodes = [
        node("Gather", "table ids", "e"),
        node("MatMul", "e qkv", "p"),
        node("Add", "p qkv_bias", "pb"),
        node("Split", "pb sizes", "q k v", axis=2),
        *views,
        *turned,
        node("MatMul", "qt kt", "s"),
        node("Mul", "s scale", "ss"),
        node("Cast", "mask", "m", to=TensorProto.FLOAT),
        node("Sub", "one m", "mm"),
        node("Mul", "mm far", "mf"),
        node("Unsqueeze", "mf axes", "mu"),
        node("Sub", "ss mu", "sm"),
        node("Softmax", "sm", "w", axis=-1),
        node("MatMul", "w vt", "o"),
        node("Transpose", "o", "ot", perm=[0, 2, 1, 3]),
        node("Reshape", "ot back", "or"),
        node("MatMul", "or out", "oo"),
        node("Add", "oo out_bias", "ob"),
        node("Add", "ob e", "r"),
        node("MatMul", "r up", "u"),
        node("Add", "u up_bias", "ub"),
        node("Slice", "ub halves sixteen last", "u1"),
        node("Slice", "ub sixteen end last", "u2"),
        node("Sigmoid", "u2", "g"),
        node("Mul", "u1 g", "ug"),
        node("MatMul", "ug down", "d"),
        node("Add", "d r", "r2"),
        node("ReduceMean", "r2", "z", axes=[1], keepdims=0),
        node("MatMul", "z head", "y"),
    ]
    inputs = {"ids": ("batch", "tokens"), "mask": ("batch", "tokens")}
    return model(nodes, stored, inputs, types={"ids": TensorProto.INT64, "mask": TensorProto.INT64})


def save(made: onnx.ModelProto, path: Path) -> Path:
    onnx.save(made, path)
    return path


def run(path: Path, *inputs: Any) -> list[np.ndarray]:
    """What onnxruntime makes of inputs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return session.run(None, {name: np.asarray(value) for name, value in zip(names, inputs, strict=True)})
