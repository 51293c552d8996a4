"""The user's data as the parts of a network see it that is traced in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lbyl.errors import InputError
from lbyl.graph.submodules import captured
from lbyl.moments.data import Data, usable_batch
from lbyl.restore.base import Restorer
from lbyl.restore.least_squares.restorer import LeastSquares
from lbyl.runtime.inputs import ExampleInputs


def on_parts(restorers: Mapping[str, Restorer], model: nn.Module, inputs: ExampleInputs) -> dict[str, Restorer]:
    """The restorers of a model's parts, by their paths, of which those with data get what the model gives each part.

    Every batch is run through the whole model once, however many parts there are.
    """
    found, reads = dict(restorers), None
    for path, restorer in restorers.items():
        if not isinstance(restorer, LeastSquares) or not isinstance(restorer.moments, Data) or restorer.moments.ray:
            continue
        data = restorer.moments  # the same for all parts
        reads = reads or _Reads(iter(data.source), model, inputs, tuple(restorers))
        found[path] = replace(restorer, moments=replace(data, source=_OfPart(reads, path)))
    return found


class _Reads:
    """Batches that were read so far, as the parts see them."""

    def __init__(self, source: Iterator[object], model: nn.Module, inputs: ExampleInputs, paths: Sequence[str]) -> None:
        self._source, self._model, self._inputs, self._paths = source, model, inputs, paths
        self._read: list[dict[str, ExampleInputs]] = []

    def get(self, number: int, path: str) -> ExampleInputs | None:
        """What a part gets of one batch; None if there is no such batch."""
        while len(self._read) <= number:
            batch = next(self._source, None)
            if batch is None:
                return None
            self._read.append(self._seen(batch))
        return self._read[number][path]

    def _seen(self, batch: object) -> dict[str, ExampleInputs]:
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        made = usable_batch(batch, len(self._read), self._inputs, device)
        calls = captured(self._model, made, self._paths)
        for path, each in calls.items():
            if len(each) != 1:
                raise InputError(
                    f"Data: on batch {len(self._read)} the model calls {path!r} {len(each)} times, and once on the "
                    "example inputs; pass batches that are like these"
                )
        return {path: each[0] for path, each in calls.items()}


@dataclass(frozen=True)
class _OfPart:
    """What one part sees of each batch."""

    reads: _Reads
    path: str

    def __iter__(self) -> Iterator[ExampleInputs]:
        number = 0
        while (batch := self.reads.get(number, self.path)) is not None:
            yield batch
            number += 1
