"""The saved folder: weights, ``lbyl.json``, a model card and a report, written whole or not at all.

``load`` reads only ``model.safetensors`` and ``lbyl.json``. The model card and ``report.html`` are for people,
``report.json`` is for other programs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from lbyl.errors import ArtifactError, InputError, SurgeryError, first_line
from lbyl.graph.computed_weights import apply_folds, fill_folds
from lbyl.io.files import digest, finish, stage, write_whole
from lbyl.io.huggingface import is_pretrained_model, write_config
from lbyl.io.network_files import ONNX, with_source, write_network
from lbyl.io.onnx.network import OnnxNetwork
from lbyl.io.report.model_card import card
from lbyl.io.report.report import Report
from lbyl.io.report.snippets import load_line
from lbyl.io.shards import FLOATING, INDEX, WEIGHTS, Shards
from lbyl.io.sources import load_source
from lbyl.runtime.checks import as_path, check_module
from lbyl.runtime.copying import shape_and_dtype, tensors_of, unwrapped
from lbyl.runtime.documents import document_text, read_json, to_json
from lbyl.runtime.recursion import deep_calls
from lbyl.surgery.blocks import without_blocks
from lbyl.surgery.cuts import cut_copy
from lbyl.surgery.plan import Plan, is_rebuildable, remember

MANIFEST = "lbyl.json"
CARD = "README.md"
PAGE = "report.html"
DOCUMENT = "report.json"


@dataclass(frozen=True)
class Manifest:
    """What ``lbyl.json`` holds: the plan, the report, and the fingerprint of the weights."""

    plan: Plan
    report: Report
    sha256: str


def save(path: str | os.PathLike[str], model: nn.Module, plan: Plan, report: Report) -> Path:
    """Write a compressed model into a new folder, with a report for people and one for machines.

    Everything is written to a temporary folder beside it, which is then renamed, so an unfinished folder is never
    visible. A network that was read from an ONNX file is written as ``model.onnx``, which then stands for the weights;
    one that was read from ``model.pt2`` gets such a file beside them. A model of transformers also gets a
    ``config.json`` if one can express its widths; the saved report says whether it did.

    Raises:
        InputError: the path exists, or its parent does not.
        ArtifactError: the network's file can't be written, or computes something else than the network.
    """
    target = as_path(path)
    check_free(target)
    try:
        with stage(target) as folder:
            plan = with_source(plan, model)
            file = write_network(folder, model, plan)
            if file is not None:
                report = replace(report, notes=(*report.notes, file[1]))
            weights = folder / (ONNX if file is not None and file[0] == ONNX else WEIGHTS)
            if weights.name == WEIGHTS:
                _check_dense(model)
                save_model(model, str(weights), metadata={"format": "pt"})
            if is_pretrained_model(model):
                note = write_config(folder, model, plan.widths_before)
                report = replace(report, notes=(*report.notes, note))
            write_documents(folder, target, plan, report)
            finish(folder)
            folder.rename(target)
    except SafetensorError as error:  # its writer raises this where the disk is full
        raise InputError(f"can't write {target}: {error}") from error
    return target


def _check_dense(model: nn.Module) -> None:
    """Raise InputError for a sparse tensor, which files of weights can't hold."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise InputError(
                f"{name} is sparse, and files of weights (safetensors) hold no sparse tensors; register it as a dense "
                "tensor (to_dense()), or with persistent=False if the code makes it"
            )


def write_documents(folder: Path, target: Path, plan: Plan, report: Report) -> None:
    """Write ``lbyl.json``, model card and reports beside weights; ``target`` is the folder's later name."""
    for name, text in _documents(folder, target, plan, report).items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def rewrite_documents(folder: Path, plan: Plan, report: Report) -> None:
    """Write the same for a folder that is there, each file whole or not at all, and ``lbyl.json`` last."""
    for name, text in _documents(folder, folder, plan, report).items():
        write_whole(folder / name, text)


def _documents(folder: Path, target: Path, plan: Plan, report: Report) -> dict[str, str]:
    from lbyl.io.report.page import page  # Matplotlib and Jinja take long to import

    manifest = {"plan": plan.to_document(), "report": report.to_dict(), "sha256": digest(*weight_files(folder))}
    return {
        CARD: card(plan, report),
        PAGE: page(plan, report),
        DOCUMENT: to_json(document(".", plan, report)),
        MANIFEST: document_text(manifest, f"the plan of {target}"),
    }


