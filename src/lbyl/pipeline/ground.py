"""What dropping blocks, dropping experts and smaller heads share: probes and their effect, plan, report and result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from lbyl.budget.budget import REACHED_WITHIN, Budget
from lbyl.budget.costs import counter
from lbyl.budget.latency import WholeLatency
from lbyl.io.report.report import Report
from lbyl.io.report.rows import Dropped, Row
from lbyl.moments.base import Probes
from lbyl.moments.data import Data
from lbyl.pipeline.prepare import Prepared, first_probes
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.restore.base import Restorer
from lbyl.restore.depth.effect import Effect
from lbyl.restore.least_squares.restorer import LeastSquares
from lbyl.restore.registry import choose_restorer, fallbacks
from lbyl.runtime.batches import in_parts, split
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.macs import count_macs, count_parameters
from lbyl.runtime.memory import ROOM, a_few, held_at_once, held_by_each
from lbyl.runtime.output_error import Assessment
from lbyl.runtime.progress import Clock
from lbyl.runtime.settings import described
from lbyl.runtime.version import library_version
from lbyl.surgery.attributes import Attribute
from lbyl.surgery.blocks import BlockCut
from lbyl.surgery.cuts import Cut
from lbyl.surgery.plan import GroupPlan, Plan, architecture_of, remember, remembered

_OUTPUTS = 2**29
"""Bytes that the outputs for all held-out probes may take."""


@dataclass(frozen=True)
class Ground:
    """What is known of a network before anything but the number of channels of its layers is chosen.

    Attributes:
        prepared: the network.
        request: the arguments of the compression.
        budget: the budget.
        restorer: the restorer whose probes are used.
        probes: the probes.
    """

    prepared: Prepared
    request: CompressionRequest
    budget: Budget
    restorer: Restorer
    probes: Probes

    @property
    def model(self) -> nn.Module:
        """The whole network."""
        return self.prepared.model

    @cached_property
    def count(self) -> Callable[[nn.Module], int]:
        """Counts the budget's cost of a network, or measures it if that is its latency."""
        if self.budget.latency is not None:
            return WholeLatency.of(self.model, self.prepared.inputs, self.budget.runtime)
        return counter(self.prepared.inputs, self.budget)

    @cached_property
    def whole(self) -> int:
        """The cost of the whole network."""
        return self.count(self.model)

    @cached_property
    def limit(self) -> float:
        """The cost that is allowed."""
        name, amount = self.budget.limited
        return amount * 1e6 if name == "size_mb" else amount * self.whole

    def meets(self, network: nn.Module) -> bool:
        """Whether a network meets the budget as it is; measurements vary, so a latency need only be near it."""
        within = 1e-9 if self.budget.latency is None else REACHED_WITHIN
        return self.count(network) <= self.limit * (1 + within)

    def solving(self, ridges: tuple[float, ...]) -> tuple[tuple[float, ...], int]:
        """The ridges to try, where the user names none, and the largest number of positions to solve on.

        No ridge is tried if another restorer than least squares was asked for: only that one solves these parts.
        """
        own, positions = self.restorer, 20_000
        if isinstance(own, LeastSquares):
            ridges, positions = ridges if own.ridge is None else (own.ridge,), own.positions
        return ridges if self.solves else (), positions

    @property
    def solves(self) -> bool:
        """Whether restoration by least squares is asked for, or left to the library."""
        return self.request.restore is None or isinstance(self.request.restore, LeastSquares)

    def assessed(self, errors: tuple[float, float]) -> Assessment:
        """The relative errors of the outputs on held-out probes, without and with restoration, with what they say."""
        real = isinstance(getattr(self.restorer, "moments", None), Data)
        return Assessment(*errors, self.probes.holds_out, real)

    def plan(
        self,
        groups: tuple[GroupPlan, ...] = (),
        cuts: tuple[Cut, ...] = (),
        attributes: tuple[Attribute, ...] = (),
        blocks: tuple[BlockCut, ...] = (),
    ) -> Plan:
        """The plan of these cuts."""
        request = self.request
        settings = {
            "ratio": 0.0,
            "budget": described(self.budget),
            "scope": request.scope,
            "criterion": "auto" if request.criterion is None else described(request.criterion),
            "restore": described((request.restore or self.restorer).settings),
            "seed": request.seed,
        }
        return Plan(
            groups=groups,
            cuts=cuts,
            attributes=attributes,
            settings=settings,
            architecture=architecture_of(self.model),
            source=request.source,
            inputs=self.prepared.inputs.describe(),
            library=library_version(),
            network=type(self.model).__name__,
            blocks=blocks,
        )

    def report(
        self,
        smaller: nn.Module,
        clock: Clock,
        notes: Iterable[str],
        left: Mapping[str, str],
        verified: float | None,
        assessment: Assessment | None,
        rows: tuple[Row, ...] = (),
        blocks: tuple[Dropped, ...] = (),
    ) -> Report:
        """The report, with the costs of both networks; ``left`` says why the rest stays."""
        model, inputs = self.model, self.prepared.inputs
        unmatched = self.budget.unmatched(path for path, _ in model.named_modules())
        with undisturbed(model), undisturbed(smaller):
            macs = count_macs(model, inputs), count_macs(smaller, inputs)
        return Report(
            rows=rows,
            left=tuple(left.items()),
            barriers=(),
            parameters=(count_parameters(model), count_parameters(smaller)),
            macs=macs,
            verified=verified,
            seconds=dict(clock.seconds),
            notes=tuple(dict.fromkeys((*unmatched, *notes))),  # choosing widths tells of it as well
            assessment=assessment,
            blocks=blocks,
        )

    def finished(self, result: Result, notes: Sequence[str] = ()) -> Result:
        """The result with its forecast and further notes, which the network remembers."""
        report, forecast = result.report, None
        clock = Clock(dict(report.seconds))
        if forecaster := self.prepared.forecaster:
            lifelike = self.probes if forecaster.asks_for_probes(self.restorer) else None
            with clock("forecast"):
                forecast = forecaster(result.model, lifelike)
        report = replace(report, forecast=forecast, seconds=clock.seconds, notes=(*report.notes, *notes))
        remember(result.model, result.plan, report)
        return replace(result, report=report)


