"""The format ONNX, written with onnxscript and checked with onnxruntime."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbyl.errors import ExportError, InputError
from lbyl.io.export.base import Refused, Run, TracedProgram, trace, write
from lbyl.io.onnx.network import OnnxNetwork
from lbyl.io.onnx.write import write_onnx
from lbyl.runtime.copying import tensors_of
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
            feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
            return [torch.from_numpy(array) for array in session.run(None, feed)]

        return run

    def runner(self, model: nn.Module, inputs: ExampleInputs) -> Callable[[], object]:
        """What runs a network in onnxruntime on these inputs, with as many threads as PyTorch has.

        Raises:
            InputError: a package is missing, the network can't be written, or it is not on the CPU.
        """
        self.check_available()
        tensors = inputs.tensors()
        if any(tensor.device.type != "cpu" for tensor in (*tensors_of(model).values(), *tensors)):
            raise InputError("onnxruntime is measured on the CPU; move the network and its inputs there")
        runtime = _package("onnxruntime")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            try:
                if isinstance(model, OnnxNetwork):
                    write_onnx(model, file)
                else:
                    write(self, trace(model, inputs), file)
            except Refused as error:
                raise InputError(f"{type(model).__name__} can't be timed in onnxruntime: {error}") from error
            options = runtime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 4, torch.get_num_threads()
            session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        return partial(
            session.run, None, {name: t.detach().cpu().numpy() for name, t in zip(names, tensors, strict=True)}
        )


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"format 'onnx' needs {name}, which can't be imported ({error}); pip install {' '.join(_PACKAGES)}"
        ) from error
