"""Compares the points of a sweep in a table, a picture and a page, and finds the Pareto front."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from lbyl.budget.budget import Budget
from lbyl.io.report.colors import PLAIN
from lbyl.io.report.format import line, percent, share, shown
from lbyl.io.report.markdown import code_span, plain_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "pareto.svg"


@dataclass(frozen=True)
class Point:
    """One budget of a sweep, and its result.

    Attributes:
        name: its folder within the sweep's folder.
        budget: the fields of the :class:`lbyl.Budget`.
        made: whether the folder exists.
        reason: why it could not be made; otherwise "".
        parameters: count before and after.
        macs: multiply-accumulates on the example inputs, before and after.
        pruned: the outputs' error on held-out probes without restoration; None without probes.
        error: the outputs' error on held-out probes with restoration.
        agreement: forecast share of real inputs with the original's answer; None if unknown.
        low: lower end of the 90% interval of the agreement.
        high: upper end of the 90% interval.
        accuracy: the value of the user's function.
        seconds: the time of the point, without the work that all points share.
    """

    name: str
    budget: Mapping[str, Any]
    made: bool = False
    reason: str = ""
    parameters: tuple[int, int] | None = None
    macs: tuple[int, int] | None = None
    pruned: float | None = None
    error: float | None = None
    agreement: float | None = None
    low: float | None = None
    high: float | None = None
    accuracy: float | None = None
    seconds: float | None = None

    @property
    def limit(self) -> Budget:
        """The budget. Raises InputError or TypeError if the fields are not those of a budget."""
        return Budget(**{name: value for name, value in self.budget.items() if name != "name"})

    @property
    def asked(self) -> str:
        """The budget in short, such as ``macs=0.6``."""
        kind, amount = self.limit.limited
        return f"{kind}={amount:g}"

    @property
    def cost(self) -> float:
        """The kept share of the multiply-accumulates, or of the parameters if these were not counted."""
        before, after = self.macs or self.parameters or (0, 0)
        return after / before if before else math.nan


def front(points: Sequence[Point]) -> tuple[str, ...]:
    """Names of the points on the Pareto front.

    A point is on the front unless another point is at most as large and at most as damaged, and better in one of both.
    Damage is lost accuracy if every point has an accuracy, else the expected disagreement if every point has one, else
    the error of the outputs.
    """
    made = [point for point in points if point.made]
    judged = damage(made)
    if judged is None:
        return ()

    def measures(point: Point) -> tuple[float, ...]:
        return (*(float(pair[1]) for pair in (point.macs, point.parameters) if pair), judged(point))

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return tuple(p.name for p in made if not any(beats(measures(other), measures(p)) for other in made))


def damage(made: Sequence[Point]) -> Callable[[Point], float] | None:
    """The function that returns a point's damage; less is better. None if it is unknown for some points."""
    if made and all(point.accuracy is not None for point in made):
        return lambda point: -float(point.accuracy or 0.0)
    if made and all(point.agreement is not None for point in made):
        return lambda point: -float(point.agreement or 0.0)
    if made and all(point.error is not None for point in made):
        return lambda point: float(point.error or 0.0)
    return None


def knee(points: Sequence[Point], unpruned: float | None) -> str | None:
    """The name of the point from which on quality falls faster than before; None where too few points tell.

    It is the one that lies farthest above the straight line from the unpruned network to the smallest one. Quality is
    the accuracy if every point has one, else the expected agreement, else what is left of the predicted error.
    """
    made = [point for point in by_cost(points) if point.made]
    judged = damage(made)
    if judged is None or len(made) < _FEWEST:
        return None
    whole = unpruned if all(point.accuracy is not None for point in made) else 1.0
    if all(point.agreement is None for point in made) and all(point.accuracy is None for point in made):
        whole = 0.0  # quality is an error below zero
    last = made[-1]
    if whole is None or last.cost >= 1 or -judged(last) >= whole:
        return None

    def above(point: Point) -> float:
        """How far above the line, in shares of the whole fall."""
        fallen = (whole + judged(point)) / (whole + judged(last))
        return (1 - point.cost) / (1 - last.cost) - fallen

    best = max(made[:-1], key=above)
    return best.name if above(best) > _CLEARLY else None


_FEWEST, _CLEARLY = 3, 0.1
"""A curve of fewer points has no knee, and neither has one that is this straight."""


def by_cost(points: Sequence[Point]) -> list[Point]:
    """The points sorted by cost, the largest first. Points that were not made come last."""
    return sorted(points, key=lambda point: (not point.made, -point.cost if point.made else 0.0))