def check_free(target: Path) -> None:
    """Raise InputError unless a file or folder of this name can be made: its parent must exist, and it must not."""
    try:
        if target.exists() or target.is_symlink():
            raise InputError(f"{target} exists already; choose another name or remove it first")
        if not target.parent.is_dir():
            raise InputError(f"{target.parent} is not a folder; create it first")
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror or error}; choose another name") from error


def document(path: str | os.PathLike[str], plan: Plan, report: Report, *, trusted: bool = True) -> dict[str, Any]:
    """The outcome for programs: the content of ``report.json``, and what the command line prints with ``--json``.

    Args:
        path: the folder. ``report.json`` says ".", because the folder may be moved.
        plan: what was cut, and with which settings.
        report: the result.
        trusted: whether the plan was made by this process. Otherwise the line that loads the folder names no code.

    Returns:
        Plain data with four keys. ``path`` is the folder. ``load`` is the line of Python that loads it. ``plan`` has
        the fields of :class:`lbyl.Plan` without ``cuts`` and ``architecture``: ``lbyl.json`` has those, and ``groups``
        implies them. ``report`` has the fields of :class:`lbyl.Report`.
    """
    described = {name: value for name, value in plan.to_dict().items() if name not in ("cuts", "architecture")}
    return {
        "path": str(path),
        "load": load_line(path, plan.source if trusted or is_rebuildable(plan.source or "") else None),
        "plan": described,
        "report": report.to_dict(),
    }


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read ``lbyl.json`` of a saved folder.

    Raises:
        ArtifactError: there is no such folder, or its file is damaged or not from lbyl.
    """
    file = as_path(path) / MANIFEST
    with _reading(file):
        if not file.is_file():
            folders = sorted(file.parent.iterdir()) if file.parent.is_dir() else []
            inside = [str(each) for each in folders if is_saved(each)]
            points = f"; those in it are {', '.join(inside[:_NAMED])}" if inside else ""
            raise ArtifactError(f"{path} is not a folder saved by lbyl: it has no {MANIFEST}{points}")
    data = read_json(file)
    if not isinstance(data, dict) or not {"plan", "report", "sha256"} <= data.keys():
        raise ArtifactError(f"{file} is damaged: plan, report or sha256 is missing")
    return Manifest(Plan.from_dict(data["plan"]), Report.from_dict(data["report"]), str(data["sha256"]))


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Rebuild a compressed network from a saved folder.

    Args:
        path: the folder that ``result.save`` wrote.
        model: a fresh, unpruned instance of the architecture; it is not changed. It may be left out if the plan knows
            a ``timm:`` or ``torchvision:`` source, and is not used if the folder's ``model.onnx`` holds the network.

    Returns:
        The smaller network, in evaluation mode.

    Raises:
        ArtifactError: another architecture, a truncated or tampered file, an unknown version.
        InputError: no model was passed and the plan knows no source.
    """
    manifest = read_manifest(path)
    plan = manifest.plan
    if weights_file(path).name == ONNX:
        if plan.network not in ("", OnnxNetwork.__name__):  # plans of 0.1 do not know it
            raise ArtifactError(f"{Path(path) / WEIGHTS} is missing; {ONNX} beside it was exported from it")
        return _load_onnx(weights_file(path), manifest)
    if model is None:
        if plan.source is None or not is_rebuildable(plan.source):
            raise InputError(
                f"{path}: the plan does not know how to build the model; pass lbyl.load(path, model), "
                "or --model SOURCE on the command line"
            )
        model = load_source(plan.source, pretrained=False)
    check_module(model)
    model = unwrapped(model)
    if any(tensor.is_meta for tensor in tensors_of(model).values()):
        raise InputError(f"{type(model).__name__} is on the meta device; pass a fresh instance on the CPU, say")
    plan.check_model(model)
    files = weight_files(path)
    weights = files[0] if len(files) == 1 else Path(path) / INDEX
    with _reading(weights):
        for file in files:
            if not file.is_file():
                raise ArtifactError(f"{file} is missing")
        if digest(*files) != manifest.sha256:
            raise ArtifactError(f"{weights} is not the file that was saved (its SHA-256 differs): truncated or changed")
    try:
        with deep_calls(model):
            fresh = without_blocks(model, plan.blocks) if plan.blocks else model
            smaller = cut_copy(apply_folds(fresh, plan.folds), plan.cuts, plan.attributes)
            _fit_types(smaller, files)
            fill_folds(smaller, fresh, plan.folds)
            _load_weights(smaller, files)
    except (SafetensorError, SurgeryError, RuntimeError, ValueError, TypeError, IndexError, OSError) as error:
        raise ArtifactError(f"{weights} does not fit its plan: {first_line(error)}") from error
    remember(smaller, plan, manifest.report)
    return smaller.eval()


