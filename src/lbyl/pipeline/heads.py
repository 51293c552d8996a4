"""Makes the inside of attention heads smaller for a budget, in closed form, and verifies; with plan and report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lbyl.budget.budget import Budget
from lbyl.budget.costs import counter
from lbyl.errors import BudgetError, InputError, VerificationError
from lbyl.graph.heads import Heads, find_heads
from lbyl.io.report.report import Report
from lbyl.io.report.rows import Row
from lbyl.moments.base import Probes
from lbyl.moments.data import Data
from lbyl.moments.heads import HeadMoments, head_moments
from lbyl.pipeline.depth.ground import probed
from lbyl.pipeline.prepare import Prepared
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.restore.base import Restorer
from lbyl.restore.depth.effect import ERROR, Effect
from lbyl.restore.heads import values_inside
from lbyl.restore.least_squares.restorer import LeastSquares
from lbyl.runtime.batches import first_rows, in_parts
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.inputs import output_tensors
from lbyl.runtime.macs import count_macs, count_parameters
from lbyl.runtime.memory import ROOM, held_at_once, held_bytes
from lbyl.runtime.output_error import Assessment
from lbyl.runtime.progress import Clock
from lbyl.runtime.settings import described
from lbyl.runtime.version import library_version
from lbyl.surgery.cuts import cut_copy
from lbyl.surgery.heads import head_attributes, plan_heads, rescaled
from lbyl.surgery.plan import GroupPlan, Plan, architecture_of, remember, remembered
from lbyl.surgery.verification import difference


@dataclass(frozen=True)
class HeadGround:
    """What is known of a network before its heads get smaller.

    Attributes:
        prepared: the network.
        request: the arguments of the compression.
        budget: the budget.
        layers: the attention layers, whose heads all have one size.
        others: why other layers stay.
        restorer: the restorer whose probes are used.
        probes: the probes.
        moments: moments inside the heads, by the path of the layer.
        effect: the effect on held-out probes.
    """

    prepared: Prepared
    request: CompressionRequest
    budget: Budget
    layers: tuple[Heads, ...]
    others: Mapping[str, str]
    restorer: Restorer
    probes: Probes
    moments: Mapping[str, HeadMoments]
    effect: Effect

    @property
    def model(self) -> nn.Module:
        """The network with whole heads."""
        return self.prepared.model

    def choose(self) -> int:
        """The largest number of channels in each head that the budget allows.

        Raises:
            BudgetError: the smallest heads that may be are too large.
        """
        count = counter(self.prepared.inputs, self.budget)
        name, amount = self.budget.limited
        whole, size = count(self.model), self.layers[0].size
        limit = (amount * 1e6 if name == "size_mb" else amount * whole) * (1 + 1e-9)
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
        InputError: there is none, or heads have several sizes.
        RestorationError: the network does not run on the probes.
    """
    budget, model, inputs = request.budget, prepared.model, prepared.inputs
    assert budget is not None
    with clock("trace"):
        layers, others = find_heads(model, inputs)
    layers = tuple(each for each in layers if not any(fnmatchcase(each.path, glob) for glob in budget.exclude))
    if not layers:
        why = next((f"{path}: {why}" for path, why in others.items()), "no layer has fused queries, keys and values")
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
        with undisturbed(model):
            most = held_at_once(ROOM, 2 * held_bytes(model, first_rows(probes.held_out)))
            effect = Effect.of(model, inputs, tuple(in_parts(probes.held_out, most)))
    return HeadGround(prepared, request, budget, layers, others, restorer, probes, moments, effect)


_CLOSE = 1e-4
"""Largest relative difference between the outputs of both networks; half precision is allowed a hundred times more."""


def _verified(ground: HeadGround, values: Mapping[str, Tensor], smaller: nn.Module) -> float:
    """The relative difference from the whole network with zeros in place of the channels that are gone."""
    masked, inputs = sharing_copy(ground.model, values), ground.prepared.inputs
    with undisturbed(masked), undisturbed(smaller), torch.no_grad():
        expected, found = (output_tensors(inputs.cloned().call(network)) for network in (masked, smaller))
    worst = difference(expected, found)
    half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in expected)
    if not worst <= _CLOSE * (100 if half else 1):
        raise VerificationError(
            f"with smaller heads the network computes something else than with zeros in them (relative difference "
            f"{worst:.1e}); leave out head_dim (--head-dim)"
        )
    return worst


