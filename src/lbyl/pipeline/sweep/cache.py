"""Analysis in a folder, as safetensors and JSON: what was found out once is there for the next run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from lbyl.runtime.inputs import ExampleInputs

GROUPS = "groups.json"
PROBES = "probes.safetensors"
DATA = "data.json"
CURVES = "curves.safetensors"
READINGS = "consumer_moments.safetensors"


@dataclass(frozen=True)
class FolderCache:
    """A cache in a folder of its own.

    Attributes:
        folder: its place, made when something is kept.
        graph: the channel graph; groups are kept by name.
        inputs: the example inputs, whose structure and device probes have.
        private: the probes are the user's data, which is not kept: they are read anew, and must be the same.
    """

    folder: Path
    graph: Graph
    inputs: ExampleInputs
    private: bool

    @property
    def begun(self) -> bool:
        """Whether it is known which groups can be cut."""
        return (self.folder / GROUPS).is_file()

    def cuttable(self, make: Callable[[], Cuttable]) -> Cuttable:
        """Which groups can be cut."""
        file = self.folder / GROUPS
        if not file.exists():
            made = make()
            self.folder.mkdir(parents=True, exist_ok=True)
            names = [self.graph.groups[index].name for index in made.groups]
            write_whole(file, json.dumps({"groups": names, "notes": made.notes}))
        with _reading(file):
            data = json.loads(file.read_text(encoding="utf-8"))
            return Cuttable(tuple(map(self._index, data["groups"])), tuple(map(str, data["notes"])))

    def probes(self, make: Callable[[], Probes]) -> Probes:
        """The probes, to the bit as they were made.

        Raises:
            InputError: the user's data is not what it was.
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
                "the probes are not structured like the example inputs, so a sweep can't keep them; "
                "give lbyl.Data, or a source of probes that follows its inputs"
            )
        tensors = {f"{i}.{j}": t for i, batch in enumerate(batches) for j, t in enumerate(batch.tensors())}
        note = {
            "batches": len(made.batches),
            "batch_statistics": made.batch_statistics,
            "note": made.note,
            "lifelike": made.recalibration_batches,
            "matched": made.matches_training_statistics,
            "judged_in": made.evaluation_batches,
            # Convolutions add in another order in this layout, which shows in the last digits.
            "channels_last": [name for name, tensor in tensors.items() if _is_channels_last(tensor)],
        }
        write_tensors(file, tensors, json.dumps(note))
        return made

    def curves(self, make: Callable[[], Curves]) -> Curves:
        """The error curves."""
        file = self.folder / CURVES
        if not file.exists():
            made = make()
            tensors = {f"{curve.group}": curve.error for curve in made.curves}
            facts = [
                {"group": self.graph.groups[c.group].name, "index": c.group, "order": c.order, "weight": c.weight}
                for c in made.curves
            ]
            write_tensors(file, tensors, json.dumps({"curves": facts, "notes": made.notes}))
            return made
        with _reading(file):
            tensors, note = _read(file)
            curves = (
                Curve(self._index(c["group"]), tuple(c["order"]), tensors[f"{c['index']}"], float(c["weight"]))
                for c in note["curves"]
            )
            return Curves(tuple(curves), tuple(map(str, note["notes"])))

    def consumer_moments(self, make: Callable[[], dict[str, ConsumerMoments]]) -> Mapping[str, ConsumerMoments]:
        """The consumers' moments; of the user's data they are not kept either."""
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
            write_tensors(file, tensors, json.dumps({"readers": facts}))
            return made
        with _reading(file):
            tensors, note = _read(file)
            device = next((t.device for t in self.inputs.tensors()), torch.device("cpu"))
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}

            def restored(number: int, index: int, count: int) -> Moments:
                moments = Moments.zeros(0, 0, device)
                p, pp = tensors[f"{number}.{index}.p"], tensors[f"{number}.{index}.pp"]
                return replace(moments, count=count, p=p, pp=pp, pr=pp[:, :0])

            return {
                str(fact["reader"]): ConsumerMoments(
                    tuple(restored(number, index, int(count)) for index, count in enumerate(fact["counts"])),
                    (tensors[f"{number}.output.0"], tensors[f"{number}.output.1"], tensors[f"{number}.output.2"]),
                )
                for number, fact in enumerate(note["readers"])
            }

    def _index(self, name: str) -> int:
        return next(index for index, group in enumerate(self.graph.groups) if group.name == name)

    def _read_probes(self, file: Path) -> Probes:
        leaves, structure = _leaves(self.inputs)
        with _reading(file):
            tensors, note = _read(file)

            def batch(index: int) -> ExampleInputs:
                numbers = iter(range(len(leaves)))

                def leaf(value: Any) -> Any:
                    if not isinstance(value, Tensor):
                        return value
                    name = f"{index}.{next(numbers)}"
                    layout = torch.channels_last if name in note["channels_last"] else torch.contiguous_format
                    return tensors[name].to(value.device).contiguous(memory_format=layout)

                args, kwargs = pytree.tree_unflatten([leaf(value) for value in leaves], structure)
                return ExampleInputs(args, kwargs)

            count = int(note["batches"])
            return Probes(
                tuple(map(batch, range(count))),
                batch(count),
                bool(note["batch_statistics"]),
                str(note["note"]),
                tuple(map(int, note["lifelike"])),
                bool(note["matched"]),
                tuple(map(int, note.get("judged_in", ()))),
            )

    def _same(self, made: Probes) -> Probes:
        file, now = self.folder / DATA, digest(t for batch in (*made.batches, made.held_out) for t in batch.tensors())
        if not file.exists():
            write_whole(file, json.dumps({"sha256": now}))
        with _reading(file):
            then = json.loads(file.read_text(encoding="utf-8"))["sha256"]
        if then != now:
            raise InputError(
                f"the data is not what it was when this sweep began ({file} has its fingerprint): pass the same "
                "batches in the same request, or begin in another folder"
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


def _read(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    with safe_open(file, framework="pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}, json.loads(content.metadata()["lbyl"])  # noqa: SIM118


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Whatever a damaged file does to its consumer becomes one clear error."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, StopIteration, SafetensorError) as error:
        raise ArtifactError(
            f"{file} is damaged ({type(error).__name__}: {error}); delete it, and it is made anew"
        ) from error
