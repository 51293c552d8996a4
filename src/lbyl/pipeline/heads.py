"""Makes the inside of attention heads smaller for a budget, in closed form, and verifies; with plan and report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lbyl.errors import BudgetError, InputError
from lbyl.graph.heads import Heads, find_heads
from lbyl.io.huggingface import follow_widths
from lbyl.io.report.rows import Row
from lbyl.moments.heads import HeadMoments, head_moments
from lbyl.pipeline.ground import Ground, after_earlier, effect_on, probed
from lbyl.pipeline.prepare import Prepared
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.restore.depth.effect import Effect
from lbyl.restore.heads import values_inside
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.progress import Clock
from lbyl.surgery.cuts import cut_copy
from lbyl.surgery.heads import head_attributes, plan_heads, rescaled, verify_heads
from lbyl.surgery.plan import GroupPlan, Plan, architecture_of


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
        count, whole, limit, size = self.count, self.whole, self.limit * (1 + 1e-9), self.layers[0].size
        step = self.budget.round_to if isinstance(self.budget.round_to, int) else 1
        least = max(self.budget.min_keep, math.ceil(size * (1 - self.budget.max_ratio) - 1e-9), 1)
        sizes = [n for n in range(step, size, step) if n >= least] + [size]
        if whole <= limit:
            return size
        smallest = count(self.cut({}, sizes[0]))
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
            low, high = (middle, high) if count(self.cut({}, sizes[middle])) <= limit else (low, middle)
        return sizes[low]

    def cut(self, values: Mapping[str, Tensor], size: int) -> nn.Module:
        """The network with heads of this size, whose first channels have these values."""
        model = sharing_copy(self.model, rescaled(values, self.layers, size)) if values else self.model
        return cut_copy(model, plan_heads(model, self.layers, size), head_attributes(model, self.layers, size)).eval()

    def values(self, size: int, solved: bool) -> dict[str, Tensor]:
        """New weights for heads of this size, in the whole network."""
        found: dict[str, Tensor] = {}
        for each in self.layers:
            found |= values_inside(self.model, each, self.moments[each.path], size, solved)
        return found


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
    with clock("trace"):
        layers, others = find_heads(model, inputs)
    layers = tuple(each for each in layers if not any(fnmatchcase(each.path, glob) for glob in budget.exclude))
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
        plain = ground.values(size, solved=False)
        values, smaller = plain, ground.cut(plain, size)
        effects, errors = [ground.effect(smaller)] * 2, [ground.effect.error(smaller)] * 2
        if ground.solves and layers:
            best = ground.values(size, solved=True)
            network = ground.cut(best, size)
            if (effect := ground.effect(network)) < effects[0]:
                values, smaller = best, network
                effects[1], errors[1] = effect, ground.effect.error(network)
    verified = None
    if request.verify:
        with clock("verify"):
            verified = verify_heads(sharing_copy(ground.model, values), smaller, prepared.inputs)
    told = follow_widths(smaller, architecture_of(ground.model))
    report = ground.report(
        smaller,
        clock,
        [*_notes(ground, bool(layers), effects), *([told] if told else [])],
        ground.others,
        verified,
        ground.assessed((errors[0], errors[1])) if layers else None,
        rows=tuple(
            Row(f"{each.path}.head_dim", each.size, size, None, None, None, 0.0, f"in each of {each.count} heads")
            for each in layers
        ),
    )
    return ground.finished(Result(smaller, after_earlier(ground.model, _plan(ground, layers, size)), report))


def _plan(ground: HeadGround, layers: tuple[Heads, ...], size: int) -> Plan:
    return ground.plan(
        groups=tuple(GroupPlan(f"{each.path}.head_dim", each.size, tuple(range(size))) for each in layers),
        cuts=plan_heads(ground.model, layers, size),
        attributes=head_attributes(ground.model, layers, size),
    )


def _notes(ground: HeadGround, smaller: bool, effects: list[float]) -> Iterator[str]:
    if not smaller:
        yield "heads stay as large as they are for this budget"
        return
    told = f"inside of heads: {ground.effect.told} on held-out probes is {effects[0]:.3g} "
    told += "with the channels that have the most power"
    if effects[1] < effects[0]:
        told += f", {effects[1]:.3g} with the best products of queries and keys, and the best values, of this size"
    yield told
    if ground.probes.note:
        yield ground.probes.note
