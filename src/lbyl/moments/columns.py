"""Moments of consumers' input columns on probes, which some criteria use to score channels."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from lbyl.graph import Consumer, Graph
from lbyl.graph.types import last_to_run
from lbyl.moments.accumulate import ColumnSums
from lbyl.moments.base import Probes
from lbyl.runtime.forward import ConsumerCall, run_intercepted
from lbyl.runtime.memory import give_back
from lbyl.runtime.progress import Progress, counted
from lbyl.runtime.seeding import generator_for
from lbyl.selection.view import ColumnMoments


def column_moments(
    model: nn.Module,
    graph: Graph,
    groups: Collection[int],
    probes: Probes,
    *,
    products: bool,
    seed: int,
    positions: int = 20_000,
    budget: int = 512 * 2**20,
    memory: int = 2**31,
    progress: Progress | None = None,
) -> dict[str, ColumnMoments]:
    """Measure moments of the inputs of some groups' consumers, by the names of the consumers' weights.

    Args:
        model: the unpruned network in evaluation mode; nothing in it is changed.
        graph: its channel graph.
        groups: indices of the groups.
        probes: the probes on which it is run.
        products: whether to measure the products of all pairs of columns, and not only squares.
        seed: seed for sampling positions.
        positions: largest number of positions sampled from each batch when products are measured.
        budget: bytes that the products of one pass over the probes may take. If more are needed, there are several
            passes. For a consumer whose products alone would take more, only squares are measured.
        memory: bytes that all products may take. If they would take more, only squares are measured for the consumers
            with the most columns.
        progress: called as ``progress(stage, done, total)``.
    """
    waiting = [c for c in graph.consumers if any(group in groups for group, _ in c.columns)]
    sizes = _sizes(waiting, budget, memory) if products else {}
    found: dict[str, ColumnMoments] = {}
    while waiting:
        taken, room, later = list[Consumer](), budget, list[Consumer]()
        for consumer in waiting:
            size = sizes.get(consumer.weight, 0)
            (taken if size <= room else later).append(consumer)
            room -= size if size <= room else 0
        sums = {c.weight: _empty(model, c, c.weight in sizes, positions, seed) for c in taken}
        found |= _one_pass(model, sums, probes, last_to_run(taken), progress)
        waiting = later
    return found


def _sizes(consumers: Collection[Consumer], budget: int, memory: int) -> dict[str, int]:
    """Bytes that the products of each consumer take, without those for which only squares are measured."""
    sizes: dict[str, int] = {}
    for consumer in sorted(consumers, key=lambda each: len(each.columns)):
        size = len(consumer.columns) ** 2 * 8
        if size > budget or size > memory:
            break  # those that follow have as many columns or more
        sizes[consumer.weight] = size
        memory -= size
    return sizes


def _empty(model: nn.Module, consumer: Consumer, products: bool, positions: int, seed: int) -> ColumnSums:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    columns = len(consumer.columns)
    shape = (columns, columns) if products else (columns,)
    first, second = (torch.zeros(each, dtype=torch.float64, device=device) for each in ((columns,), shape))
    return ColumnSums(positions, 0, first, second, generator_for(seed, f"{consumer.weight}#columns"))


def _one_pass(
    model: nn.Module,
    sums: Mapping[str, ColumnSums],
    probes: Probes,
    last: str | None,
    progress: Progress | None,
) -> Mapping[str, ColumnMoments]:
    def on_consumer(call: ConsumerCall) -> None:
        if call.weight in sums:
            sums[call.weight].add(call)

    with torch.no_grad():
        for batch in counted(probes.batches, progress, "looking at channels"):
            run_intercepted(
                model, batch, on_consumer=on_consumer, batch_statistics=probes.batch_statistics, stop_after=last
            )
            give_back()
    return {name: item.moments() for name, item in sums.items() if item.count}
