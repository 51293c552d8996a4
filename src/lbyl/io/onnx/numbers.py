"""Arithmetic on shapes and other numbers, computed by ONNX's reference implementation, or else by onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lbyl.errors import InputError
from lbyl.io.onnx.file import library, session

_LARGEST = 2**28
_MAKING = ("ConstantOfShape", "Expand", "Tile", "Range", "OneHot", "EyeLike")


class Numbers:
    """One operator on arrays, computed by the reference implementation of the ``onnx`` package.

    That fails on some nodes, which onnxruntime computes.

    Args:
        node: the node, as an object of ``onnx``.
        opsets: versions of the operators, by domain.
        ir_version: the file's version of the ONNX format.
    """

    def __init__(self, node: Any, opsets: dict[str, int], ir_version: int) -> None:
        onnx = library("onnx")
        from onnx.reference import ReferenceEvaluator

        self._name = f"{node.name or node.output[0]!r} ({node.op_type})"
        self._op = node.op_type
        self._places = [place for place, name in enumerate(node.input) if name]
        self._names = [node.input[place] for place in self._places]
        self._node, self._ir_version = node, ir_version
        self._imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
        untyped = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(self._names)]
        self._evaluator = ReferenceEvaluator(self._model(untyped))

    def __call__(self, *operands: Any) -> tuple[np.ndarray, ...]:
        """The outputs of the operator.

        Raises:
            InputError: it can't be computed, or its output would be huge.
        """
        arrays = [np.asarray(operands[place]) for place in self._places]
        self._check(arrays)
        given = dict(zip(self._names, arrays, strict=True))
        try:
            found = self._evaluator.run(None, given)
        except Exception:
            found = self._run(given)
        return tuple(np.asarray(item) for item in found)

    def _model(self, inputs: Sequence[Any]) -> Any:
        """A model of this node alone."""
        onnx = library("onnx")
        outputs = [onnx.ValueInfoProto(name=name) for name in self._node.output if name]
        graph = onnx.helper.make_graph([self._node], "numbers", inputs, outputs)
        return onnx.helper.make_model(graph, opset_imports=self._imports, ir_version=self._ir_version)

    def _run(self, given: dict[str, np.ndarray]) -> list[Any]:
        """The outputs by onnxruntime, which needs the inputs' types and shapes."""
        helper = library("onnx").helper
        try:
            inputs = [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
                for name, array in given.items()
            ]
            return session(self._model(inputs).SerializeToString()).run(None, given)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"node {self._name} can't be computed: {type(error).__name__}: {error}") from error

    def _check(self, arrays: Sequence[np.ndarray]) -> None:
        if self._op not in _MAKING:
            return
        sizes = arrays[0] if self._op == "ConstantOfShape" else arrays[1] if self._op in ("Expand", "Tile") else None
        if sizes is not None:
            count = float(np.prod(sizes.astype(np.float64)))
            count *= arrays[0].size if self._op == "Tile" else 1
        elif self._op == "Range":
            start, end, step = (float(item) for item in arrays)
            count = abs((end - start) / step) if step else 0.0
        else:
            count = float(arrays[0].size) * (float(arrays[1].reshape(-1)[0]) if self._op == "OneHot" else 1)
        if count > _LARGEST:
            raise InputError(f"node {self._name} would make {count:.0e} elements, which is too many")
