"""Reads networks from a file ``model.onnx`` or ``model.pt2``, and writes smaller networks as such files."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lbyl.errors import ArtifactError, InputError, first_line
from lbyl.io.comparison import described_inputs, difference
from lbyl.io.onnx.network import OnnxNetwork
from lbyl.io.programs import save_program
from lbyl.io.quiet import quiet
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.inputs import ExampleInputs, outputs
from lbyl.surgery.plan import Plan

ONNX, PT2 = "model.onnx", "model.pt2"
_TOLERANCE = 1e-3
_SCRIPTS = (".pt", ".pth", ".ts", ".torchscript", ".jit", ".ptl")


def is_file(source: str) -> bool:
    """Whether a source is the name of a file that holds a whole network.

    >>> is_file("model.onnx"), is_file("C:/nets/model.pt2"), is_file("net.py:make"), is_file("timm:resnet18")
    (True, True, False, False)
    """
    return source.lower().endswith((".onnx", ".pt2", *_SCRIPTS))


def read_network(path: Path) -> nn.Module:
    """Read the network in a file.

    Raises:
        InputError: the file can't be read; the error says why.
    """
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        from lbyl.io.onnx.read import read_onnx

        return read_onnx(path)
    if not path.is_file():
        raise InputError(f"no file {path}")
    if suffix != ".pt2":
        raise InputError(
            f"{path} holds only weights, or TorchScript, which can't be cut; write the model from Python with "
            "torch.export.save(torch.export.export(model, inputs), 'model.pt2') or torch.onnx.export"
        )
    try:
        with quiet():
            program = torch.export.load(path)
            network = _as_called(program.module())
            _EXAMPLES[network] = _example_of(program)
            return network
    except Exception as error:
        raise InputError(f"{path} is not a file of torch.export, or is damaged: {first_line(error)}") from error


_EXAMPLES: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...] | None] = weakref.WeakKeyDictionary()
"""Example inputs of networks that were read from files of torch.export."""


def example_of_program(network: nn.Module) -> tuple[Any, ...] | None:
    """Example inputs of a network that was read from ``model.pt2``; None for other networks.

    They are those that the file holds, or else normal values, and zeros for whole numbers, in the sizes that it was
    exported for.
    """
    return _EXAMPLES.get(network)


def _example_of(program: Any) -> tuple[Any, ...] | None:
    if program.example_inputs is not None and not program.example_inputs[1]:
        return tuple(program.example_inputs[0])
    names = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(values) != len(names) or not all(isinstance(value, Tensor) for value in values):
        return None
    generator, made = torch.Generator().manual_seed(0), []
    for value in values:
        shape = [size if isinstance(size, int) else size.node.hint or 2 for size in value.shape]
        drawn = torch.randn(shape, generator=generator) if value.is_floating_point() else torch.zeros(shape)
        made.append(drawn.to(value.dtype))
    return tuple(made)


_CALLED = {
    torch.ops.aten.conv1d.default: functional.conv1d,
    torch.ops.aten.conv2d.default: functional.conv2d,
    torch.ops.aten.conv3d.default: functional.conv3d,
    torch.ops.aten.linear.default: functional.linear,
    torch.ops.aten.matmul.default: torch.matmul,
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.addmm.default: torch.addmm,
}
"""The functions that modules call, by the ATen operators of exported programs."""


def _as_called(program: Any) -> nn.Module:
    """Make an exported program call the functions that modules call, and support ``train`` and ``eval``."""
    for name in ("train", "eval"):  # its own methods raise errors
        vars(program).pop(name, None)
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in _CALLED:
            node.target = _CALLED[node.target]
        elif node.op == "call_function" and node.target is torch.ops.aten.batch_norm.default:
            x, weight, bias, mean, var, training, momentum, eps, *_ = node.args
            node.target, node.args = functional.batch_norm, (x, mean, var, weight, bias, training, momentum, eps)
    program.recompile()
    return program.eval()


def check_network(network: nn.Module, inputs: ExampleInputs) -> None:
    """Compare a network that was read from an ONNX file with that file in onnxruntime.

    Raises:
        InputError: they differ, or the file does not run on these inputs.
    """
    if isinstance(network, OnnxNetwork):
        from lbyl.io.onnx.check import compared

        compared(network.program.file.path, network.program.inputs, network, inputs)


def write_network(folder: Path, network: nn.Module, plan: Plan) -> tuple[str, str] | None:
    """Write a smaller network into a folder, as a file of the kind that the original network was read from.

    Returns:
        The file's name, and a note about its comparison with the network; None for networks not read from a file.

    Raises:
        ArtifactError: the file can't be written, or computes something else than the network.
    """
    if isinstance(network, OnnxNetwork):
        return _write_onnx(folder, network, plan)
    if plan.source and plan.source.lower().endswith(".pt2"):
        return _write_pt2(folder, network, plan)
    return None


def _write_onnx(folder: Path, network: OnnxNetwork, plan: Plan) -> tuple[str, str]:
    from lbyl.io.onnx.check import compared
    from lbyl.io.onnx.read import Reader, prepared
    from lbyl.io.onnx.write import write_onnx

    program, file = network.program, folder / ONNX
    shapes = [
        tuple(map(int, text.split(" ")[1].split("x"))) for text in plan.inputs.split(", ") if "scalar" not in text
    ]
    try:
        inputs = ExampleInputs(network.example_inputs(shapes, torch.Generator().manual_seed(0)))
        original = Reader(program.file, prepared(program.file)).network().eval()
        first = compared(program.file.path, program.inputs, original, inputs)
        write_onnx(network, file, inputs)
        second = compared(file, program.inputs, network, inputs)
    except (InputError, ValueError) as error:
        raise ArtifactError(f"{ONNX} can't be written: {error}") from error
    note = (
        f"{ONNX}: checked in onnxruntime: {program.file.path.name} equals the network that was read from it (relative "
        f"difference {first:.1e}), and the written file equals the smaller network ({second:.1e})"
    )
    return ONNX, note


def _write_pt2(folder: Path, network: nn.Module, plan: Plan) -> tuple[str, str]:
    file = folder / PT2
    inputs = described_inputs(plan, 0)
    with undisturbed(network), quiet(), torch.no_grad():
        expected = outputs(network, inputs)
        try:
            save_program(torch.export.export(network, inputs.args, strict=False), file)
            found = outputs(torch.export.load(file).module(), inputs)
        except OSError:
            raise
        except Exception as error:
            raise ArtifactError(f"{PT2} can't be written: {first_line(error)}") from error
    relative = max(difference(a, b)[1] for a, b in zip(expected, found, strict=True))
    if not relative <= _TOLERANCE:
        raise ArtifactError(f"{PT2} computes something else than the network: relative difference {relative:.1e}")
    return PT2, f"{PT2}: torch.export.load gives the smaller network (relative difference {relative:.1e})"


def with_source(plan: Plan, network: nn.Module) -> Plan:
    """The plan, with the path of the ONNX file that the network was read from, if any, as its source."""
    if plan.source is None and isinstance(network, OnnxNetwork):
        return replace(plan, source=str(network.program.file.path))
    return plan