def after_earlier(model: nn.Module, plan: Plan) -> Plan:
    """The plan from the unpruned network, if this one was compressed before."""
    first = remembered(model)
    return (plan.after(first) or plan) if first else plan


def probed(prepared: Prepared, request: CompressionRequest) -> tuple[Restorer, Probes]:
    """Probes of the requested restorer, or of the default one if that makes none or fails.

    Raises:
        RestorationError: the network does not run on the probes.
    """
    model, inputs = prepared.model, prepared.inputs
    wanted = request.restore
    if wanted is None or not wanted.takes_probes:
        wanted = choose_restorer(model, inputs, request.effort)[0]
    restorers = (wanted, *fallbacks(wanted)) if request.restore is None else (wanted,)
    with undisturbed(model):
        return first_probes(model, inputs, restorers, request.seed, request.progress)


def effect_on(network: nn.Module, inputs: ExampleInputs, held_out: ExampleInputs, rows: int | None = None) -> Effect:
    """The effect of changes to a network on held-out probes.

    Args:
        network: the original.
        inputs: its example inputs.
        held_out: the held-out probes.
        rows: how many of them to use; None for as many as there is memory for their outputs.
    """
    with undisturbed(network):
        first = a_few(network, held_out)
        if rows is None:
            rows = held_at_once(_OUTPUTS, Effect.bytes_of(network, first))
        size = held_out.size
        used = split(held_out, [rows, size - rows])[0] if rows < size else held_out
        most = held_at_once(ROOM, 2 * held_by_each(network, used))
        return Effect.of(network, inputs, tuple(in_parts(used, most)))