def rows(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """The table's head, and its cells row by row. Columns without values are left out."""
    best = front(points)
    judged = [point for point in points if point.made]
    columns: list[tuple[str, bool, Callable[[Point], str]]] = [
        ("budget", True, lambda p: p.asked),
        ("MACs", any(p.macs for p in judged), lambda p: _left(p.macs)),
        ("params", True, lambda p: _left(p.parameters)),
        ("pruned", any(p.pruned is not None for p in judged), lambda p: percent(p.pruned)),
        ("error", any(p.error is not None for p in judged), lambda p: percent(p.error)),
        ("expected", any(p.agreement is not None for p in judged), _expected),
        ("accuracy", any(p.accuracy is not None for p in judged), lambda p: _accuracy(p.accuracy)),
        ("front", bool(best), lambda p: "*" if p.name in best else ""),
        ("folder", True, lambda p: p.name if p.made else "not made"),
    ]
    shown = [(name, cell) for name, wanted, cell in columns if wanted]
    return [name for name, _ in shown], [[cell(point) for _, cell in shown] for point in by_cost(points)]


def table(points: Sequence[Point]) -> Table:
    """The table for a terminal."""
    head, body = rows(points)
    made = Table(box=box.SIMPLE_HEAD, title="Sweep", title_justify="left")
    for name in head:
        made.add_column(name, justify="left" if name in ("budget", "folder") else "right")
    for cells in body:
        made.add_row(*map(shown, cells))
    return made


def failures(points: Sequence[Point]) -> Iterator[str]:
    """A line for each point that could not be made."""
    for point in points:
        if point.reason:
            yield f"{point.asked} could not be made: {line(point.reason)}"


def markdown(points: Sequence[Point], source: str | None, unpruned: float | None) -> str:
    """The table as ``README.md`` of the sweep's folder, with the picture if there is one."""
    head, body = rows(points)
    lines = [f"# Sweep{f' of {code_span(source)}' if source else ''}", ""]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in body]
    lines += [f"\n{text}" for text in [*told(points, unpruned), *map(plain_words, failures(points))]]
    if figure_wanted(points):
        lines += ["", f"![Damage against cost, one dot for each point.]({PICTURE})"]
    lines += [
        "",
        'Each folder is a smaller network: `lbyl show FOLDER` says what was cut, `lbyl.load("FOLDER")` loads it',
        '(`lbyl.load("FOLDER", model)` with a fresh model of your own, where the source is not known).',
        "`sweep.json` holds this table. `groundwork/` holds the probes and error curves that all points share; with",
        "it, running the sweep again with other budgets adds points. It can be deleted.",
    ]
    return "\n".join(lines) + "\n"


def told(points: Sequence[Point], unpruned: float | None) -> Iterator[str]:
    """Lines that explain the columns."""
    if front(points):
        yield "MACs and params: the kept share. Front (*): no other point is smaller and less damaged."
    if bent := knee(points, unpruned):
        asked = next(point.asked for point in points if point.name == bent)
        yield f"Knee: {asked}. Up to there the cut costs little; beyond it each step costs more."
    if unpruned is not None:
        yield f"Accuracy of the unpruned network: {_accuracy(unpruned)}."
    if any(point.agreement is not None for point in points):
        yield "Expected: forecast share of real inputs with the original's answer, and its 90% interval."
    if any(point.error is not None for point in points):
        yield "Pruned and error: error of the outputs on held-out probes, before and after restoration."


def figure_wanted(points: Sequence[Point]) -> bool:
    """Whether there is anything to draw."""
    return any(p.made and not (p.error is p.accuracy is p.agreement is None) for p in points)


def plot(points: Sequence[Point], unpruned: float | None) -> Figure:
    """Plot the expected agreement, or else the error of the outputs, against cost, and the accuracy if it is known."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    made = [point for point in by_cost(points) if point.made]
    best, bent = front(points), knee(points, unpruned)
    panels: list[tuple[str, Callable[[Point], float | None]]] = []
    if any(p.agreement is not None for p in made):
        panels.append(("expected agreement", lambda p: p.agreement))
    elif any(p.error is not None for p in made):
        panels.append(("predicted error of the outputs", lambda p: p.error))
    if any(p.accuracy is not None for p in made):
        panels.append(("accuracy", lambda p: p.accuracy))
    figure = Figure((4.8 * max(1, len(panels)), 3.6), layout="constrained")
    for axes, (name, value) in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
        known = [p for p in made if value(p) is not None]
        axes.plot([p.cost for p in known], [value(p) for p in known], "o", color=PLAIN.before)
        bounded = [p for p in known if p.low is not None and p.high is not None]
        if name == "expected agreement":
            at, low, high = zip(*((p.cost, p.low, p.high) for p in bounded), strict=True) if bounded else ((), (), ())
            axes.vlines(at, low, high, PLAIN.before)
            if len(bounded) > 1:
                axes.fill_between(at, low, high, color=PLAIN.before, alpha=0.25, linewidth=0, label="9 times in 10")
        for point in known:
            if point.name == bent:
                axes.plot([point.cost], [value(point)], "o", ms=13, mfc="none", mec=PLAIN.ink, label="knee")
        on_front = [p for p in known if p.name in best]
        axes.plot(
            [p.cost for p in on_front], [value(p) for p in on_front], "o-", color=PLAIN.after, label="on the front"
        )
        if name == "accuracy" and unpruned is not None:
            axes.axhline(unpruned, color=PLAIN.ink, linestyle=":", label="unpruned")
        elif name != "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylim(0, 1.02 if name == "expected agreement" else None)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("MACs left" if all(p.macs for p in known) else "parameters left")
        axes.set_ylabel(name)
        _quiet(axes)
    return figure


def picture(points: Sequence[Point], unpruned: float | None) -> str:
    """The plot as SVG; equal points give equal text."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lbyl"}):
        plot(points, unpruned).savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _quiet(axes: Axes) -> None:
    axes.grid(color=PLAIN.ink, alpha=0.3, linewidth=0.6)
    axes.tick_params(colors=PLAIN.ink)
    axes.set_facecolor("none")
    axes.xaxis.label.set_color(PLAIN.ink)
    axes.yaxis.label.set_color(PLAIN.ink)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(frameon=False, fontsize=9, labelcolor=PLAIN.ink)


def _left(pair: tuple[int, int] | None) -> str:
    return share(*pair) if pair else "–"


def _expected(point: Point) -> str:
    if point.agreement is None or point.low is None or point.high is None:
        return "–"
    return f"{point.agreement:.0%} ({point.low:.0%} to {point.high:.0%})"


def _accuracy(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
