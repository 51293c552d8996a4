"""Budgets of quality: searches the smallest network that keeps the agreement or accuracy of the budget."""

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

DEFAULT = Budget(agreement=0.95, best_effort=True)
"""The budget if neither a ratio nor a budget is given."""

_TRIES = 7
_FIRST = 0.75
"""The first share of the cost to try."""
_CLOSE = 0.02
"""The search ends when a sufficient share of the cost is this close to an insufficient one."""
_ENOUGH = 0.2
"""It also ends with a network that uses up all but this share of the allowed loss."""
_LITTLE = 0.3
"""A network that loses less than this share of the allowed loss tells little about how much smaller it can get."""
_ROUNDING = 1e-6


def meet(
    prepared: Prepared,
    request: CompressionRequest,
    clock: Clock,
    ground: Mapping[str, Analysis] | None = None,
    judge: Judge | None = None,
    before: float | None = None,
) -> Result:
    """Compress to a ratio or a budget; ``before`` is the judge's value for the unpruned network.

    Raises:
        InputError: the budget's quality can't be forecast or evaluated, or no cut keeps it.
    """
    budget = request.budget
    if budget is None or not budget.of_quality:
        return walk(prepared, request, clock, ground)
    loses = _loss(prepared, budget, judge or Judge(None), before)
    return _Search(prepared, request, budget, clock, ground or _analyzed(prepared, request, budget, clock), loses)()


def evaluated(result: Result, judge: Judge, before: float | None) -> Result:
    """The result, with the value of the user's function in its report."""
    if before is None or judge.name is None:
        return result
    after = judge(result.model, "the smaller network")
    assert after is not None
    return replace(result, report=replace(result.report, evaluation=Evaluation(judge.name, before, after)))


_LEAST = 1e-9
"""The smallest drop of accuracy that losses are measured by."""

Loss = Callable[[Result], float]
"""A function that returns the loss of a result relative to the allowed loss: up to 1 is allowed."""


def _loss(prepared: Prepared, budget: Budget, judge: Judge, before: float | None) -> Loss:
    """The function that measures the loss of results.

    Raises:
        InputError: the loss can't be measured.
    """
    name, amount = budget.limited
    if name == "accuracy_drop":
        if judge.evaluate is None or before is None:
            raise InputError("Budget(accuracy_drop=...) needs evaluate, a function that measures accuracy")
        return lambda result: (before - (judge(result.model, "a smaller network") or 0.0)) / max(amount, _LEAST)
    if prepared.forecaster is None:
        raise InputError(f"the agreement of this network can't be forecast (forecasts are switched off); {_WAY_OUT}")

    def lost(result: Result) -> float:
        forecast = result.report.forecast or Forecast()
        if forecast.kept is None:
            raise InputError(f"the agreement of this network can't be forecast ({forecast.why}); {_WAY_OUT}")
        return (1 - forecast.kept) / (1 - amount)

    return lost


_WAY_OUT = "give a ratio or a budget: ratio=0.3 or budget=lbyl.Budget(macs=0.7), --ratio 0.3 or --budget macs=0.7"


_MEANS = {
    COSINE: "the cosine of the embeddings",
    PERPLEXITY: "one over the ratio of perplexities",
    ERROR: "the explained share of the outputs' variance, because the network is no classifier",
}
"""What the agreement is for networks that are no classifiers."""


@dataclass
class _Search:
    """Makes networks of several costs, until the smallest sufficient one is known accurately enough.

    Attributes:
        tried: the tried shares of the cost, each with the loss relative to the allowed loss.
        open: the shares between which the search ended early, because it had tried enough networks.
    """

    prepared: Prepared
    request: CompressionRequest
    budget: Budget
    clock: Clock
    ground: Mapping[str, Analysis]
    loses: Loss
    tried: list[tuple[float, float]] = field(default_factory=list)
    open: tuple[float, float] | None = None

    def __call__(self) -> Result:
        best: Result | None = None
        gentlest: Result | None = None
        # The search starts between the whole network, which loses nothing, and an empty one, which loses everything.
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
                if all(lost < other for _, other in self.tried):
                    gentlest = result
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
        else:
            self.open = fails[0], keeps[0]
        if best is not None:
            return self._told(best)
        if gentlest is None:
            raise unreachable or InputError(f"no cut was found; {_WAY_OUT}")
        if not self.budget.best_effort:
            advice = "lower" if self.budget.limited[0] == "agreement" else "raise"
            raise InputError(f"{self._missed()}; {advice} this budget, or give a ratio or a budget of cost")
        return self._told(gentlest, f"{self._missed()}: this is the cut that loses least of those that were tried")

    def _missed(self) -> str:
        name, amount = self.budget.limited
        share, lost = min(self.tried, key=lambda each: (each[1], -each[0]))
        found = f"{1 - lost * (1 - amount):.3f}" if name == "agreement" else f"{lost * max(amount, _LEAST):.3g}"
        return f"{name}={amount:g} can't be kept: with {share:.0%} of the {self.budget.minimize} left, it is {found}"

    def _told(self, best: Result, *notes: str) -> Result:
        name, amount = self.budget.limited
        shares = ", ".join(f"{share:.2f}" for share, _ in sorted(self.tried))
        measure = best.report.forecast.measure if best.report.forecast else ""
        means = f" ({_MEANS[measure]})" if name == "agreement" and measure in _MEANS else ""
        note = f"{name}={amount:g}{means}: networks of several sizes were tried, {self.budget.minimize} {shares}"
        if self.open:
            low, high = self.open
            note += (
                f"; the search ended after {_TRIES} tries, and the smallest may have between {low:.2f} and {high:.2f}"
            )
        seconds = dict(best.report.seconds)
        for stage, value in self.clock.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + value
        report = replace(best.report, notes=(*notes, *best.report.notes, note), seconds=seconds)
        settings = {**best.plan.settings, "budget": described(self.budget)}
        return replace(best, plan=replace(best.plan, settings=settings), report=report)


def _between(keeps: tuple[float, float], fails: tuple[float, float]) -> float:
    """The share to try next, by linear interpolation to just below the allowed loss, but not too close to either end.

    Both arguments are pairs of a share of the cost and its loss.
    """
    (high, least), (low, most) = keeps, fails
    part = (most - (1 - _ENOUGH / 2)) / max(most - least, 1e-9)
    if low <= 0 and least < _LITTLE:  # what an empty network loses is not known, and far smaller ones may do
        part = min(part, 0.5)
    return low + (high - low) * min(0.75, max(0.25, part))


def _analyzed(prepared: Prepared, request: CompressionRequest, budget: Budget, clock: Clock) -> dict[str, Analysis]:
    """The analysis of each part, which all networks of the search share; parts that can't be cut are left out."""
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
