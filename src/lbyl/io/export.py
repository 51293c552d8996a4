"""`export`: a saved network as one file that other runtimes load, run against the PyTorch model before it is kept."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lbyl.errors import ExportError, InputError
from lbyl.io import artifact
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.inputs import ExampleInputs, output_tensors, outputs
from lbyl.surgery.plan import Plan, is_rebuildable

TOLERANCE = 1e-4
"""Largest difference between the file and the model, relative to an output's largest magnitude, in float32."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LARGEST_INPUT = 2**28
_Run = Callable[[ExampleInputs], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what came of running it.

    Attributes:
        file: where it is.
        format: "onnx" or "pt2".
        difference: largest absolute difference between the file's outputs and the model's.
        relative: the same, relative to the largest magnitude of the output.
        dynamic: whether the file takes any batch size; otherwise only ``batches[0]``.
        batches: the batch sizes that it was run on, that of the example first.
        note: what the user should know, such as why the batch size is fixed.
    """

    file: Path
    format: str
    difference: float
    relative: float
    dynamic: bool
    batches: tuple[int, ...]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The outcome as plain data."""
        return {**asdict(self), "file": str(self.file), "bytes": self.file.stat().st_size}

    def summary(self) -> list[str]:
        """The outcome, a line each."""
        axis = "any batch size" if self.dynamic else f"batch size fixed to {self.batches[0]}"
        runtime = "onnxruntime" if self.format == "onnx" else "torch.export.load"
        batches = " and ".join(map(str, self.batches))
        lines = [
            f"{self.file}: {self.format}, {self.file.stat().st_size / 1e6:,.1f} MB, {axis}",
            f"checked with {runtime} on batches of {batches}: "
            f"max difference {self.difference:.1e} (relative {self.relative:.1e})",
        ]
        return lines + ([f"note: {self.note}"] if self.note else [])


def export(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    format: str = "onnx",
    inputs: Any = None,
    dynamic: bool = True,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Exported:
    """Write ``model.onnx`` or ``model.pt2`` into a saved folder, and check it by running it.

    The file takes any batch size (the first axis of the inputs) where the model does; otherwise the batch size is
    that of the example, and ``note`` says why. The file is checked before it gets its name, so that a bad one is
    never seen; a file of an earlier export is replaced.

    Args:
        path: the folder that ``result.save`` wrote.
        model: a fresh, unpruned instance of the architecture, as for :func:`lbyl.load`.
        format: "onnx", or "pt2" for ``torch.export.load``.
        inputs: what the model is called with: a tensor, a tuple, or a dict of keyword inputs. May be left out when
            the network was compressed on positional floating-point tensors.
        dynamic: False fixes the batch size to that of the inputs.
        tolerance: largest difference that passes, relative to an output's largest magnitude; formats narrower than
            float32 are given what their precision allows.
        seed: for inputs that are made here.

    Raises:
        InputError: an unknown format, inputs that can't be made up or do not fit, or a missing package.
        ArtifactError: no folder of lbyl, or a damaged one.
        ExportError: the model can't be exported, or the file computes something else; no file is left.
    """
    if format not in ("onnx", "pt2"):
        raise InputError(f"format is {format!r}; write 'onnx' or 'pt2'")
    if format == "onnx":
        for package in _PACKAGES:
            _package(package)
    plan = artifact.read_manifest(path).plan
    if model is None and not (plan.source and is_rebuildable(plan.source)):
        known = f" (it was compressed from {plan.source})" if plan.source else ""
        raise InputError(
            f"{path}: the plan does not know how to build the model{known}; "
            "pass a fresh, unpruned instance as model= (--model on the command line)"
        )
    example = _described(plan, seed) if inputs is None else ExampleInputs.of(inputs)
    smaller = artifact.load(path, model)
    with undisturbed(smaller):
        try:
            reference = outputs(smaller, example)
        except InputError as error:
            if inputs is None:
                raise InputError(
                    f"{error}. Pass what it is called with as inputs= (--input on the command line)"
                ) from None
            raise
    target = Path(path) / f"model.{format}"
    try:
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=path))
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror or error}") from error
    try:
        exported = _export(smaller, example, reference, stage / target.name, format, dynamic, tolerance)
        # Weights above 2 GB are a file of their own, which the other one names: it must be there first.
        for file in sorted(stage.iterdir(), key=lambda file: file.name == target.name):
            file.replace(target.with_name(file.name))
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return Exported(target, format, *exported)


