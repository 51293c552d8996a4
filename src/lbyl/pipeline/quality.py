"""Budgets of quality: the smallest network that still keeps what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from lbyl.budget.budget import Budget
from lbyl.errors import BudgetError, InputError, LbylError
from lbyl.io.report.rows import Evaluation
from lbyl.pipeline.analysis import Analysis, analyze
from lbyl.pipeline.evaluate import Judge
from lbyl.pipeline.prepare import Prepared, first_that_restores, unless_refused
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.pipeline.walk import walk
from lbyl.runtime.forecast import COSINE, ERROR, PERPLEXITY, Forecast
from lbyl.runtime.progress import Clock
from lbyl.runtime.settings import described

DEFAULT = Budget(agreement=0.95)
"""What is asked for where nothing is."""

_TRIES = 7
_FIRST = 0.75
"""The share of the cost that is tried first."""
_CLOSE = 0.02
"""A share that is this close to one that keeps too little is small enough."""
_ENOUGH = 0.2
"""So is a network that loses all but this share of what it may lose."""
_ROUNDING = 1e-6


def meet(
    prepared: Prepared,
    request: CompressionRequest,
    clock: Clock,
    ground: Mapping[str, Analysis] | None = None,
    judge: Judge | None = None,
    before: float | None = None,
) -> Result:
    """Compress to a ratio or a budget, whichever is asked for; ``before`` is what the judge said of the whole network.

    Raises:
        InputError: a quality was asked for that can't be foretold or evaluated, or that no cut keeps.
    """
    budget = request.budget
    if budget is None or not budget.of_quality:
        return walk(prepared, request, clock, ground)
    loses = _loss(prepared, budget, judge or Judge(None), before)
    return _Search(prepared, request, budget, clock, ground or _analyzed(prepared, request, budget, clock), loses)()


def evaluated(result: Result, judge: Judge, before: float | None) -> Result:
    """The same result, with what the user's function says of it in its report."""
    if before is None or judge.name is None:
        return result
    after = judge(result.model, "the smaller network")
    assert after is not None
    return replace(result, report=replace(result.report, evaluation=Evaluation(judge.name, before, after)))


Loss = Callable[[Result], float]
"""What a result loses, as a share of what it may lose: up to 1 is allowed."""


def _loss(prepared: Prepared, budget: Budget, judge: Judge, before: float | None) -> Loss:
    """How results are judged.

    Raises:
        InputError: they can't be.
    """
    name, amount = budget.limited
    if name == "accuracy_drop":
        if judge.evaluate is None or before is None:
            raise InputError("Budget(accuracy_drop=...) needs evaluate, a function that says how good a network is")
        return lambda result: (before - (judge(result.model, "a smaller network") or 0.0)) / max(amount, 1e-9)
    if prepared.forecaster is None:
        raise InputError(f"no agreement can be foretold of this network (forecasts are switched off); {_WAY_OUT}")

    def lost(result: Result) -> float:
        forecast = result.report.forecast or Forecast()
        if forecast.kept is None:
            raise InputError(f"no agreement can be foretold of this network ({forecast.why}); {_WAY_OUT}")
        return (1 - forecast.kept) / (1 - amount)

    return lost


_WAY_OUT = "give a ratio or a budget: ratio=0.3 or budget=lbyl.Budget(macs=0.7), --ratio 0.3 or --budget macs=0.7"


_MEANS = {
    COSINE: "the cosine of the embeddings",
    PERPLEXITY: "the mean share of the probability that each token had",
    ERROR: "the share of the outputs' variance that stays, for there are no answers to compare",
}
"""What an agreement is taken to be of networks that do not answer among classes."""


@dataclass
class _Search:
    """Networks of several costs are made, until the smallest that keeps enough is known well enough.

    Attributes:
        tried: share of the cost, and what the network lost, as a share of what it may lose.
    """

    prepared: Prepared
    request: CompressionRequest
    budget: Budget
    clock: Clock
    ground: Mapping[str, Analysis]
    loses: Loss
    tried: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self) -> Result:
        best: Result | None = None
        # The whole network loses nothing; of a network of which nothing is left, nothing is kept.
        keeps, fails = (1.0, 0.0), (0.0, 4.0)
        unreachable: LbylError | None = None
        share = _FIRST
        for _ in range(_TRIES):
            request = replace(self.request, budget=self.budget.costing(share))
            result = unless_refused(lambda request=request: walk(self.prepared, request, Clock(), self.ground))
            if isinstance(result, LbylError):
                unreachable = result
                reached = result.reached if isinstance(result, BudgetError) else None
                if reached is not None and fails[0] + _ROUNDING < reached < keeps[0] - _ROUNDING:
                    share = reached
                    continue
                # No network is so small, or there is none between this size and one that was tried.
                if reached is not None and reached >= keeps[0] - _ROUNDING:
                    keeps = share, keeps[1]
                else:
                    fails = share, fails[1]
            else:
                lost = self.loses(result)
                self.tried.append((share, lost))
                if lost <= 1:
                    best, keeps = result, (share, lost)
                    if lost >= 1 - _ENOUGH:
                        break
                else:
                    fails = share, lost
            if keeps[0] - fails[0] <= _CLOSE:
                break
            share = _between(keeps, fails)
        if best is None:
            raise unreachable if unreachable and not self.tried else InputError(self._missed())
        return self._told(best)

    def _missed(self) -> str:
        name, amount = self.budget.limited
        share, lost = max(self.tried)
        found = f"{1 - lost * (1 - amount):.3f}" if name == "agreement" else f"{lost * amount:.3g}"
        return (
            f"{name}={amount:g} can't be kept: with {share:.0%} of the {self.budget.minimize} left, it is {found}; "
            "ask for less, or give a ratio or a budget of cost"
        )

    def _told(self, best: Result) -> Result:
        name, amount = self.budget.limited
        shares = ", ".join(f"{share:.2f}" for share, _ in sorted(self.tried))
        measure = best.report.forecast.measure if best.report.forecast else ""
        means = f" ({_MEANS[measure]})" if name == "agreement" and measure in _MEANS else ""
        note = f"{name}={amount:g}{means}: networks of several sizes were tried, {self.budget.minimize} {shares}"
        seconds = dict(best.report.seconds)
        for stage, value in self.clock.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + value
        report = replace(best.report, notes=(*best.report.notes, note), seconds=seconds)
        settings = {**best.plan.settings, "budget": described(self.budget)}
        return replace(best, plan=replace(best.plan, settings=settings), report=report)


def _between(keeps: tuple[float, float], fails: tuple[float, float]) -> float:
    """The share to try next: where losses that grow evenly would be just below what is allowed, not too near to either.

    Both are a share and what it loses.
    """
    (high, least), (low, most) = keeps, fails
    part = (most - (1 - _ENOUGH / 2)) / max(most - least, 1e-9)
    return low + (high - low) * min(0.75, max(0.25, part))


def _analyzed(prepared: Prepared, request: CompressionRequest, budget: Budget, clock: Clock) -> dict[str, Analysis]:
    """What all networks of the search share, part by part; parts that can't be cut are left out, unless all are."""
    found: dict[str, Analysis] = {}
    refused: list[LbylError] = []

    for subject in prepared.subjects:
        made = unless_refused(
            lambda subject=subject: first_that_restores(
                subject, request, lambda each: analyze(each, request, budget, clock)
            )[1]
        )
        if isinstance(made, Analysis):
            found[subject.path] = made
        else:
            refused.append(made)
    if refused and not found:
        raise refused[0]
    return found
