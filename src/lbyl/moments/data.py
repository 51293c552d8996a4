"""The user's own unlabelled inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from lbyl.errors import InputError, first_line
from lbyl.moments.base import Probes
from lbyl.runtime.checks import check_number, named_kind
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress


@dataclass(frozen=True)
class Data:
    """A few batches of real inputs, preprocessed as the model expects them; labels are not used.

    Attributes:
        source: an iterable of batches, each like ``example_inputs``: a tensor, a tuple or a dict.
        batches: how many batches are read. The last one is held out for measuring, unless it is the only one.
    """

    source: Iterable[Any] = field(repr=False)
    batches: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.source, (str, type)) or not isinstance(self.source, Iterable):
            raise InputError(f"Data: the source is {named_kind(self.source)}; pass a list of batches or a DataLoader")
        check_number("Data(batches={})", self.batches, whole=True, least=1)

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """The first batches of the source, moved to the model's device."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        read = [ExampleInputs.of(batch).to(device) for batch in islice(iter(self.source), self.batches)]
        if not read:
            raise InputError("Data: the source gave no batch; an exhausted generator? pass a list or a DataLoader")
        expected = [(t.shape[1:], t.dtype) for t in inputs.tensors()]
        found = [(t.shape[1:], t.dtype) for t in read[0].tensors()]
        if [e[1] for e in expected] != [f[1] for f in found]:
            raise InputError(
                f"Data: a batch holds {read[0].describe()}, the example inputs {inputs.describe()}; "
                "leave the labels out"
            )
        for batch in {batch.describe(): batch for batch in read}.values():
            _check(model, batch, inputs)
        if len(read) == 1:
            note = "Data: a single batch, so errors are measured on it as well"
            return Probes(tuple(read), read[0], batch_statistics=False, note=note, matches_training_statistics=True)
        return Probes(tuple(read[:-1]), read[-1], batch_statistics=False, matches_training_statistics=True)


def _check(model: nn.Module, batch: ExampleInputs, inputs: ExampleInputs) -> None:
    try:
        with torch.no_grad():
            batch.call(model)
    except Exception as error:
        raise InputError(
            f"Data: the model does not run on a batch of {batch.describe()} ({first_line(error)}); "
            f"batches must be like the example inputs, {inputs.describe()}"
        ) from error