def _export(
    model: nn.Module,
    example: ExampleInputs,
    reference: list[Tensor],
    file: Path,
    format: str,
    dynamic: bool,
    tolerance: float,
) -> tuple[float, float, bool, tuple[int, ...], str]:
    """Write and check the file, for any batch size if that can be."""
    batch, why = _batch_of(example, reference), ""
    if dynamic and batch is None:
        why = f"the inputs ({example.describe()}) have no batch axis"
    elif dynamic and batch is not None:
        sizes = tuple(dict.fromkeys((batch, batch + 2, 1)))
        try:
            cases = [(example, reference)]
            with undisturbed(model):
                for size in sizes[1:]:
                    other = _with_batch(example, batch, size)
                    cases.append((other, outputs(model, other)))
            # An axis of 1 would be taken for one that is always 1.
            traced = _program(model, _with_batch(example, batch, max(batch, 2)), max(batch, 2))
            differences = _check(_write(traced, file, format), cases, tolerance, file, dynamic=True)
        except (InputError, _Refused) as error:
            why = str(error)
        else:
            still = [t for t in example.tensors() if not _has_batch(t, batch)]
            why = f"{len(still)} of {len(example.tensors())} inputs have no batch axis" if still else ""
            return *differences, True, sizes, _notes(why, reference)
    try:
        written = _write(_program(model, example), file, format)
        differences = _check(written, [(example, reference)], tolerance, file, dynamic=False)
    except _Refused as error:
        raise ExportError(f"{type(model).__name__} can't be exported as {format}: {error}") from error
    why = f"fixed batch size: {why}" if why else ""
    return *differences, False, (batch or 1,), _notes(why, reference)


def _notes(why: str, reference: list[Tensor]) -> str:
    blind = not any(bool(tensor.any()) for tensor in reference)
    return "; ".join(filter(None, (why, "all outputs are zero on these inputs, so the check says little" * blind)))


class _Refused(Exception):
    """What PyTorch or a runtime said, in a line."""

    def __init__(self, doing: str, error: Exception) -> None:
        lines = [line.strip(" -") for line in str(error).strip().splitlines() if line.strip(" -")]
        # The first line only says that a constraint is violated; the second one, which and how.
        if len(lines) > 1 and lines[0].startswith("Constraints violated"):
            lines = lines[1:]
        super().__init__(f"{doing}: {lines[0].split('. ')[0] if lines else type(error).__name__}")


@dataclass(frozen=True)
class _Program:
    """A traced program, and which of its axes are dynamic (None: none)."""

    program: Any
    shapes: dict[str, Any] | None


