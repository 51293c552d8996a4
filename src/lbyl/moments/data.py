"""The user's own unlabelled inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from lbyl.errors import InputError, first_line
from lbyl.moments.base import Beyond, Probes
from lbyl.runtime.batches import FEWEST, affordable, alike, batch_size, held_out_size, join_all, macs_per_input, split
from lbyl.runtime.checks import check_number, named_kind
from lbyl.runtime.cluster import check_address, connected, fetched
from lbyl.runtime.inputs import HUGE, ExampleInputs
from lbyl.runtime.progress import Progress


@dataclass(frozen=True)
class Data:
    """A few batches of the user's inputs, preprocessed as the model expects them; labels are not used.

    Attributes:
        source: an iterable of batches, each like ``example_inputs``: a tensor, a tuple or a dict.
        batches: how many batches are read. The last one is held out for measuring errors; of a single one, a quarter of
            its inputs, and nothing of fewer than 8, which the report then says. None reads 4 batches, and more if they
            are small: up to 128 inputs, if 4e11 multiply-accumulates allow. Batches of fewer than 4 inputs are joined
            if they have the same shape and the model runs on larger batches. The report says how many batches were
            read and how many were not.
        ray: the address of a Ray cluster, or "auto". The first batches are then read as without it, and second moments
            are sums over all further ones as well (up to ``batches`` in all), which the machines of the cluster take,
            batch by batch. The source may also be a ``ray.data.Dataset`` or give references to batches in Ray's object
            store (``ray.put``). docs/moments.md says which sums these are.
    """

    source: Iterable[Any] = field(repr=False)
    batches: int | None = None
    ray: str | None = field(default=None, repr=False)

    def lifelike(self, inputs: ExampleInputs) -> bool:
        """Whether its probes are like real inputs."""
        return True

    def __post_init__(self) -> None:
        usable = isinstance(self.source, Iterable) or hasattr(self.source, _OF_DATASETS)
        if isinstance(self.source, (str, type)) or not usable:
            raise InputError(f"Data: the source is {named_kind(self.source)}; pass a list of batches or a DataLoader")
        check_number("Data(batches={})", self.batches, whole=True, optional=True, least=1)
        if self.ray is not None:
            check_address(self.ray)

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """The first batches of the source, moved to the model's device."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        rows = affordable(macs_per_input(model, inputs), _MOST_MACS, _BATCHES, _ROWS, ceiling=_MOST_MACS)
        if self.ray is None:
            (read, note), beyond = self._read(inputs, device, rows), None
        else:
            read, note, beyond = self._begun(self.ray, inputs, device, rows)
        for batch in {batch.describe(): batch for batch in read}.values():
            _check(model, batch, inputs)
        small = len(read) > 1 and min(batch_size(batch) for batch in read) < FEWEST
        if small or (self.batches is None and len(read) > _BATCHES):
            read, how = _regrouped(model, read)
            note = f"{note}; {how}"
        if len(read) == 1:
            read, how = _parted(model, read[0])
            note = f"{note}; {how}"
        batches = tuple(read[:-1] if len(read) > 1 else read)
        return Probes(
            batches, read[-1], batch_statistics=False, note=note, matches_training_statistics=True, beyond=beyond
        )

    def _begun(
        self, address: str, inputs: ExampleInputs, device: torch.device, rows: int
    ) -> tuple[list[ExampleInputs], str, Beyond]:
        """The batches that are kept in memory, a note about them, and the others, which a cluster will read."""
        with connected(address):  # references belong to a connection
            source = _batches_of(self.source)
            first = replace(self, source=map(fetched, islice(source, _BATCHES)), batches=None, ray=None)
            read, _ = first._read(inputs, device, rows)
        others = None if self.batches is None else max(0, self.batches - len(read))
        note = f"Data: {_counted(read)} were kept in memory, and the others were read in the Ray cluster"
        return read, note, Beyond(islice(source, others), address, inputs, len(read))

    def _read(self, inputs: ExampleInputs, device: torch.device, rows: int) -> tuple[list[ExampleInputs], str]:
        """The batches, and a note about how many were read."""
        read, source, count = list[ExampleInputs](), iter(self.source), 0
        while len(read) < (self.batches or _BATCHES) or (self.batches is None and count < rows):
            batch = next(source, None)
            if batch is None:
                break
            read.append(usable_batch(batch, len(read), inputs, device))
            count += batch_size(read[-1])
        else:
            total = len(self.source) if isinstance(self.source, Sized) else None
            if total is None and next(source, None) is not None:
                return read, f"Data: {_counted(read)} were read, and the source had more; Data(batches=...) reads more"
            if total is not None and total > len(read):
                left = f"{total - len(read):,} were not; Data(batches=...) reads more"
                return read, f"Data: {_counted(read)} were read, {left}"
        if not read:
            raise InputError("Data: the source gave no batch; is it a used-up generator? pass a list or a DataLoader")
        return read, f"Data: {_counted(read)} were read, all that the source has"


