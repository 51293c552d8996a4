"""Sums over all input channels of consumers, taken batch by batch: here, or on the machines of a cluster."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from lbyl.graph import Graph
from lbyl.graph.types import Consumer, last_to_run
from lbyl.moments.accumulate import UNFOLDED, ConsumerMoments, WholeSums
from lbyl.moments.base import Beyond, Probes
from lbyl.moments.data import usable_batch
from lbyl.restore.least_squares.settings import Settings
from lbyl.restore.targets import output_first
from lbyl.runtime.cluster import connected, fetched, packed
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.forward import ConsumerCall, run_intercepted
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress
from lbyl.runtime.seeding import generator_for

_PER_TASK = 8
"""Number of batches whose sums a task returns together: sums of a wide layer are larger than the batches."""


@dataclass(frozen=True)
class SumPlan:
    """The consumers whose moments are summed, in execution order, and how positions are sampled.

    Attributes:
        consumers: the consumers.
        positions: at most this many positions a call are taken.
        seed: seed for sampling them.
    """

    consumers: tuple[Consumer, ...]
    positions: int
    seed: int

    def over(
        self, model: nn.Module, batches: Iterable[ExampleInputs], probes: Probes, name: str = ""
    ) -> dict[str, ConsumerMoments]:
        """Run the model on some batches, and return the sums over its consumers' inputs.

        ``name`` distinguishes the generators of batches that are not summed one after the other.
        """
        state = tensors_of(model)
        weights = {consumer.weight: output_first(consumer, state) for consumer in self.consumers}
        sums = {
            consumer.weight: WholeSums(
                consumer.blocks, self.positions, generator_for(self.seed, f"{consumer.weight}#positions{name}")
            )
            for consumer in self.consumers
        }

        def on_consumer(call: ConsumerCall) -> None:
            if call.weight in sums:
                sums[call.weight].add(call, weights[call.weight])

        with torch.no_grad():
            last = last_to_run(self.consumers)
            for batch in batches:
                run_intercepted(
                    model, batch, on_consumer=on_consumer, batch_statistics=probes.batch_statistics, stop_after=last
                )
        return {weight: reading for weight, item in sums.items() if (reading := item.reading())}


def planned_sums(
    model: nn.Module, graph: Graph, groups: Collection[int], settings: Settings, seed: int, limit: int
) -> SumPlan:
    """The consumers of some groups whose moments can be summed before channels are chosen, within ``limit`` bytes.

    Left out are consumers that are solved by "mix", and those of channels that a layer norm is taken over.
    """
    state, chosen = tensors_of(model), list[Consumer]()
    for consumer in graph.consumers if settings.solve == "patch" else ():
        read_groups = {group for group, _ in consumer.columns if group in groups}
        # After a layer norm, the inputs depend on which channels are kept.
        if consumer.op in UNFOLDED or not read_groups or any(graph.groups[index].layer_norms for index in read_groups):
            continue
        size = consumer.blocks * (output_first(consumer, state)[0].numel()) ** 2 * 8
        if size > min(limit, settings.budget):
            continue
        limit -= size
        chosen.append(consumer)
    return SumPlan(tuple(chosen), settings.positions, seed)


@dataclass(frozen=True)
class _Share:
    """What all tasks share."""

    plan: SumPlan
    model: nn.Module
    inputs: ExampleInputs
    probes: Probes


def with_cluster(
    found: Mapping[str, ConsumerMoments],
    plan: SumPlan,
    model: nn.Module,
    probes: Probes,
    beyond: Beyond,
    progress: Progress | None,
) -> dict[str, ConsumerMoments]:
    """Sums over the batches in memory, plus those over further batches, which the machines of a cluster take.

    Tasks may finish in any order, but are added in that of the batches, so that equal batches give equal sums.

    Raises:
        InputError: a batch is not like the example inputs, or something can't be sent.
        ClusterError: the cluster can't do the work.
    """
    total, early, turn = dict(found), dict[int, dict[str, ConsumerMoments]](), 0
    # The probes' batches stay here: a task only needs to know how the model is run.
    share = _Share(plan, model, beyond.inputs, replace(probes, batches=(), beyond=None))
    gpus = len({tensor.device for tensor in tensors_of(model).values() if tensor.is_cuda})
    with connected(beyond.cluster) as cluster:
        tasks = cluster.each(_summed, packed({"the network": share}), _parts(beyond), gpus)
        for number, sums in tasks:
            early[number] = sums
            while turn in early:
                sums, turn = early.pop(turn), turn + 1
                total = {weight: total[weight].plus(sums[weight]) for weight in total}
            if progress:
                progress("summing in the cluster", number + 1, 0)
    return total


def _parts(beyond: Beyond) -> Iterator[tuple[int, list[Any]]]:
    """Batches for one task each, with the number of the first one."""
    number = beyond.first
    while part := list(islice(beyond.batches, _PER_TASK)):
        yield number, part
        number += len(part)


def _summed(shared: Mapping[str, _Share], item: tuple[int, list[Any]]) -> dict[str, ConsumerMoments]:
    """The task: sums over some batches, which are checked like all of the user's data."""
    (share,) = shared.values()
    first, part = item
    device = next((p.device for p in share.model.parameters()), torch.device("cpu"))
    batches = (usable_batch(fetched(batch), first + number, share.inputs, device) for number, batch in enumerate(part))
    return share.plan.over(share.model, batches, share.probes, f"#beyond {first}")
