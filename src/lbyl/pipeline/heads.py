"""Makes the inside of attention heads smaller for a budget, in closed form, and verifies; with plan and report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lbyl.errors import BudgetError, InputError
from lbyl.graph.heads import Heads, Pairs, find_heads
from lbyl.io.huggingface import follow_widths
from lbyl.io.report.rows import Row
from lbyl.moments.heads import HeadMoments, head_moments
from lbyl.pipeline.ground import Ground, after_earlier, effect_on, probed
from lbyl.pipeline.prepare import Prepared
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.restore.depth.effect import Effect
from lbyl.restore.heads import pairs_to_keep, values_inside
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.progress import Clock
from lbyl.surgery.cuts import cut_copy
from lbyl.surgery.heads import head_attributes, plan_heads, rescaled, verify_heads
from lbyl.surgery.plan import GroupPlan, Plan, architecture_of


@dataclass(frozen=True)
class Inside:
    """Smaller heads.

    Attributes:
        values: new weights in the whole network; empty if nothing is cut.
        pairs: the pairs of rotated channels that stay.
        network: the smaller network.
        effect: its effect on held-out probes.
    """

    values: Mapping[str, Tensor]
    pairs: Pairs
    network: nn.Module
    effect: float


@dataclass(frozen=True)
class HeadGround(Ground):
    """What is known of a network before its heads get smaller.

    Attributes:
        layers: the attention layers, whose heads all have one size.
        others: why other layers stay.
        moments: moments inside the heads, by the path of the layer.
        effect: the effect on held-out probes.
    """

    layers: tuple[Heads, ...]
    others: Mapping[str, str]
    moments: Mapping[str, HeadMoments]
    effect: Effect

    def choose(self) -> int:
        """The largest number of channels in each head that the budget allows.

        Raises:
            BudgetError: the smallest heads that may be are too large.
        """
        whole, limit, size = self.whole, self.limit * (1 + 1e-9), self.layers[0].size
        step = self.budget.round_to if isinstance(self.budget.round_to, int) else 1
        step = math.lcm(step, 2) if self.rotates else step  # pairs of channels go together
        least = max(self.budget.min_keep, math.ceil(size * (1 - self.budget.max_ratio) - 1e-9), 1)
        sizes = [n for n in range(step, size, step) if n >= least] + [size]
        if whole <= limit:
            return size
        smallest = self.cost(sizes[0])
        if smallest > limit:
            raise BudgetError(
                f"{self.layers[0].path}: with {sizes[0]} of {size} channels in each head (round_to, min_keep, "
                f"max_ratio), the network has {smallest:,} {self.budget.unit}, {smallest / whole:.1%} of {whole:,}; "
                f"the budget allows {limit:,.0f}. Give a larger budget, and compress the result once more for "
                "other layers",
                smallest / whole,
            )
        low, high = 0, len(sizes) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.cost(sizes[middle]) <= limit else (low, middle)
        return sizes[low]

    @property
    def rotates(self) -> bool:
        """Whether positions rotate pairs of channels."""
        return any(each.rotary for each in self.layers)

    def cost(self, size: int) -> int:
        """The cost of the network with heads of this size; which pairs stay does not matter for it."""
        some = {each.rotary: tuple(range(size // 2)) for each in self.layers if each.rotary}
        return self.count(self.cut({}, size, some))

    def cut(self, values: Mapping[str, Tensor], size: int, pairs: Pairs) -> nn.Module:
        """The network with heads of this size, whose channels that stay have these values."""
        model = sharing_copy(self.model, rescaled(values, self.layers, size)) if values else self.model
        cuts = plan_heads(model, self.layers, size, pairs)
        return cut_copy(model, cuts, head_attributes(model, self.layers, size)).eval()

    def made(self, size: int, solved: bool) -> Inside:
        """Heads of this size, whose values are solved, or are those with the most power."""
        if size == self.layers[0].size:
            return Inside({}, {}, sharing_copy(self.model), 0.0)
        pairs = pairs_to_keep(self.layers, self.moments, size, solved)
        values: dict[str, Tensor] = {}
        for each in self.layers:
            own = self.moments[each.path]
            values |= values_inside(self.model, each, own, size, solved, pairs.get(each.rotary, ()))
        network = self.cut(values, size, pairs)
        return Inside(values, pairs, network, self.effect(network))


def ground_for_heads(prepared: Prepared, request: CompressionRequest, clock: Clock) -> HeadGround:
    """Find attention whose heads can get smaller, make probes, and measure moments.

    Raises:
        InputError: there is none, heads have several sizes, or a criterion was given.
        RestorationError: the network does not run on the probes.
    """
    budget, model, inputs = request.budget, prepared.model, prepared.inputs
    assert budget is not None
    if request.criterion is not None:
        raise InputError(
            "criterion and head_dim: no criterion ranks channels inside heads; leave out criterion (--criterion)"
        )
    with clock("trace"), undisturbed(model):
        layers, others = find_heads(model, inputs)
    excluded = {each for each in layers if any(fnmatchcase(each.path, glob) for glob in budget.exclude)}
    turned = {each.rotary: each.path for each in layers if each.rotary and each not in excluded}
    for each in layers if excluded else ():
        if each in excluded and each.rotary in turned:
            raise InputError(
                f"exclude: {each.rotary} rotates {each.path} as well as {turned[each.rotary]}, so that both lose the "
                "same pairs of channels; exclude all of these layers, or none"
            )
    layers = tuple(each for each in layers if each not in excluded)
    if not layers:
        why = next(
            (f"{path}: {why}" for path, why in others.items()), "no layer is known to make queries, keys and values"
        )
        raise InputError(
            f"{type(model).__name__} has no attention whose heads could get smaller inside ({why}); leave out head_dim "
            "(--head-dim)"
        )
    if len({each.size for each in layers}) > 1:
        sizes = sorted({each.size for each in layers})
        raise InputError(f"heads have {sizes} channels; exclude all but those of one size (exclude, --exclude)")
    with clock("probe"):
        restorer, probes = probed(prepared, request)
        with undisturbed(model):
            moments = head_moments(model, layers, probes.batches)
        effect = effect_on(model, inputs, probes.held_out)
    return HeadGround(prepared, request, budget, restorer, probes, layers, others, moments, effect)


def compress_heads(prepared: Prepared, request: CompressionRequest, clock: Clock) -> Result:
    """Meet a budget by smaller heads: each keeps the best products of queries and keys, and the best values.

    Raises:
        InputError: there is no attention whose heads can get smaller.
        BudgetError: the budget can't be met so.
        VerificationError: the smaller network computes something else.
    """
    ground = ground_for_heads(prepared, request, clock)
    size = ground.choose()
    layers = ground.layers if size < ground.layers[0].size else ()
    with clock("restore"):
        plain = ground.made(size, solved=False)
        best = ground.made(size, solved=True) if ground.solves and layers else plain
        done = best if best.effect < plain.effect else plain
        errors = [ground.effect.error(each.network) for each in (plain, done)] if layers else []
    verified, smaller = None, done.network
    if request.verify:
        with clock("verify"):
            verified = verify_heads(sharing_copy(ground.model, done.values), smaller, prepared.inputs)
    told = follow_widths(smaller, architecture_of(ground.model))
    report = ground.report(
        smaller,
        clock,
        [*_notes(ground, bool(layers), plain, done), *([told] if told else [])],
        ground.others,
        verified,
        ground.assessed((errors[0], errors[1])) if layers else None,
        rows=tuple(
            Row(f"{each.path}.head_dim", each.size, size, None, None, None, 0.0, f"in each of {each.count} heads")
            for each in layers
        ),
    )
    return ground.finished(
        Result(smaller, after_earlier(ground.model, _plan(ground, layers, size, done.pairs)), report)
    )


def _plan(ground: HeadGround, layers: tuple[Heads, ...], size: int, pairs: Pairs) -> Plan:
    return ground.plan(
        groups=tuple(GroupPlan(f"{each.path}.head_dim", each.size, each.turned(size, pairs)) for each in layers),
        cuts=plan_heads(ground.model, layers, size, pairs),
        attributes=head_attributes(ground.model, layers, size),
    )


def _notes(ground: HeadGround, smaller: bool, plain: Inside, done: Inside) -> Iterator[str]:
    if not smaller:
        yield "heads stay as large as they are for this budget"
        return
    told = f"inside of heads: {ground.effect.told} on held-out probes is {plain.effect:.3g} "
    told += "with the channels that have the most power"
    if done is not plain:
        told += f", {done.effect:.3g} with the best products of queries and keys, and the best values, of this size"
    yield told
    for rotary, pairs in done.pairs.items():
        count = ground.layers[0].size // 2
        gone = ", ".join(str(pair) for pair in range(count) if pair not in pairs)
        told = f"rotary positions: all heads lose the same of {count} pairs of channels"
        yield f"{told}, and {rotary} their frequencies: {gone}"
    if ground.probes.note:
        yield ground.probes.note
