"""Blocks, experts and channels together: tries several ways to spend a budget, and keeps what is best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lbyl.budget.latency import told_latency
from lbyl.errors import LbylError
from lbyl.moments import Generated
from lbyl.pipeline.depth.drop import depth_result, shallower
from lbyl.pipeline.depth.ground import DepthGround, ground_for_depth
from lbyl.pipeline.experts import ExpertGround, experts_after, without_experts
from lbyl.pipeline.narrower import joined, narrower
from lbyl.pipeline.prepare import Prepared
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.runtime.bench import bench
from lbyl.runtime.progress import Clock
from lbyl.selection.blocks import Chosen


@dataclass(frozen=True)
class Way:
    """One way to spend a budget: these blocks go, then experts, then channels for the rest.

    Attributes:
        blocks: the blocks.
        run: whether they were chosen as one run.
        experts: the share of what is left to save that experts save, as far as they can.
    """

    blocks: Chosen
    run: bool = False
    experts: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """A network that meets the budget.

    Attributes:
        way: how.
        cut: whether channels were cut as well.
        result: the network, with plan and report.
        effect: the effect on held-out probes.
        experts: how many experts were dropped.
    """

    way: Way
    cut: bool
    result: Result
    effect: float
    experts: int = 0

    @property
    def what(self) -> str:
        """The attempt in words."""
        return f"without {_gone(self.way, self.experts)}" + " and with narrower layers" * self.cut

    @property
    def told(self) -> str:
        """The attempt and its effect in words."""
        return f"{self.effect:.3g} {self.what}"


_DOUBT = 0.75
"""A model's own text praises dropped blocks too much (docs/research.md). There they have to change outputs by no more
than this share of what others change."""


def weighed(effect: float, drops_blocks: bool, own_text: bool) -> float:
    """An effect by which attempts are compared: larger if blocks are dropped and the probes are the model's own text.

    Args:
        effect: the effect on held-out probes.
        drops_blocks: whether blocks are dropped.
        own_text: whether the model wrote the probes itself.
    """
    return effect / _DOUBT if own_text and drops_blocks else effect


def best_of(attempts: Sequence[Attempt], own_text: bool) -> tuple[Attempt, str]:
    """The attempt to keep, and a note if it is not the one of the least effect ("" if it is)."""
    best = min(attempts, key=lambda each: weighed(each.effect, bool(each.way.blocks.blocks), own_text))
    least = min(attempts, key=lambda each: each.effect)
    if best.effect == least.effect:
        return best, ""
    return best, f"kept: {best.what}, because a model's own text praises dropped blocks too much"


def compress_together(prepared: Prepared, request: CompressionRequest, clock: Clock) -> Result:
    """Meet a budget by dropping blocks or experts, by cutting channels, or by several, whichever changes outputs least.

    Blocks are chosen until they meet the budget alone, one by one and as one run. Then the run is dropped, all of the
    single ones, half of them, and none; channels are cut for what is left of the budget. If experts may go as well,
    they are also tried alone, with half of the blocks, and with narrower layers, half of the budget each. Text that a
    model writes itself praises dropped blocks too much; there they have to be clearly better.

    Raises:
        InputError: there is no block that can be dropped, or there are no experts.
        LbylError: no attempt succeeds; the error of the first one.
    """
    ground = ground_for_depth(prepared, request, clock)
    with clock("choose blocks"):
        chosen, run = ground.choose()
    counts = sorted({0, len(chosen.blocks) // 2, len(chosen.blocks)}, reverse=True)
    ways = [Way(chosen.first(count)) for count in counts]
    if run.blocks and {*run.blocks} != {*chosen.blocks}:
        ways.append(Way(run, run=True))
    experts = experts_after(ground, None, ground.effect, clock) if ground.budget.experts else None
    if experts:
        ways += [Way(chosen.first(0), experts=share) for share in (1.0, 0.5)]
        ways += [Way(chosen.first(count), experts=1.0) for count in counts[1:-1]]
    attempts: list[Attempt] = []
    refused: list[tuple[Way, LbylError]] = []
    for way in ways:
        made = _tried(ground, way, clock, experts)
        if isinstance(made, Attempt):
            attempts.append(made)
        else:
            refused.append((way, made))
    if not attempts:
        raise refused[0][1]
    own_text = isinstance(getattr(ground.restorer.settings, "moments", None), Generated)
    best, why = best_of(attempts, own_text)
    notes = [*_told(ground, attempts, refused), *([why] if why else [])]
    share, told = ground.budget.latency, best.result.report.notes
    if share is not None and not any(note.startswith("latency:") for note in told):
        found = bench(best.result.model, ground.prepared.inputs, against=ground.model, runtime=ground.budget.runtime)
        notes.append(told_latency(found, share))
    return ground.finished(best.result, notes)


def _told(ground: DepthGround, attempts: list[Attempt], refused: list[tuple[Way, LbylError]]) -> list[str]:
    if len(attempts) + len(refused) < 2:
        return []
    effect = ground.effect
    ways = ", ".join(each.told for each in sorted(attempts, key=lambda each: each.effect))
    others = "experts and width" if ground.budget.experts else "width"
    notes = [f"depth against {others}: {effect.told} on held-out probes {ways}"]
    return notes + [f"without {_gone(way)} the budget can't be met: {error}" for way, error in refused]


def _gone(way: Way, experts: int = 0) -> str:
    """What goes, in words."""
    count = len(way.blocks.blocks)
    blocks = f"{'a run of ' * way.run}{count} block" + "s" * (count != 1)
    if not (experts or way.experts):
        return blocks
    told = f"{experts or 'any'} expert" + "s" * (experts != 1)
    return f"{blocks} and {told}" if count else told


def _tried(ground: DepthGround, way: Way, clock: Clock, experts: ExpertGround | None) -> Attempt | LbylError:
    """The attempt, or the error if it fails."""
    try:
        return attempt(ground, way, Clock(dict(clock.seconds)), experts)
    except LbylError as error:
        return error


def attempt(ground: DepthGround, way: Way, clock: Clock, experts: ExpertGround | None = None) -> Attempt:
    """The network without these blocks and experts, and narrower as far as the budget asks for it.

    ``experts`` is what is known of those of the whole network, if any may go.
    """
    first: Result | None = None
    dropped, effect = 0, None
    if way.blocks.blocks:
        done = shallower(ground, way.blocks, clock)
        first, effect = depth_result(ground, done, clock), done.effect
    if way.experts and not (first and ground.meets(first.model)):
        if first or experts is None:
            experts = experts_after(ground, first.model if first else None, ground.effect, clock)
        then, dropped = without_experts(experts, experts.choose(way.experts), clock)
        first, effect = replace(then, report=joined(ground, first.report, then) if first else then.report), None
    cut = first is None or not ground.meets(first.model)
    result = narrower(ground, first, clock) if cut or first is None else first
    if cut or effect is None:
        effect = ground.effect(ground.judged_as(result.model))
    return Attempt(way, cut, result, effect, dropped)
