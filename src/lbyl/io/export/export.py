"""`export`: writes a saved network as one file for other runtimes, and compares the file with the model."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lbyl.errors import ExportError, InputError
from lbyl.io import artifact
from lbyl.io.comparison import described_inputs
from lbyl.io.export.base import FolderFormat, Format, Refused, trace, write
from lbyl.io.export.check import TOLERANCE, Case, largest_differences
from lbyl.io.export.inputs import batch_size, has_batch, with_batch
from lbyl.io.files import finish, stage
from lbyl.runtime.checks import as_path, check_number, check_seed, is_folder
from lbyl.runtime.contexts import own_settings, undisturbed
from lbyl.runtime.copying import unwrapped
from lbyl.runtime.inputs import ExampleInputs, outputs
from lbyl.runtime.registry import find, make, names
from lbyl.surgery.plan import Plan, is_rebuildable, remembered


@dataclass(frozen=True)
class Exported:
    """An exported file, and the outcome of its check.

    Attributes:
        file: its path.
        format: "onnx", "pt2", or another registered format.
        difference: largest absolute difference between the file's outputs and the model's.
        relative: that difference relative to the largest magnitude of the output.
        dynamic: whether the file takes any batch size; otherwise it takes only ``batches[0]``.
        batches: the batch sizes on which it was checked; the example's is the first. Empty for GGUF, of which all
            tensors are compared instead.
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
        """The outcome as lines of text."""
        axis = "any batch size" if self.dynamic else f"batch size fixed to {self.batches[0]}"
        batches = " and ".join(map(str, self.batches))
        if not self.batches:
            lines = [
                f"{self.file}: {self.format}, {self.file.stat().st_size / 1e6:,.1f} MB",
                f"checked with {find('format', self.format).runtime}: all tensors are those of the folder",
            ]
            return lines + ([f"note: {self.note}"] if self.note else [])
        lines = [
            f"{self.file}: {self.format}, {self.file.stat().st_size / 1e6:,.1f} MB, {axis}",
            f"checked with {find('format', self.format).runtime} on batches of {batches}: "
            f"max difference {self.difference:.1e} (relative {self.relative:.1e})",
        ]
        return lines + ([f"note: {self.note}"] if self.note else [])


@own_settings()
def export(
    source: str | os.PathLike[str] | nn.Module,
    model: nn.Module | None = None,
    *,
    to: str | os.PathLike[str] | None = None,
    format: str | None = None,
    inputs: Any = None,
    dynamic: bool = True,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Exported:
    """Write a saved folder's network, or one that was trained since, as one file, and check it by running it.

    The file takes any batch size (the first axis of the inputs) if the model does. Otherwise its batch size is that of
    the example, and ``note`` says why. The file gets its name only after the check, so a wrong file never appears.
    A file of an earlier export in the folder is replaced; a file that ``to`` names must be new.

    Args:
        source: the folder that ``result.save`` wrote, or a network in memory, with its present weights.
        model: a fresh, unpruned instance of the architecture, as for :func:`lbyl.load`; for folders only.
        to: the file. For a folder, None writes ``model.onnx`` or ``model.pt2`` into it.
        format: "onnx", "pt2" for ``torch.export.load``, or "gguf" for llama.cpp. None takes the suffix of the file's
            name, or "onnx". GGUF is written from the files of a folder of a language model, which may also be one that
            ``save_pretrained`` wrote, with the precision of its weights; ``model``, ``inputs``, ``dynamic``,
            ``tolerance`` and ``seed`` are for the other formats.
        inputs: the model's inputs: a tensor, a tuple, or a dict of keyword inputs. They may be left out if the network
            was compressed on positional floating-point tensors.
        dynamic: whether the file should take any batch size; False fixes it to that of the inputs.
        tolerance: largest allowed difference relative to the output's largest magnitude, in float32. It is larger for
            less precise dtypes.
        seed: seed for inputs that are made up.

    Raises:
        InputError: the format is unknown, inputs can't be made up or do not fit, or a package is missing.
        ArtifactError: the folder is not one of lbyl's, or is damaged.
        ExportError: the model can't be exported, or the file computes something else; no file is kept.
    """
    format = _named_format(format, to)
    kind: Format | FolderFormat = make("format", format)
    check_number("tolerance={}", tolerance, least=0)
    check_seed(seed)
    kind.check_available()
    if isinstance(kind, FolderFormat):
        return _from_files(kind, source, to)
    if isinstance(source, nn.Module):
        target, plan = _target_of_network(source, model, to), remembered(unwrapped(source))
    else:
        target, plan = _target_of_folder(source, to, format), artifact.read_manifest(source).plan
        _check_model_known(source, plan, model)
    if inputs is not None:
        example = ExampleInputs.of(inputs)
    elif plan is not None:
        example = described_inputs(plan, seed)
    else:
        raise InputError(f"this {type(source).__name__} does not say what it is called with; pass it as inputs=")
    smaller = unwrapped(source) if isinstance(source, nn.Module) else artifact.load(source, model)
    case = example, _outputs(smaller, example, made_up=inputs is None)
    with stage(target) as folder:
        exported = _Attempt(smaller, case, kind, folder / target.name, tolerance).exported(dynamic, target)
        finish(folder)
        # Weights above 2 GB are in a separate file, which must exist before the file that refers to it.
        for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name):
            file.replace(target.with_name(file.name))
    return exported


