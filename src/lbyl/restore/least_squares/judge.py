"""Measures what a restoration loses on held-out probes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor, nn

from lbyl.moments import Probes
from lbyl.moments.attached_norms import with_norms
from lbyl.restore.least_squares.recalibrate import Look, Statistics, averaged, look, transplant
from lbyl.restore.least_squares.recall import Recall
from lbyl.runtime.attended import at_attended, attended_positions
from lbyl.runtime.batches import batch_size, in_parts, join, split
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.forward import run_intercepted
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.layer_norms import NormMasks
from lbyl.runtime.memory import give_back, held_at_once, held_by_each
from lbyl.runtime.output_error import error_of_parts
from lbyl.selection.filters import State


@dataclass(frozen=True)
class Judge:
    """Measures the relative error of the outputs on held-out probes for given values of parameters and buffers."""

    model: nn.Module
    state: State
    held_out: tuple[ExampleInputs, ...]
    kept: NormMasks
    world: Statistics
    expected: list[list[Tensor]]
    where: str

    @staticmethod
    def over(
        model: nn.Module, probes: Probes, memory: int, looks: Mapping[int, Look], kept: NormMasks | None = None
    ) -> Judge:
        """A judge whose batch norms have the statistics of the probes that resemble the held-out ones.

        ``looks`` holds measurements of the unpruned network by the number of the batch, at least of
        `evaluated_batches`; it may be empty if there is no batch norm.
        """
        world: Statistics = {}
        if probes.batch_statistics and looks:
            world = averaged([looks[number] for number in evaluated_batches(probes)])
        state = tensors_of(model)
        most = held_at_once(memory, held_by_each(model, probes.held_out))
        parts = tuple(in_parts(probes.held_out, most))
        where = "held-out probes" if probes.holds_out else "what was solved on"
        judge = Judge(model, state, parts, kept or {}, world, [], where)
        return replace(judge, expected=list(judge.outputs({})))

    def by_kind(self, kinds: Sequence[int]) -> tuple[Judge, ...]:
        """A judge for each kind of held-out probes, of which there are so many; () if there are not several kinds."""
        if len(kinds) < 2:
            return ()
        most = max(map(batch_size, self.held_out))  # what memory allows
        parts = [tuple(in_parts(part, most)) for part in split(join(self.held_out), kinds)]
        judges = [replace(self, held_out=part, where="one kind of held-out probes") for part in parts]
        return tuple(replace(judge, expected=list(judge.outputs({}))) for judge in judges)

    def outputs(self, values: Mapping[str, Tensor], kept: NormMasks | None = None) -> Iterator[list[Tensor]]:
        """The network's outputs for all held-out probes, part by part."""
        moved = transplant(values, self.state, self.world)
        for part in self.held_out:
            given = output_tensors(run_intercepted(self.model, part, values=moved, kept=kept))
            attended = attended_positions(self.model, part)
            yield [at_attended(attended, tensor) for tensor in given]
            del given
            give_back()

    def __call__(self, values: Mapping[str, Tensor]) -> float:
        """The error of these values."""
        return error_of_parts(self.expected, self.outputs(values, self.kept))


@dataclass(frozen=True)
class Reference:
    """What an unpruned network gives for probes, measured at first use, which all restorations of it are held against.

    Attributes:
        model: the network, with attached batch norms if it gets some.
        probes: the probes.
        memory: bytes that activations may take.
        recall: what is kept of it from one restoration to the next.
    """

    model: nn.Module
    probes: Probes
    memory: int
    recall: Recall = field(default_factory=Recall)

    @staticmethod
    def of(model: nn.Module, probes: Probes, memory: int, several: bool = False) -> Reference:
        """The reference of a network without attached batch norms; ``several`` says whether for many restorations."""
        recall = Recall.within(memory) if several else Recall()
        return Reference(with_norms(model, probes.statistics), probes, memory, recall)

    @cached_property
    def judge(self) -> Judge:
        """The judge of networks in which no layer norm is over pruned channels."""
        probes = self.probes
        looks = {number: look(self.model, {}, probes.batches[number]) for number in evaluated_batches(probes)}
        return Judge.over(self.model, probes, self.memory, looks)


def evaluated_batches(probes: Probes) -> Sequence[int]:
    """The numbers of the batches that resemble the held-out probes."""
    return probes.evaluation_batches or range(len(probes.batches))