_NAMED = 8
"""So many folders are named that may be meant."""


def is_saved(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder of that name that lbyl saved, as far as its files tell."""
    try:
        return (Path(path) / MANIFEST).is_file()
    except (OSError, ValueError):
        return False


def weights_file(path: str | os.PathLike[str]) -> Path:
    """The file of a saved folder that holds its weights: ``model.onnx``, if the network was read from such a file."""
    file = Path(path) / ONNX
    return file if file.is_file() and not (Path(path) / WEIGHTS).exists() else Path(path) / WEIGHTS


def weight_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a saved folder that hold its weights: one, or several with an index.

    Raises:
        ArtifactError: the index is damaged, or a file that it names is missing.
    """
    folder = Path(path)
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).exists():
        try:
            return Shards.of(folder).paths()
        except InputError as error:
            raise ArtifactError(str(error)) from error
    return [weights_file(path)]


def missing_weights(path: str | os.PathLike[str]) -> str:
    """What a saved folder lacks of its weights, in words; "" if every file is there."""
    try:
        gone = [file for file in weight_files(path) if not file.is_file()]
    except ArtifactError as error:
        return str(error)
    return f"{gone[0]} is missing, so the folder can't be loaded" if gone else ""


class _Plainly:
    """A module whose weights are read as those of any module, also if its class reads them in its own way."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        return nn.Module.state_dict(self._model)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:
        return nn.Module.load_state_dict(self._model, state, strict=strict)


def _load_weights(model: nn.Module, files: Sequence[Path]) -> None:
    """Load the weights of a folder; of several files, one after the other.

    Raises:
        RuntimeError: they are not all of the model's tensors, or more.
    """
    if len(files) == 1:
        load_model(cast(nn.Module, _Plainly(model)), str(files[0]))
        return
    found: set[str] = set()
    for file in files:
        part = load_file(file)
        if others := _Plainly(model).load_state_dict(part, strict=False).unexpected_keys:
            raise RuntimeError(f"the model has no {others[0]}")
        found |= part.keys()
    state = model.state_dict(keep_vars=True)
    known = {id(state[name]) for name in found}  # tied weights are stored once
    if missing := [name for name, tensor in state.items() if id(tensor) not in known]:
        raise RuntimeError(f"there is no {missing[0]}")


def _load_onnx(file: Path, manifest: Manifest) -> nn.Module:
    """The network of a folder whose weights are in an ONNX file."""
    with _reading(file):
        if digest(file) != manifest.sha256:
            raise ArtifactError(f"{file} is not the file that was saved (its SHA-256 differs): truncated or changed")
    try:
        smaller = load_source(str(file))
    except InputError as error:
        raise ArtifactError(str(error)) from error
    remember(smaller, manifest.plan, manifest.report)
    return smaller


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn errors of the operating system into an ArtifactError that names the file."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"{file} can't be read: {error.strerror or error}") from error


def _fit_types(model: nn.Module, files: Sequence[Path]) -> None:
    """Give floating-point tensors the types of those in the files, and check shapes, without reading the tensors.

    Raises:
        SurgeryError: a tensor of the files has another shape than the model's.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            parts = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
            found |= {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    for name, tensor in tensors_of(model).items():
        shape, kind = found.get(name, (() if tensor.is_meta else tuple(tensor.shape), ""))
        if shape != tuple(tensor.shape):
            told = "x".join(map(str, shape)) if name in found else "missing"
            raise SurgeryError(f"{name} is {told} in the file, but {shape_and_dtype(tensor)} according to the plan")
        if (dtype := FLOATING.get(kind, tensor.dtype)) != tensor.dtype and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