def compress_heads(prepared: Prepared, request: CompressionRequest, clock: Clock) -> Result:
    """Meet a budget by smaller heads: each keeps the best products of queries and keys, and the best values.

    Raises:
        InputError: there is no attention whose heads can get smaller.
        BudgetError: the budget can't be met so.
        VerificationError: the smaller network computes something else.
    """
    ground = ground_for_heads(prepared, request, clock)
    size = ground.choose()
    solves = request.restore is None or isinstance(request.restore, LeastSquares)
    with clock("restore"):
        plain = ground.values(size, solved=False)
        values, smaller = plain, ground.cut(plain, size)
        effects, errors = [ground.effect(smaller)] * 2, [ground.effect.error(smaller)] * 2
        if solves:
            best = ground.values(size, solved=True)
            network = ground.cut(best, size)
            if (effect := ground.effect(network)) < effects[0]:
                values, smaller = best, network
                effects[1], errors[1] = effect, ground.effect.error(network)
    verified = None
    if request.verify:
        with clock("verify"):
            verified = _verified(ground, values, smaller)
    plan, first = _plan(ground, size), remembered(ground.model)
    plan = (plan.after(first) or plan) if first else plan
    report = _report(ground, smaller, size, verified, (effects, errors), clock)
    if forecaster := prepared.forecaster:
        lifelike = ground.probes if forecaster.asks_for_probes(ground.restorer) else None
        with clock("forecast"):
            forecast = forecaster(smaller, lifelike)
        report = replace(report, forecast=forecast, seconds=dict(clock.seconds))
    remember(smaller, plan, report)
    return Result(smaller, plan, report)


def _plan(ground: HeadGround, size: int) -> Plan:
    request, layers = ground.request, ground.layers if size < ground.layers[0].size else ()
    settings = {
        "ratio": 0.0,
        "budget": described(ground.budget),
        "scope": request.scope,
        "criterion": "auto",
        "restore": described((request.restore or ground.restorer).settings),
        "seed": request.seed,
    }
    return Plan(
        groups=tuple(GroupPlan(f"{each.path}.head_dim", each.size, tuple(range(size))) for each in layers),
        cuts=plan_heads(ground.model, layers, size),
        attributes=head_attributes(ground.model, layers, size),
        settings=settings,
        architecture=architecture_of(ground.model),
        source=request.source,
        inputs=ground.prepared.inputs.describe(),
        library=library_version(),
        network=type(ground.model).__name__,
    )


def _report(
    ground: HeadGround,
    smaller: nn.Module,
    size: int,
    verified: float | None,
    measured: tuple[list[float], list[float]],
    clock: Clock,
) -> Report:
    model, inputs, (effects, errors) = ground.model, ground.prepared.inputs, measured
    with undisturbed(model), undisturbed(smaller):
        macs = count_macs(model, inputs), count_macs(smaller, inputs)
    layers = ground.layers if size < ground.layers[0].size else ()
    real = isinstance(getattr(ground.restorer, "moments", None), Data)
    return Report(
        rows=tuple(
            Row(f"{each.path}.head_dim", each.size, size, None, None, None, 0.0, f"in each of {each.count} heads")
            for each in layers
        ),
        left=tuple(ground.others.items()),
        barriers=(),
        parameters=(count_parameters(model), count_parameters(smaller)),
        macs=macs,
        verified=verified,
        seconds=dict(clock.seconds),
        notes=tuple(_notes(ground, bool(layers), effects)),
        assessment=Assessment(errors[0], errors[1], ground.probes.holds_out, real) if layers else None,
    )


def _notes(ground: HeadGround, smaller: bool, effects: list[float]) -> Iterator[str]:
    if not smaller:
        yield "heads stay as large as they are for this budget"
        return
    unit = " in nats" if ground.effect.measure != ERROR else ""
    told = f"inside of heads: {ground.effect.measure}{unit} on held-out probes is {effects[0]:.3g} "
    told += "with the channels that have the most power"
    if effects[1] < effects[0]:
        told += f", {effects[1]:.3g} with the best products of queries and keys, and the best values, of this size"
    yield told
    if ground.probes.note:
        yield ground.probes.note
