"""Stores the analysis in a folder, as safetensors and JSON, so that later runs can use it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils import _pytree as pytree

from lbyl.budget.curves import Curve, Curves
from lbyl.errors import ArtifactError, InputError
from lbyl.graph import Graph
from lbyl.io.files import write_tensors, write_whole
from lbyl.moments import Probes
from lbyl.moments.accumulate import ConsumerMoments, Moments
from lbyl.pipeline.analysis import Cuttable
from lbyl.runtime.documents import parse_json, read_as, read_json
from lbyl.runtime.inputs import ExampleInputs

GROUPS = "groups.json"
PROBES = "probes.safetensors"
DATA = "data.json"
CURVES = "curves.safetensors"
READINGS = "consumer_moments.safetensors"
_SEAL = "sha256"


Note = TypeVar("Note")


@dataclass(frozen=True)
class _GroupsNote:
    """Names of the groups that can be cut; notes on the others."""

    groups: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _ProbesNote:
    """The fields of :class:`lbyl.moments.Probes` that are not tensors; three keys have the names of version 0.1.0."""

    batches: int
    batch_statistics: bool
    note: str
    lifelike: tuple[int, ...]
    matched: bool
    channels_last: tuple[str, ...]
    judged_in: tuple[int, ...] = ()
    statistics: tuple[str, ...] = ()
    holds_out: bool = True
    kinds: tuple[int, ...] = ()


@dataclass(frozen=True)
class _CurveNote:
    """An error curve without its tensors, the errors and the order of the channels."""

    group: str
    index: int


@dataclass(frozen=True)
class _CurvesNote:
    """All error curves without their tensors."""

    curves: tuple[_CurveNote, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _ConsumerNote:
    """A consumer, and the number of positions in the sums of each block."""

    reader: str
    counts: tuple[int, ...]


@dataclass(frozen=True)
class _ConsumersNote:
    """All consumers whose moments are kept."""

    readers: tuple[_ConsumerNote, ...]


@dataclass(frozen=True)
class _DataNote:
    """The fingerprint of the user's data."""

    sha256: str


