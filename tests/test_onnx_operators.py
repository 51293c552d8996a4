"""Each operator that is read from ONNX files, against onnxruntime: tiny files, a row each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import lbyl
from lbyl.io.onnx.operators import operator_names

RNG = np.random.default_rng(0)
REAL, WHOLE, TRUTH = np.float32, np.int64, np.bool_


def real(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(REAL)


def positive(*shape: int) -> np.ndarray:
    return (np.abs(RNG.normal(size=shape)) + 0.1).astype(REAL)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=WHOLE)


def below(top: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, top, shape).astype(WHOLE)


def truth(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape) > 0


def write(
    path: Path,
    operator: str,
    inputs: list[np.ndarray | None],
    constants: dict[int, np.ndarray],
    attributes: dict[str, Any],
    opset: int,
    outputs: int,
) -> list[np.ndarray]:
    """A file of one node; some of its inputs are initializers, and the rest is returned."""
    names = ["" if array is None and place not in constants else f"in{place}" for place, array in enumerate(inputs)]
    asked = [(name, array) for name, array in zip(names, inputs, strict=True) if array is not None]
    node = helper.make_node(operator, names, [f"out{n}" for n in range(outputs)], name="the_node", **attributes)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in asked
    ]
    stored = [numpy_helper.from_array(array, f"in{place}") for place, array in constants.items()]
    graph = helper.make_graph(
        [node], "one", infos, [onnx.ValueInfoProto(name=f"out{n}") for n in range(outputs)], stored
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    inferred = onnx.shape_inference.infer_shapes(model)
    known = {value.name: value for value in inferred.graph.output}
    for output in model.graph.output:
        kind = known[output.name].type.tensor_type
        if kind.HasField("shape"):
            output.CopyFrom(known[output.name])
        else:  # operators that are made of others have no shapes
            output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, asked[0][1].shape))
    onnx.save(model, path)
    return [array for _, array in asked]


Row = tuple[str, list[Any], dict[int, np.ndarray], dict[str, Any], int, int]


def row(operator: str, *inputs: Any, constants: dict[int, Any] | None = None, opset: int = 17, outputs: int = 1,
        **attributes: Any) -> Row:  # fmt: skip
    return operator, list(inputs), constants or {}, attributes, opset, outputs


X = real(2, 4, 6, 5)
UNARY = [
    row(name, real(2, 3, 4))
    for name in (
        "Abs", "Atan", "Ceil", "Cos", "Erf", "Exp", "Floor", "Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign",
        "Sin", "Sinh", "Cosh", "Softplus", "Softsign", "Tan", "Tanh", "Identity", "HardSigmoid", "LeakyRelu", "Elu",
        "Selu", "Celu", "ThresholdedRelu", "HardSwish", "IsNaN", "Asinh", "Shrink",
    )
]  # fmt: skip
ROWS = [
    *UNARY,
    row("Acos", (RNG.uniform(-0.9, 0.9, (3, 4))).astype(REAL)),
    row("Acosh", positive(3, 4) + 1),
    row("Asin", (RNG.uniform(-0.9, 0.9, (3, 4))).astype(REAL)),
    row("Atanh", (RNG.uniform(-0.9, 0.9, (3, 4))).astype(REAL)),
    row("Log", positive(3, 4)),
    row("Sqrt", positive(3, 4)),
    row("Mish", real(3, 4), opset=18),
    row("Gelu", real(3, 4), opset=20),
    row("Gelu", real(3, 4), opset=20, approximate="tanh"),
    row("IsInf", np.array([1, np.inf, -np.inf], dtype=REAL), detect_negative=0),
    row("Not", truth(3, 4)),
    row("BitwiseNot", below(9, 3), opset=18),
    *(row(name, real(2, 3, 4), real(3, 1)) for name in ("Add", "Sub", "Mul", "Div")),
    *(row(name, real(2, 3, 4), None, constants={1: real(4)}) for name in ("Add", "Sub", "Mul", "Div")),
    *(row(name, None, real(2, 3), constants={0: np.array(2.5, REAL)}) for name in ("Add", "Sub", "Mul", "Div")),
    row("Div", below(9, 3, 4) - 4, below(3, 3, 4) + 1),
    row("Pow", positive(2, 3), None, constants={1: np.array(3, REAL)}),
    *(row(name, real(3, 4), real(3, 4)) for name in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    *(row(name, truth(3, 4), truth(3, 4)) for name in ("And", "Or", "Xor")),
    *(row(name, below(9, 3), below(9, 3), opset=18) for name in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    row("BitShift", below(9, 3).astype(np.uint8), below(3, 3).astype(np.uint8), direction="LEFT"),
    row("Mod", below(9, 3), below(3, 3) + 1),
    row("Mod", real(4), positive(4), fmod=1),
    *(row(name, real(3, 4), real(4), real(3, 1)) for name in ("Sum", "Max", "Min", "Mean")),
    row("PRelu", real(2, 3, 4), None, constants={1: positive(3, 1)}),
    row("Clip", real(3, 4), None, None, constants={1: np.array(-0.5, REAL), 2: np.array(0.5, REAL)}),
    row("Clip", real(3, 4), None, None, constants={2: np.array(0.5, REAL)}),
    row("Clip", real(3, 4), opset=6, min=0.0, max=6.0),
    row("Where", truth(3, 4), real(3, 4), real(4)),
    row("Cast", real(3, 4), to=TensorProto.INT64),
    row("Cast", below(3, 4), to=TensorProto.FLOAT),
    row("CastLike", real(3, 4), below(3, 4)),
    # convolution and pooling
    row("Conv", X, None, None, constants={1: real(8, 4, 3, 3), 2: real(8)}, pads=[1, 1, 1, 1], strides=[2, 1]),
    row("Conv", X, None, constants={1: real(8, 2, 3, 3)}, group=2, dilations=[2, 1], pads=[2, 0, 1, 1]),
    row("Conv", X, None, constants={1: real(4, 1, 3, 3)}, group=4, auto_pad="SAME_UPPER", strides=[2, 2]),
    row("Conv", X, None, constants={1: real(4, 4, 2, 2)}, auto_pad="SAME_LOWER"),
    row("Conv", X, None, constants={1: real(4, 4, 3, 3)}, auto_pad="VALID"),
    row("Conv", real(2, 3, 9), None, constants={1: real(5, 3, 3)}),
    row("Conv", real(1, 2, 4, 5, 6), None, constants={1: real(3, 2, 2, 2, 2)}),
    row("Conv", X, real(8, 4, 3, 3), kernel_shape=[3, 3]),
    row("ConvTranspose", X, None, None, constants={1: real(4, 3, 2, 2), 2: real(3)}, strides=[2, 2]),
    row("ConvTranspose", X, None, constants={1: real(4, 3, 3, 3)}, strides=[2, 2], pads=[1, 1, 1, 1],
        output_padding=[1, 1]),
    row("MaxPool", X, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 0]),
    row("MaxPool", X, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    row("MaxPool", X, kernel_shape=[3, 3], pads=[0, 0, 1, 1], strides=[2, 2]),
    row("AveragePool", X, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    row("AveragePool", X, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    row("AveragePool", X, kernel_shape=[3, 3], pads=[0, 0, 1, 1]),
    row("AveragePool", X, kernel_shape=[2, 2], auto_pad="SAME_UPPER"),
    row("GlobalAveragePool", X),
    row("GlobalMaxPool", X),
    # products
    row("MatMul", real(2, 3, 4), real(2, 4, 5)),
    row("MatMul", real(2, 3, 4), None, constants={1: real(4, 5)}),
    row("MatMul", None, real(2, 4, 5), constants={0: real(3, 4)}),
    row("Gemm", real(3, 4), None, None, constants={1: real(5, 4), 2: real(5)}, transB=1),
    row("Gemm", real(3, 4), None, None, constants={1: real(4, 5), 2: real(5)}, alpha=0.5, beta=2.0),
    row("Gemm", real(4, 3), real(4, 5), real(3, 1), transA=1, alpha=2.0),
    row("Einsum", real(2, 3, 4), real(2, 4, 5), equation="bij,bjk->bik"),
    # norms
    row("BatchNormalization", X, *[None] * 4,
        constants={1: real(4), 2: real(4), 3: real(4), 4: positive(4)}, epsilon=1e-3),
    row("LayerNormalization", real(2, 3, 8), None, None, constants={1: real(8), 2: real(8)}),
    row("LayerNormalization", real(2, 3, 8), None, None, constants={1: real(3, 8), 2: real(3, 8)}, axis=1),
    row("GroupNormalization", X, None, None, constants={1: real(4), 2: real(4)}, num_groups=2, opset=21),
    row("InstanceNormalization", X, None, None, constants={1: real(4), 2: real(4)}),
    row("RMSNormalization", real(2, 3, 8), None, constants={1: real(8)}, opset=23),
    # recurrent layers
    row("LSTM", real(5, 2, 3), *[None] * 3, constants={1: real(1, 16, 3), 2: real(1, 16, 4), 3: real(1, 32)},
        hidden_size=4, outputs=3),
    row("LSTM", real(5, 2, 3), *[None] * 4, real(2, 2, 4), real(2, 2, 4),
        constants={1: real(2, 16, 3), 2: real(2, 16, 4), 3: real(2, 32)}, hidden_size=4, direction="bidirectional",
        outputs=3),
    row("LSTM", real(5, 2, 3), None, None, constants={1: real(1, 16, 3), 2: real(1, 16, 4)}, hidden_size=4,
        direction="reverse"),
    row("GRU", real(5, 2, 3), *[None] * 3, constants={1: real(2, 12, 3), 2: real(2, 12, 4), 3: real(2, 24)},
        hidden_size=4, linear_before_reset=1, direction="bidirectional", outputs=2),
    row("GRU", real(5, 2, 3), None, None, None, None, real(1, 2, 4),
        constants={1: real(1, 12, 3), 2: real(1, 12, 4)}, hidden_size=4, linear_before_reset=1, direction="reverse"),
    row("RNN", real(5, 2, 3), *[None] * 3, constants={1: real(1, 4, 3), 2: real(1, 4, 4), 3: real(1, 8)},
        hidden_size=4, activations=["Relu"]),
    row("RNN", real(5, 2, 3), *[None] * 3, constants={1: real(2, 4, 3), 2: real(2, 4, 4), 3: real(2, 8)},
        hidden_size=4, direction="bidirectional", outputs=2),
    row("LRN", X, size=3, alpha=0.1, beta=0.5, bias=1.5),
    row("MeanVarianceNormalization", X),
    row("LpNormalization", real(3, 4), axis=1, p=2),
    row("Dropout", real(3, 4)),
    # reductions
    *(row(name, positive(2, 3, 4), axes=[1], keepdims=keep)
      for keep, name in enumerate(("ReduceL1", "ReduceL2"))),
    *(row(name, positive(2, 3, 4), axes=[-1, 0])
      for name in ("ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
                   "ReduceSumSquare")),
    row("ReduceSum", real(2, 3, 4), None, constants={1: ints(1)}),
    row("ReduceMean", real(2, 3, 4), None, constants={1: ints(1, 2)}, opset=18, keepdims=0),
    row("ReduceMean", real(2, 3, 4)),
    row("ArgMax", real(3, 4), axis=1),
    row("ArgMin", real(3, 4), axis=0, keepdims=0),
    row("Softmax", real(2, 3, 4), axis=1),
    row("Softmax", real(2, 3, 4), axis=1, opset=11),
    row("LogSoftmax", real(2, 3, 4)),
    row("Hardmax", real(2, 3)),
    row("CumSum", real(3, 4), None, constants={1: np.array(1, WHOLE)}, exclusive=1, reverse=1),
    row("TopK", real(3, 8), None, constants={1: ints(3)}, outputs=2),
    # movement
    row("Reshape", X, None, constants={1: ints(0, -1, 5)}),
    row("Flatten", X),
    row("Flatten", X, axis=2),
    row("Transpose", X, perm=[0, 2, 3, 1]),
    row("Transpose", real(2, 3)),
    row("Squeeze", real(2, 1, 3, 1), None, constants={1: ints(1, 3)}),
    row("Squeeze", real(2, 1, 3), opset=11, axes=[1]),
    row("Unsqueeze", real(2, 3), None, constants={1: ints(0, -1)}),
    row("Concat", real(2, 3), real(2, 4), axis=-1),
    row("Split", real(2, 6), axis=1, outputs=3),
    row("Split", real(2, 6), None, constants={1: ints(2, 4)}, axis=1, outputs=2),
    row("Split", real(2, 6), opset=11, split=[1, 5], axis=1, outputs=2),
    row("Slice", X, None, None, None, constants={1: ints(1, -3), 2: ints(4, 9), 3: ints(1, 2)}),
    row("Slice", X, None, None, None, None,
        constants={1: ints(-1), 2: ints(-(2**31)), 3: ints(3), 4: ints(-1)}),
    row("Slice", X, None, None, None, None, constants={1: ints(5), 2: ints(0), 3: ints(2), 4: ints(-2)}),
    row("Slice", X, opset=9, starts=[0, 1], ends=[4, 3], axes=[2, 3]),
    row("Gather", X, None, constants={1: ints(2, 0, -1)}, axis=1),
    row("Gather", X, None, constants={1: np.array(1, WHOLE)}, axis=1),
    row("Gather", None, below(7, 2, 3), constants={0: real(7, 4)}),
    row("Gather", X, below(4, 2, 3), axis=1),
    row("GatherElements", real(3, 4), below(4, 3, 2), axis=1),
    row("GatherND", real(3, 4, 5), below(3, 6, 2)),
    row("ScatterND", real(5, 3), ints(1, 3).reshape(2, 1), real(2, 3)),
    row("ScatterElements", real(3, 4), ints(2, 0, 1).reshape(1, 3), real(1, 3), axis=0),
    row("Expand", real(3, 1), None, constants={1: ints(2, 1, 4)}),
    row("Tile", real(2, 3), None, constants={1: ints(2, 1)}),
    row("Pad", X, None, None, constants={1: ints(0, 0, 1, 2, 0, 1, 0, 2), 2: np.array(1.5, REAL)}),
    row("Pad", X, None, constants={1: ints(0, 0, 1, 2, 0, 0, 1, 2)}, mode="reflect"),
    row("Pad", X, None, constants={1: ints(0, 0, 1, 2, 0, 0, 1, 2)}, mode="edge"),
    row("Pad", X, None, constants={1: ints(0, 0, -1, -1, 0, 0, -1, -1)}),
    *(row("Pad", given, None, constants={1: ints(*pads)}, mode=mode, opset=19)
      for mode in ("reflect", "edge", "wrap")
      for given, pads in (
          (real(6), (2, 1)), (real(2, 6), (0, 3, 0, 1)), (real(3, 6), (1, 2, 0, 3)),
          (real(1, 9, 1), (0, 4, 0, 0, 2, 0)), (real(2, 3, 6), (0, 1, 2, 0, 1, 0)), (X, (1, 0, 0, 2, 0, 0, 0, 0)),
          (X, (0, 2, 0, 0, 0, 1, 3, 2)), (X, (0, 0, 2, 1, 0, 0, 0, 3)), (X, (0, -1, 0, 2, 0, 0, 1, -1)),
          (real(1, 2, 3, 4, 5), (0, 0, 1, 0, 2, 0, 1, 1, 3, 0)), (below(9, 2, 6), (0, 2, 0, 1)),
      )),
    row("Pad", real(3, 6), None, None, None, constants={1: ints(2, 1), 3: ints(-2)}, opset=19, mode="reflect"),
    row("DepthToSpace", real(2, 8, 2, 3), blocksize=2),
    row("DepthToSpace", real(2, 8, 2, 3), blocksize=2, mode="CRD"),
    row("SpaceToDepth", real(2, 2, 4, 6), blocksize=2),
    row("Shape", X),
    row("Shape", X, start=1, end=-1),
    row("Size", X),
    row("Trilu", real(4, 4), None, constants={1: np.array(1, WHOLE)}),
    row("Trilu", real(4, 4), upper=0),
    row("OneHot", below(5, 3), None, None, constants={1: ints(5), 2: np.array([0.5, 2], REAL)}),
    row("NonZero", truth(3, 4)),
    row("EyeLike", real(3, 4), k=1),
    row("ConstantOfShape", ints(2, 3), value=numpy_helper.from_array(np.array([1.5], REAL))),
    row("Range", np.array(2, WHOLE), np.array(11, WHOLE), np.array(3, WHOLE)),
    row("GridSample", X, RNG.uniform(-1, 1, (2, 3, 3, 2)).astype(REAL), mode="bilinear", align_corners=1),
    *(row("Resize", X, None, None, constants={2: np.array([1, 1, *scale], REAL)}, **given)
      for scale, given in (
          ((2, 2), {}), ((2, 3), {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
          ((0.5, 0.6), {}), ((1.5, 1.5), {"nearest_mode": "ceil"}), ((2, 2), {"mode": "linear"}),
          ((2, 2), {"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
          ((2, 2), {"mode": "cubic"}), ((1.5, 1.3), {"mode": "linear"}),
      )),
    row("Resize", X, None, None, None, constants={3: ints(2, 4, 9, 10)}, mode="linear"),
    row("Resize", real(1, 6, 5, 4), None, None, constants={2: np.array([1, 2, 2, 1], REAL)}),
    row("Upsample", X, None, constants={1: np.array([1, 1, 2, 2], REAL)}, opset=9),
    *(row("GRU", real(5, 2, 3), *given,
          constants={1: real(count, 12, 3), 2: real(count, 12, 4)} | ({3: real(count, 24)} if len(given) > 2 else {}),
          hidden_size=4, direction=direction, outputs=2)
      for count, direction, given in (
          (1, "forward", [None] * 3), (1, "reverse", [None] * 2), (2, "bidirectional", [None] * 3),
          (2, "bidirectional", [None] * 4 + [real(2, 2, 4)]),
      )),
    row("RNN", real(5, 2, 3), *[None] * 3, constants={1: real(1, 1, 3), 2: real(1, 1, 1), 3: real(1, 2)},
        hidden_size=1, outputs=2),
    row("Gemm", real(3, 4), None, None, constants={1: real(5, 4), 2: real(5)}, transB=1, beta=0.0),
    row("Gemm", real(3, 4), None, None, constants={1: real(4, 5), 2: real(5)}, alpha=0.0),
    row("Gemm", real(3, 4), None, None, constants={1: real(4, 5), 2: real(5)}, alpha=1e-30, beta=1e-30),
    row("Dropout", real(3, 4), outputs=2),
    row("Resize", X, None, None, None, constants={3: ints(2, 4, 12, 10)}),
    row("Resize", real(1, 6, 5, 4), None, None, None, constants={3: ints(1, 12, 10, 4)}),
    row("Resize", X, None, None, constants={2: np.array([2, 1.5], REAL)}, opset=18, axes=[2, 3], mode="linear"),
    row("Resize", X, None, None, None, constants={3: ints(10, 12)}, opset=18, axes=[3, 2]),
]  # fmt: skip


@pytest.mark.parametrize("case", ROWS, ids=[f"{n}-{case[0]}" for n, case in enumerate(ROWS)])
def test_operator_computes_what_onnxruntime_does(case: Row, tmp_path: Path) -> None:
    operator, inputs, constants, attributes, opset, outputs = case
    file = tmp_path / "one.onnx"
    given = write(file, operator, inputs, constants, attributes, opset, outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_inputs()]
        expected = session.run(None, dict(zip(names, given, strict=True)))
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
        # The reference of the format, where onnxruntime has no kernel.
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(onnx.load(file))
        expected = evaluator.run(None, dict(zip(evaluator.input_names, given, strict=True)))
    network = lbyl.load_source(str(file))
    with torch.no_grad():
        found = network(*map(torch.from_numpy, given))
    found = found if isinstance(found, tuple) else (found,)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.numpy().dtype == b.dtype
        np.testing.assert_allclose(a.numpy(), b, rtol=2e-4, atol=2e-5)


def test_every_operator_is_tried() -> None:
    tried = {case[0] for case in ROWS}
    sequences = {"SplitToSequence", "SequenceAt", "ConcatFromSequence"}  # in test_onnx_files
    assert set(operator_names()) - tried - sequences == {"Swish"}  # which onnxruntime does not have yet
    assert len(operator_names()) >= 60


def test_the_docs_list_every_operator() -> None:
    page = (Path(__file__).parent.parent / "docs" / "files.md").read_text(encoding="utf-8")
    listed = page.partition("<!-- results:operators -->")[2].partition("<!-- /results -->")[0]
    assert re.findall(r"`(\w+)`", listed) == operator_names()