_BATCHES, _ROWS, _MOST_MACS = 4, 128, 4e11
"""Defaults: this many batches, and if they are small more of them, up to this many inputs or multiply-accumulates."""


def _counted(read: Sequence[ExampleInputs]) -> str:
    return f"{len(read):,} batches ({sum(batch_size(batch) for batch in read):,} inputs)"


def usable_batch(batch: Any, number: int, inputs: ExampleInputs, device: torch.device) -> ExampleInputs:
    """One batch of a user's data on a device, in the form of the example inputs.

    Raises:
        InputError: it differs in kind from the example inputs, or is not finite.
    """
    if isinstance(batch, Mapping) and len(batch) == 1 and not inputs.kwargs:
        batch = next(iter(batch.values()))  # the only column of a dataset
    made = ExampleInputs.of(batch, f"Data: batch {number}").to(device).in_the_form_of(inputs)
    _check_like(made, number, inputs)
    return made


_OF_DATASETS = "iter_torch_batches"
_TABLE_ROWS = 32
"""So many rows of a ``ray.data.Dataset`` are one batch."""


def _batches_of(source: Any) -> Iterator[Any]:
    return iter(source.iter_torch_batches(batch_size=_TABLE_ROWS) if hasattr(source, _OF_DATASETS) else source)


def _check_like(batch: ExampleInputs, number: int, inputs: ExampleInputs) -> None:
    """Raise InputError for a batch that differs in kind from the example inputs, or is not finite."""
    if [t.dtype for t in inputs.tensors()] != [t.dtype for t in batch.tensors()]:
        raise InputError(
            f"Data: batch {number} holds {batch.describe()}, the example inputs {inputs.describe()}; "
            "leave the labels out"
        )
    if batch.has_faults():
        raise InputError(f"Data: batch {number} holds NaN or infinity; leave it out, or correct its preprocessing")
    if (largest := batch.largest()) > HUGE:
        raise InputError(
            f"Data: batch {number} holds values as large as {largest:.1e}, whose squares are infinite in float32; "
            "correct its preprocessing"
        )


def _regrouped(model: nn.Module, read: list[ExampleInputs]) -> tuple[list[ExampleInputs], str]:
    """Join small batches into a few larger ones of equal size, and return them with a note about what was done.

    Statistics of single inputs are useless, and so are errors measured on one.
    """
    whole = sum(batch_size(batch) for batch in read)
    shapes = {tuple(t.shape[1:] for t in batch.tensors()) for batch in read}
    if len(shapes) > 1 or any(not t.dim() or len(t) != batch_size(b) for b in read for t in b.tensors()):
        return read, "they differ in shape and were not joined; errors are measured on the last"
    if whole < _BATCHES:
        return read, "errors are measured on the last"
    held = held_out_size(whole)
    rest = whole - held
    made = split(join_all(read), [*alike(rest, -(-rest // (_BATCHES - 1))), held])
    try:
        for batch in made:
            _check(model, batch, read[0])
    except InputError:
        return read, "the network runs on no other batch size, so they were not joined; errors are measured on the last"
    return made, f"they were joined into {len(made)} batches"


def _parted(model: nn.Module, batch: ExampleInputs) -> tuple[list[ExampleInputs], str]:
    """A single batch as what is solved on and a quarter that is held out, where there is enough of it."""
    rows = batch_size(batch)
    if rows < 2 * FEWEST or any(not t.dim() or len(t) != rows for t in batch.tensors()):
        return [batch], "too few to hold any out, so errors are measured on what was solved on"
    held = held_out_size(rows)
    parts = split(batch, [rows - held, held])
    try:
        for part in parts:
            _check(model, part, batch)
    except InputError:
        return [batch], "the network takes no smaller batch, so errors are measured on what was solved on"
    return parts, f"a single batch, of which {held} inputs were held out"


def _check(model: nn.Module, batch: ExampleInputs, inputs: ExampleInputs) -> None:
    try:
        with torch.no_grad():
            batch.cloned().call(model)
    except Exception as error:
        raise InputError(
            f"Data: the model does not run on a batch of {batch.describe()} ({first_line(error)}); "
            f"batches must be like the example inputs, {inputs.describe()}"
        ) from error