@dataclass(frozen=True)
class FolderCache:
    """Stores the analysis of one part of the network in its own folder.

    Attributes:
        folder: the folder, which is made when something is stored.
        graph: the channel graph; groups are stored by name.
        inputs: the example inputs; probes have their structure and device.
        private: whether the probes are the user's data. These are not stored, but read again, and must be equal.
        fingerprint: what all files depend on, as text. Each file is sealed with it, so that neither a changed bit nor
            the file of another network is taken for its own.
    """

    folder: Path
    graph: Graph
    inputs: ExampleInputs
    private: bool
    fingerprint: str = ""

    @property
    def begun(self) -> bool:
        """Whether the cuttable groups are stored."""
        return (self.folder / GROUPS).is_file()

    def cuttable(self, make: Callable[[], Cuttable]) -> Cuttable:
        """The groups that can be cut."""
        file = self.folder / GROUPS
        if not file.exists():
            made = make()
            self.folder.mkdir(parents=True, exist_ok=True)
            names = [self.graph.groups[index].name for index in made.groups]
            note = {"groups": names, "notes": made.notes}
            write_whole(file, json.dumps({**note, _SEAL: self._seal({}, note)}))
        with _reading(file):
            note = self._checked(read_json(file), {})
            found = read_as(_GroupsNote, note, str(file))
            return Cuttable(tuple(map(self._index, found.groups)), found.notes)

    def probes(self, make: Callable[[], Probes]) -> Probes:
        """The probes, exactly as they were made.

        Raises:
            InputError: the user's data has changed.
        """
        if self.private:
            return self._same(make())
        file = self.folder / PROBES
        if file.exists():
            return self._read_probes(file)
        made = make()
        batches = [*made.batches, made.held_out]
        expected = _leaves(self.inputs)[1]
        if any(_leaves(batch)[1] != expected for batch in batches):
            raise InputError(
                "the probes do not have the structure of the example inputs, so a sweep can't store them; "
                "use lbyl.Data, or a source whose probes have this structure"
            )
        tensors = {f"{i}.{j}": t for i, batch in enumerate(batches) for j, t in enumerate(batch.tensors())}
        for number, (mean, var) in enumerate(made.statistics.values()):
            tensors |= {f"statistics.{number}.mean": mean, f"statistics.{number}.var": var}
        note = {
            "statistics": list(made.statistics),
            "batches": len(made.batches),
            "batch_statistics": made.batch_statistics,
            "note": made.note,
            "lifelike": made.recalibration_batches,
            "matched": made.matches_training_statistics,
            "judged_in": made.evaluation_batches,
            "holds_out": made.holds_out,
            "kinds": made.kinds,
            # The memory format is stored, because it changes the last digits of convolutions.
            "channels_last": [name for name, tensor in tensors.items() if _is_channels_last(tensor)],
        }
        self._write(file, tensors, note)
        return made

    def curves(self, make: Callable[[], Curves]) -> Curves:
        """The error curves."""
        file = self.folder / CURVES
        if not file.exists():
            made = make()
            tensors = {f"{curve.group}": curve.error for curve in made.curves}
            tensors |= {f"{curve.group}.order": torch.tensor(curve.order, dtype=torch.long) for curve in made.curves}
            facts = [{"group": self.graph.groups[c.group].name, "index": c.group} for c in made.curves]
            self._write(file, tensors, {"curves": facts, "notes": made.notes})
            return made
        with _reading(file):
            tensors, note = self._read(file, _CurvesNote)
            return Curves(tuple(self._curve(fact, tensors) for fact in note.curves), note.notes)

    def consumer_moments(self, make: Callable[[], dict[str, ConsumerMoments]]) -> Mapping[str, ConsumerMoments]:
        """The consumers' moments. Those of the user's data are not stored either."""
        if self.private:
            return make()
        file = self.folder / READINGS
        if not file.exists():
            made = make()
            tensors: dict[str, Tensor] = {}
            facts: list[dict[str, Any]] = []
            for number, (name, reading) in enumerate(made.items()):
                facts.append({"reader": name, "counts": [block.count for block in reading.blocks]})
                for index, block in enumerate(reading.blocks):
                    tensors |= {f"{number}.{index}.p": block.p, f"{number}.{index}.pp": block.pp}
                tensors |= {f"{number}.output.{index}": part for index, part in enumerate(reading.output)}
            self._write(file, tensors, {"readers": facts})
            return made
        with _reading(file):
            tensors, note = self._read(file, _ConsumersNote)
            device = next((t.device for t in self.inputs.tensors()), torch.device("cpu"))
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}

            def restored(number: int, index: int, count: int) -> Moments:
                moments = Moments.zeros(0, 0, device)
                p, pp = tensors[f"{number}.{index}.p"], tensors[f"{number}.{index}.pp"]
                _check_sums(p, len(p))
                _check_sums(pp, len(p), len(p))
                if bool((pp.diagonal() < 0).any()):
                    raise ValueError("a sum of squares below zero")
                return replace(moments, count=count, p=p, pp=pp, pr=pp[:, :0])

            found: dict[str, ConsumerMoments] = {}
            for number, fact in enumerate(note.readers):
                count, *sums = (tensors[f"{number}.output.{part}"] for part in range(3))
                for part in (count, *sums):
                    _check_sums(part, *(() if part is count else sums[0].shape))
                spread = count * sums[1] - sums[0].square()
                if count <= 0 or min(fact.counts, default=0) < 0 or bool((spread < -1e-6 * count * sums[1]).any()):
                    raise ValueError(f"{fact.reader}: these are not sums over positions")
                blocks = tuple(restored(number, index, count) for index, count in enumerate(fact.counts))
                found[fact.reader] = ConsumerMoments(blocks, (count, sums[0], sums[1]))
            return found

    def _curve(self, fact: _CurveNote, tensors: Mapping[str, Tensor]) -> Curve:
        group, error = self._index(fact.group), tensors[f"{fact.index}"]
        order = tuple(tensors[f"{fact.index}.order"].tolist())
        width = self.graph.groups[group].width
        distinct = set(order) <= set(range(width)) and len(set(order)) == len(order)
        if not distinct:
            raise ValueError(f"{fact.group} has {width} channels, but this is not a valid order of them")
        _check_sums(error, len(order) + 1)
        return Curve(group, order, error)

    def _write(self, file: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Write tensors and a note, with their seal."""
        write_tensors(file, tensors, json.dumps({**note, _SEAL: self._seal(tensors, note)}))

    def _read(self, file: Path, kind: type[Note]) -> tuple[dict[str, Tensor], Note]:
        """The tensors of a file, and its note."""
        with safe_open(file, framework="pt") as content:
            note = parse_json(content.metadata()["lbyl"].encode(), str(file))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        return tensors, read_as(kind, self._checked(note, tensors), str(file))

    def _seal(self, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> str:
        """SHA-256 over the fingerprint, the note, and all tensors with their names."""
        names = sorted(tensors)
        text = json.dumps([self.fingerprint, note, names, digest(tensors[name] for name in names)])
        return hashlib.sha256(text.encode()).hexdigest()

    def _checked(self, note: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """A note without its seal, which must be right."""
        if not isinstance(note, dict):
            raise ValueError("the note is no object")
        plain = {name: value for name, value in note.items() if name != _SEAL}
        if note.get(_SEAL) != self._seal(tensors, plain):
            raise ValueError("it was changed, or is of another network")
        return plain

    def _index(self, name: str) -> int:
        return next(index for index, group in enumerate(self.graph.groups) if group.name == name)

    def _read_probes(self, file: Path) -> Probes:
        leaves, structure = _leaves(self.inputs)
        with _reading(file):
            tensors, note = self._read(file, _ProbesNote)

            def batch(index: int) -> ExampleInputs:
                numbers = iter(range(len(leaves)))

                def leaf(value: Any) -> Any:
                    if not isinstance(value, Tensor):
                        return value
                    name = f"{index}.{next(numbers)}"
                    layout = torch.channels_last if name in note.channels_last else torch.contiguous_format
                    if tensors[name].dtype != value.dtype or tensors[name].dim() != value.dim():
                        raise ValueError(f"{name} is not like the example inputs")
                    return tensors[name].to(value.device).contiguous(memory_format=layout)

                args, kwargs = pytree.tree_unflatten([leaf(value) for value in leaves], structure)
                return replace(self.inputs, args=args, kwargs=kwargs)

            return Probes(
                tuple(map(batch, range(note.batches))),
                batch(note.batches),
                note.batch_statistics,
                note.note,
                note.lifelike,
                note.matched,
                note.judged_in,
                {
                    layer: (tensors[f"statistics.{number}.mean"], tensors[f"statistics.{number}.var"])
                    for number, layer in enumerate(note.statistics)
                },
                note.holds_out,
                kinds=note.kinds,
            )

    def _same(self, made: Probes) -> Probes:
        file, now = self.folder / DATA, digest(t for batch in (*made.batches, made.held_out) for t in batch.tensors())
        if not file.exists():
            write_whole(file, json.dumps({"sha256": now}))
        with _reading(file):
            then = read_as(_DataNote, read_json(file), str(file))
        if then.sha256 != now:
            raise InputError(
                f"the data has changed since this sweep began ({file} has its fingerprint): pass the same "
                "batches, or begin in another folder"
            )
        return made


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over types, shapes and contents."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _leaves(inputs: ExampleInputs) -> tuple[Sequence[Any], Any]:
    return pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )  # fmt: skip


def _check_sums(tensor: Tensor, *shape: int) -> None:
    """Raise ValueError unless a tensor holds finite real numbers in this shape."""
    if tuple(tensor.shape) != shape or tensor.is_complex() or not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"a tensor of {tuple(tensor.shape)} where finite numbers of {shape} should be")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn any error from a damaged file into one clear error."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{error}; delete {file.name}, and it will be made again") from error
    except (OSError, ValueError, KeyError, TypeError, StopIteration, SafetensorError) as error:
        raise ArtifactError(
            f"{file} is damaged ({type(error).__name__}: {error}); delete it, and it will be made again"
        ) from error