def _program(model: nn.Module, inputs: ExampleInputs, batch: int | None = None) -> _Program:
    """The traced program; with ``batch``, first axes of this size may be of any size."""
    shapes, doing = None, "torch.export can't trace it"
    if batch is not None:
        axis = torch.export.Dim("batch", min=1)
        args, kwargs = pytree.tree_map(
            lambda leaf: {0: axis} if isinstance(leaf, Tensor) and _has_batch(leaf, batch) else None,
            (inputs.args, dict(inputs.kwargs)),
        )
        shapes = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
        doing += " for every batch size"
    try:
        with undisturbed(model), _quiet():
            program: Any = torch.export.export(
                model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise _Refused(doing, error) from error
    return _Program(program, shapes)


def _write(traced: _Program, file: Path, format: str) -> _Run:
    """Write the program, and return what runs the written file."""
    file.unlink(missing_ok=True)
    try:
        with _quiet():
            if format == "pt2":
                # Neither the user's data nor the names of files on this machine are for those who get the file.
                traced.program.example_inputs = None
                for node in traced.program.graph.nodes:
                    node.meta.pop("stack_trace", None)
                # By way of memory: PyTorch's writer of files brings the process down where the disk is full.
                buffer = BytesIO()
                torch.export.save(traced.program, buffer)
                file.write_bytes(buffer.getbuffer())
                module = torch.export.load(file).module()
                return lambda inputs: _tensors(module, inputs)
            made: Any = torch.onnx.export(traced.program, dynamic_shapes=traced.shapes, dynamo=True, verbose=False)
            for node in made.model.graph:
                node.metadata_props.clear()  # as above
            made.save(file)
    except OSError:
        raise
    except Exception as error:
        # The exporter wraps what went wrong into a page of advice.
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise _Refused(f"it can't be written as {format}", cause) from error
    return _session(file)


def _tensors(module: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    with torch.no_grad():
        return output_tensors(inputs.call(module))


def _session(file: Path) -> _Run:
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; the log would repeat them
    try:
        session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _Refused("onnxruntime can't load it", error) from error
    names = [value.name for value in session.get_inputs()]

    def run(inputs: ExampleInputs) -> list[Tensor]:
        tensors = inputs.tensors()
        if len(names) != len(tensors):
            raise ExportError(f"the exported file takes {len(names)} inputs, the model {len(tensors)}")
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


def _check(
    run: _Run, cases: Sequence[tuple[ExampleInputs, list[Tensor]]], tolerance: float, file: Path, dynamic: bool
) -> tuple[float, float]:
    """Largest absolute and relative difference between the file and the model over all batch sizes."""
    absolute = relative = 0.0
    for inputs, expected in cases:
        try:
            found = run(inputs)
        except ExportError:
            raise
        except Exception as error:
            raise _Refused(f"the exported file does not run on {inputs.describe()}", error) from error
        if [t.shape for t in found] != [t.shape for t in expected]:
            shapes = ["x".join(map(str, t.shape)) or "scalar" for t in (*found, *expected)]
            raise ExportError(
                f"{file.name} returns {', '.join(shapes[: len(found)])} on {inputs.describe()}, "
                f"the PyTorch model {', '.join(shapes[len(found) :])}; no file was kept"
            )
        for a, b in zip(expected, found, strict=True):
            apart, share = _difference(a, b)
            if not share <= _allowed(a.dtype, tolerance):
                raise ExportError(
                    f"{file.name} does not compute what the PyTorch model does: the largest difference on "
                    f"{inputs.describe()} is {apart:.1e}, relative {share:.1e} (allowed: "
                    f"{_allowed(a.dtype, tolerance):.0e}); no file was kept"
                    + (". A fixed batch size may help: dynamic=False (--fixed-batch)" if dynamic else "")
                )
            absolute, relative = max(absolute, apart), max(relative, share)
    return absolute, relative


def _difference(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the same relative to the largest finite magnitude that is expected."""
    a, b = expected.double(), found.double()
    same = (a == b) | (a.isnan() & b.isnan())  # infinities less themselves are NaN
    apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf)
    largest = float(apart.max()) if apart.numel() else 0.0
    finite = a[a.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return largest, largest / scale if scale else largest


def _allowed(dtype: torch.dtype, tolerance: float) -> float:
    return max(tolerance, 16 * torch.finfo(dtype).eps) if dtype.is_floating_point else tolerance


# -- inputs -------------------------------------------------------------------------------------------------


def _described(plan: Plan, seed: int) -> ExampleInputs:
    """Inputs of the shapes that the plan was made for."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for text in plan.inputs.split(", "):
        found = re.fullmatch(r"(\w+) (scalar|\d+(?:x\d+)*)", text)
        dtype = getattr(torch, found[1], None) if found else None
        if found is None or not isinstance(dtype, torch.dtype):
            raise InputError(f"the plan describes the inputs as {plan.inputs!r}, which says no shapes; pass inputs=")
        if not dtype.is_floating_point:
            raise InputError(
                f"the network was compressed on {plan.inputs}: {found[1]} can't be made up, for token ids and indices "
                "have a range. Pass what the model is called with as inputs= (--input on the command line)"
            )
        shape = [int(size) for size in found[2].split("x")] if found[2] != "scalar" else []
        if math.prod(shape) > _LARGEST_INPUT:
            raise InputError(f"the plan describes the inputs as {plan.inputs!r}, which is too large; pass inputs=")
        made.append(torch.randn(shape, generator=generator).to(dtype))
    return ExampleInputs(tuple(made))


def _batch_of(inputs: ExampleInputs, reference: list[Tensor]) -> int | None:
    """Size of the first axis that inputs and outputs share; else that of the first input that has one."""
    sizes = [t.shape[0] for t in inputs.tensors() if t.ndim and t.shape[0]]
    shared = [t.shape[0] for t in reference if t.ndim and t.shape[0] in sizes]
    return next(iter((*shared, *sizes)), None)


def _has_batch(tensor: Tensor, batch: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == batch


def _with_batch(inputs: ExampleInputs, batch: int, size: int) -> ExampleInputs:
    """The example's rows over and over. Scaled apart, for equal rows would hide that a file mixes them up."""

    def resize(tensor: Tensor) -> Tensor:
        if size == batch or not _has_batch(tensor, batch):
            return tensor
        rows = tensor.repeat(-(-size // batch), *[1] * (tensor.ndim - 1))[:size].clone()
        if tensor.is_floating_point():
            rows *= torch.linspace(1, 0.5, size, dtype=tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1))
        return rows

    return inputs.map(resize)


# -- surroundings -------------------------------------------------------------------------------------------


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"format 'onnx' needs {name}, which can't be imported ({error}); pip install {' '.join(_PACKAGES)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print whole programs and warn about themselves; what matters is in their errors."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.no_grad(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
