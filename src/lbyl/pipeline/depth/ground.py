"""What is known of a network before blocks are dropped: which ones can be, what they cost, and probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import nn

from lbyl.budget.budget import Budget
from lbyl.budget.latency import WholeLatency
from lbyl.errors import InputError, VerificationError
from lbyl.graph.blocks import Block, Blocks, find_blocks
from lbyl.moments import Probes
from lbyl.pipeline.ground import Ground, effect_on, probed
from lbyl.pipeline.prepare import Prepared
from lbyl.pipeline.request import CompressionRequest
from lbyl.restore.depth.effect import Effect
from lbyl.restore.least_squares.recalibrate import Statistics, averaged, look, transplant
from lbyl.runtime.batches import macs_per_input
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import sharing_copy, tensors_of
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Clock
from lbyl.selection.blocks import Chosen, choose_blocks, choose_run
from lbyl.surgery.blocks import BlockCut, plan_blocks, verify_blocks, without_blocks

_CALLS = 4e12
"""So many multiply-accumulates may all trials together take while blocks are chosen."""
_FEWEST, _MOST = 2, 64
"""Smallest and largest number of probes for such a trial."""


@dataclass(frozen=True)
class DepthGround(Ground):
    """What is known of a network before blocks are chosen.

    Attributes:
        blocks: the residual blocks, with their calls on the example inputs.
        good: the blocks without which, one by one, the network computes what it computes with the block skipped.
        bad: why each other block can't be dropped.
        judged: the network on which effects are measured: batch norms have the probes' statistics in it, if probes
            do not resemble what it was trained on.
    """

    blocks: Blocks
    good: tuple[Block, ...]
    bad: Mapping[str, str]
    judged: nn.Module = field(repr=False)

    @cached_property
    def costs(self) -> dict[str, int]:
        """The cost of each block that can be dropped."""
        if isinstance(self.count, WholeLatency):
            return self.count.of_modules(each.name for each in self.good)
        return {
            each.name: self.whole - self.count(without_blocks(self.model, self.cuts((each.name,))))
            for each in self.good
        }

    @cached_property
    def effect(self) -> Effect:
        """The effect on held-out probes, at most as many as there is memory for their outputs."""
        return effect_on(self.judged, self.prepared.inputs, self.probes.held_out)

    def cuts(self, names: Sequence[str]) -> tuple[BlockCut, ...]:
        """The cuts that drop these blocks."""
        return plan_blocks(self.model, [each for each in self.blocks.blocks if each.name in names])

    def judged_as(self, network: nn.Module) -> nn.Module:
        """A copy of a smaller network with the probes' statistics, as ``judged`` is one of the whole network."""
        return judged_copy(network, self.probes)

    def scored(self) -> Effect:
        """The effect on so many held-out probes as all trials may take."""
        held_out = self.probes.held_out
        trials = len(self.good) * 4
        with undisturbed(self.model):
            rows = int(_CALLS / trials / macs_per_input(self.model, held_out))
        return effect_on(self.judged, self.prepared.inputs, held_out, max(_FEWEST, min(_MOST, rows)))

    def choose(self) -> tuple[Chosen, Chosen]:
        """Choose blocks until the rest meets the budget, or none is left that may go; and one run that meets it."""
        effect = self.scored()
        done = 0

        def measure(names: tuple[str, ...]) -> float:
            nonlocal done
            done += 1
            if self.request.progress:
                self.request.progress("choosing blocks", done, max(done, 4 * len(self.good)))
            return effect(without_blocks(self.judged, self.cuts(names)))

        def enough(names: tuple[str, ...]) -> bool:
            return self.whole - sum(self.costs[name] for name in names) <= self.limit * (1 + 1e-9)

        def allowed(names: tuple[str, ...]) -> bool:
            return all(cut.keep for cut in self.cuts(names))

        names = [each.name for each in self.good if self.costs[each.name] > 0]
        chosen = choose_blocks(names, allowed, enough, measure)
        return chosen, choose_run(chosen, names, allowed, enough, measure)


def ground_for_depth(prepared: Prepared, request: CompressionRequest, clock: Clock) -> DepthGround:
    """Find the blocks of a network that can be dropped, and make probes.

    Raises:
        InputError: there is no such block.
        RestorationError: the network does not run on the probes.
    """
    assert request.budget is not None
    model, inputs = prepared.model, prepared.inputs
    with clock("trace"), undisturbed(model):
        blocks = find_blocks(model, inputs)
    if not blocks.blocks:
        raise InputError(
            f"{type(model).__name__} has no residual blocks that could be dropped: children of an nn.ModuleList or "
            "nn.Sequential whose output has the shape of their input; leave out depth (--depth)"
        )
    with clock("verify"):
        good, bad = _droppable(model, inputs, blocks, request.budget)
    if not good:
        name, why = next(iter(bad.items()))
        raise InputError(f"no block can be dropped: {name}: {why}; leave out depth (--depth)")
    with clock("probe"):
        restorer, probes = probed(prepared, request)
    judged = judged_copy(model, probes)
    return DepthGround(prepared, request, request.budget, restorer, probes, blocks, good, bad, judged)


def _droppable(
    model: nn.Module, inputs: ExampleInputs, blocks: Blocks, budget: Budget
) -> tuple[tuple[Block, ...], dict[str, str]]:
    good: list[Block] = []
    bad: dict[str, str] = {}
    patterns = [pattern for pattern in budget.exclude if pattern != "*"]  # with "*" nothing but blocks may go
    for block in blocks.blocks:
        if any(fnmatchcase(block.name, pattern) for pattern in patterns):
            bad[block.name] = "excluded"
            continue
        cuts = plan_blocks(model, [block])
        if not cuts[0].keep:
            bad[block.name] = "it is the only one of its list"
            continue
        try:
            verify_blocks(model, without_blocks(model, cuts), inputs, [block.name])
        except VerificationError as error:
            bad[block.name] = str(error)
        else:
            good.append(block)
    return tuple(good), bad


def judged_copy(model: nn.Module, probes: Probes) -> nn.Module:
    """A copy of a network in which batch norms have the statistics of the probes that resemble the held-out ones."""
    statistics = probe_statistics(model, probes)
    return sharing_copy(model, transplant({}, tensors_of(model), statistics))


def probe_statistics(model: nn.Module, probes: Probes) -> Statistics:
    """The statistics of batch norms on these probes; {} if batch norms keep their running statistics on them."""
    if not probes.batch_statistics:
        return {}
    indices = probes.evaluation_batches or range(len(probes.batches))
    with undisturbed(model), torch.no_grad():
        return averaged([look(model, {}, probes.batches[index]) for index in indices])
