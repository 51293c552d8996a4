"""The format ONNX, written with onnxscript and checked with onnxruntime."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbyl.errors import ExportError, InputError
from lbyl.io.export.base import Run, TracedProgram
from lbyl.runtime.inputs import ExampleInputs

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class OnnxFormat:
    """ONNX files, which most runtimes load."""

    name = "onnx"
    runtime = "onnxruntime"

    def check_available(self) -> None:
        """Raise InputError if a package is missing."""
        for package in _PACKAGES:
            _package(package)

    def write(self, traced: TracedProgram, file: Path) -> None:
        """Write the program without its metadata, which names source files on this machine."""
        made: Any = torch.onnx.export(traced.program, dynamic_shapes=traced.shapes, dynamo=True, verbose=False)
        for node in made.model.graph:
            node.metadata_props.clear()
        made.save(file)

    def open(self, file: Path) -> Run:
        """Start a session of onnxruntime."""
        runtime = _package("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # the log would only repeat the errors that it raises
        session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]

        def run(inputs: ExampleInputs) -> list[Tensor]:
            tensors = inputs.tensors()
            if len(names) != len(tensors):
                raise ExportError(f"the exported file takes {len(names)} inputs, but the model {len(tensors)}")
            feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
            return [torch.from_numpy(array) for array in session.run(None, feed)]

        return run


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"format 'onnx' needs {name}, which can't be imported ({error}); pip install {' '.join(_PACKAGES)}"
        ) from error