def _from_files(kind: FolderFormat, source: Any, to: str | os.PathLike[str] | None) -> Exported:
    """Write a file from the files of a folder, which need not be one that lbyl saved."""
    if isinstance(source, nn.Module):
        raise InputError(f"{kind.name} is written from a folder: save the {type(source).__name__} with save_pretrained")
    folder = as_path(source, "source")
    if not is_folder(folder):
        raise InputError(f"{folder} is not a folder")
    target = folder / f"model.{kind.name}" if to is None else _file(to)
    with stage(target) as place:
        note = kind.write_folder(folder, place / target.name)
        finish(place)
        (place / target.name).replace(target)
    return Exported(target, kind.name, 0.0, 0.0, True, (), note)


def _named_format(format: str | None, to: str | os.PathLike[str] | None) -> str:
    """The format that was named, or that the name of the file ends with."""
    ending = as_path(to, "to").suffix.lower().removeprefix(".") if to is not None else ""
    if format is None:
        format = ending if ending in names("format") else "onnx" if not ending else None
    elif ending in names("format") and format in names("format") and ending != format:
        raise InputError(f"{to} would be a file in the format {format!r}: name it .{format}, or leave out the format")
    if format not in names("format"):
        known = " or ".join(map(repr, names("format")))
        raise InputError(f"format is {format!r}; choose {known}" if format else f"{to} names no format; choose {known}")
    return format


def _target_of_network(network: nn.Module, model: object, to: str | os.PathLike[str] | None) -> Path:
    """The file that a network in memory is written to."""
    if to is None or model is not None:
        raise InputError(
            f"export of a {type(network).__name__}: name the file, as in lbyl.export(model, to='model.onnx'); "
            "a second network is for saved folders"
        )
    return _file(to)


def _target_of_folder(path: str | os.PathLike[str], to: str | os.PathLike[str] | None, format: str) -> Path:
    """The file that the network of a saved folder is written to."""
    artifact.read_manifest(path)
    target = Path(path) / f"model.{format}" if to is None else _file(to)
    weights = artifact.weights_file(path)
    if weights.name == artifact.ONNX and target.absolute() == weights.absolute():
        raise InputError(f"{target} already is the smaller network, so there is nothing to export")
    return target


def _file(to: str | os.PathLike[str]) -> Path:
    target = as_path(to, "to")
    artifact.check_free(target)
    return target


def _check_model_known(path: str | os.PathLike[str], plan: Plan, model: nn.Module | None) -> None:
    if model is None and not (plan.source and is_rebuildable(plan.source)):
        known = f" (it was compressed from {plan.source})" if plan.source else ""
        raise InputError(
            f"{path}: the plan does not know how to build the model{known}; "
            "pass a fresh, unpruned instance as model= (--model on the command line)"
        )


def _outputs(model: nn.Module, example: ExampleInputs, made_up: bool) -> list[Tensor]:
    with undisturbed(model):
        try:
            return outputs(model, example)
        except InputError as error:
            if made_up:
                raise InputError(f"{error}. Pass the model's inputs as inputs= (--input on the command line)") from None
            raise


@dataclass(frozen=True)
class _Attempt:
    """One export: writes and checks a file for any batch size if possible, otherwise for the example's batch size."""

    model: nn.Module
    case: Case
    format: Format
    file: Path
    tolerance: float

    def exported(self, dynamic: bool, target: Path) -> Exported:
        """Write and check the file; the result names ``target`` as its path."""
        example, reference = self.case
        batch, why = batch_size(example, reference), ""
        if dynamic and batch is None:
            why = f"the inputs ({example.describe()}) have no batch axis"
        elif dynamic and batch is not None:
            sizes = tuple(dict.fromkeys((batch, batch + 2, 1)))
            try:
                differences = self._any_batch(batch, sizes)
            except (InputError, Refused) as error:
                why = str(error)
            else:
                still = [t for t in example.tensors() if not has_batch(t, batch)]
                why = f"{len(still)} of {len(example.tensors())} inputs have no batch axis" if still else ""
                return Exported(target, self.format.name, *differences, True, sizes, _notes(why, reference))
        try:
            run = write(self.format, trace(self.model, example), self.file)
            differences = largest_differences(run, [self.case], self.tolerance, self.file.name, dynamic=False)
        except Refused as error:
            raise ExportError(
                f"{type(self.model).__name__} can't be exported as {self.format.name}: {error}"
            ) from error
        why = f"fixed batch size: {why}" if why else ""
        return Exported(target, self.format.name, *differences, False, (batch or 1,), _notes(why, reference))

    def _any_batch(self, batch: int, sizes: tuple[int, ...]) -> tuple[float, float]:
        example = self.case[0]
        cases = [self.case]
        with undisturbed(self.model):
            for size in sizes[1:]:
                other = with_batch(example, batch, size)
                cases.append((other, outputs(self.model, other)))
        # At least 2, because the tracer treats an axis of size 1 as always 1.
        least = max(batch, 2)
        traced = trace(self.model, with_batch(example, batch, least), least)
        run = write(self.format, traced, self.file)
        return largest_differences(run, cases, self.tolerance, self.file.name, dynamic=True)


def _notes(why: str, reference: list[Tensor]) -> str:
    blind = not any(bool(tensor.any()) for tensor in reference)
    odd = not all(bool(tensor.isfinite().all()) for tensor in reference)
    says = "outputs are {} on these inputs, so the check says little"
    told = (why, "all " + says.format("zero") if blind else "", "some " + says.format("not finite") if odd else "")
    return "; ".join(filter(None, told))
