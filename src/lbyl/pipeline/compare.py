"""`compare`: restorers and criteria held against each other on one network, at several ratios."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import nn

from lbyl.budget.curves import Curves
from lbyl.errors import InputError, LbylError
from lbyl.io.artifact import check_free
from lbyl.io.files import write_whole
from lbyl.io.report.colors import PLAIN
from lbyl.io.report.format import percent, shown
from lbyl.moments import Probes
from lbyl.pipeline.analysis import Analysis, Cuttable, NoCache, look
from lbyl.pipeline.evaluate import Evaluate, Judge
from lbyl.pipeline.prepare import Prepared, Subject, plain_module, prepare, unless_refused
from lbyl.pipeline.request import CompressionRequest, named_criterion, named_restorer
from lbyl.pipeline.result import Inputs, Result
from lbyl.pipeline.walk import walk
from lbyl.runtime.checks import as_path, named_kind
from lbyl.runtime.contexts import alone, own_settings, undisturbed
from lbyl.runtime.output_error import outputs_error
from lbyl.runtime.progress import Clock, Progress, cancelable
from lbyl.runtime.recursion import deep_calls
from lbyl.runtime.settings import described, printed
from lbyl.selection.select import checked_ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Named = Sequence[Any] | Mapping[str, Any]
"""Members of a family, or the same by names of the user's choice for the table."""


@dataclass(frozen=True)
class Cell:
    """One compression of a comparison.

    Attributes:
        restore: the restorer, as it was named.
        criterion: the criterion, as it was named.
        ratio: share of the channels that each group loses.
        parameters: share of the parameters that is left; None where the network could not be made.
        macs: share of the multiply-accumulates that is left; None where they were not counted.
        output_error: relative error of the outputs on the example inputs, a common factor left free: 0 to 1.
        agreement: expected share of real inputs with the original's answer; None without a forecast of that.
        score: what ``evaluate`` returned; None without one.
        seconds: how long it took, without what the cells share.
        why: why the network could not be made; otherwise "".
    """

    restore: str
    criterion: str
    ratio: float
    parameters: float | None = None
    macs: float | None = None
    output_error: float | None = None
    agreement: float | None = None
    score: float | None = None
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """Restorers and criteria side by side. Print it with Rich, draw it with :meth:`plot`, or read the rows.

    Attributes:
        rows: a cell for each restorer, criterion and ratio.
        score: what ``evaluate`` returned for the unpruned network; None without one.
        measure: the name of that function.
    """

    rows: tuple[Cell, ...]
    score: float | None = None
    measure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """The rows as CSV text, with a head; also written to a new file, if a path is given.

        Raises:
            InputError: the file exists or can't be written.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(Cell)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        if path is not None:
            check_free(as_path(path))
            write_whole(as_path(path), text.getvalue())
        return text.getvalue()

    def plot(self) -> Figure:
        """The score against the ratio, a line for each restorer and criterion; without scores, the output error.

        Returns:
            A Matplotlib figure that belongs to no window; ``figure.savefig("comparison.svg")`` writes it.
        """
        from matplotlib.figure import Figure

        figure = Figure((5.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for label, cells in self._lines():
            known = sorted((cell.ratio, value) for cell in cells if (value := self._value(cell)) is not None)
            axes.plot([ratio for ratio, _ in known], [value for _, value in known], "o-", label=label)
        if self.score is not None:
            axes.axhline(self.score, color=PLAIN.ink, linestyle=":", label="unpruned")
        axes.set_xlabel("share of the channels removed")
        axes.set_ylabel((self.measure or "").rpartition(":")[2] or "relative error of the outputs")
        axes.grid(color=PLAIN.ink, alpha=0.3, linewidth=0.6)
        axes.legend(frameon=False, fontsize=9)
        return figure

    def _lines(self) -> Iterator[tuple[str, list[Cell]]]:
        """The cells of each restorer and criterion; criteria are named where there are several."""
        several = len({cell.criterion for cell in self.rows}) > 1
        for restore, criterion in dict.fromkeys((cell.restore, cell.criterion) for cell in self.rows):
            cells = [cell for cell in self.rows if (cell.restore, cell.criterion) == (restore, criterion)]
            yield f"{restore}, {criterion}" if several else restore, cells

    def _value(self, cell: Cell) -> float | None:
        return cell.output_error if self.score is None else cell.score

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=box.SIMPLE_HEAD, title="Comparison", title_justify="left")
        columns = [(name, tell) for name, tell in _COLUMNS if any(tell(row) for row in self.rows)]
        for name, _ in columns:
            table.add_column(name, justify="left" if name in ("restore", "criterion") else "right")
        for row in self.rows:
            table.add_row(*(shown(tell(row) or "–") for _, tell in columns))
        yield table
        if self.score is not None:
            yield shown(f"{self.measure}: {self.score:.4g} for the unpruned network")
        yield from (shown(f"{row.restore}, {row.criterion}, {row.ratio:g}: {row.why}") for row in self.rows if row.why)


_COLUMNS: tuple[tuple[str, Callable[[Cell], str]], ...] = (
    ("restore", lambda cell: cell.restore),
    ("criterion", lambda cell: cell.criterion),
    ("ratio", lambda cell: f"{cell.ratio:g}"),
    ("params", lambda cell: _percent(cell.parameters)),
    ("MACs", lambda cell: _percent(cell.macs)),
    ("output error", lambda cell: _percent(cell.output_error)),
    ("expected", lambda cell: _percent(cell.agreement)),
    ("score", lambda cell: "" if cell.score is None else f"{cell.score:.4g}"),
    ("s", lambda cell: f"{cell.seconds:.1f}"),
)


def _percent(value: float | None) -> str:
    return "" if value is None else percent(value)


@cancelable
@own_settings()
def compare(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    restores: Named = ("prune", "lbyl", "auto"),
    criteria: Named = ("auto",),
    ratios: Sequence[float] = (0.25, 0.5),
    scope: str = "inner",
    seed: int = 0,
    verify: bool = True,
    evaluate: Evaluate | None = None,
    forecast: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Compress a network with several restorers and criteria at several ratios, and measure each outcome alike.

    Each network is the one that :func:`lbyl.compress` gives for these arguments. The trace is made once, probes once
    for each restorer. A combination that can't be made has a row that says why.

    Args:
        model: a trained network; it is not changed.
        example_inputs: what the model is called with. The outputs' error is measured on them: give a batch of real
            inputs where you have one.
        restores: restorers, as for :func:`lbyl.compress`; or ``{name: restorer}`` with the names for the table.
        criteria: criteria, likewise.
        ratios: shares of the channels that each prunable group loses, at least 0 and below 1.
        scope: as for :func:`lbyl.compress`.
        seed: for whatever is drawn at random.
        verify: compare each cut network with the masked one.
        evaluate: called with a copy of the network and with each smaller one; returns a number, the larger the better.
        forecast: foretell what each network keeps at real inputs, which takes time.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        InputError: a setting or input that can't be used, or an empty list.

    Examples:
        >>> import torch, lbyl
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> found = lbyl.compare(net, torch.randn(64, 8), restores=["prune", "lbyl"], ratios=[0.25, 0.5])
        >>> [(row.restore, row.ratio) for row in found.rows]
        [('prune', 0.25), ('prune', 0.5), ('lbyl', 0.25), ('lbyl', 0.5)]
    """
    ways = [(name, named_restorer(each)) for name, each in _named("restores", restores)]
    scores = [(name, named_criterion(each)) for name, each in _named("criteria", criteria)]
    if not isinstance(ratios, Sequence) or isinstance(ratios, str) or not ratios:
        raise InputError(f"ratios is {ratios!r}; pass a list, such as [0.25, 0.5]")
    for ratio in ratios:
        if isinstance(checked_ratio(ratio), Mapping):
            raise InputError(f"ratios has {ratio!r}; pass numbers: each holds for all groups")
    judge, model = Judge(evaluate), plain_module(model)
    first = CompressionRequest(ratios[0], None, scope, None, None, seed, verify, False, None, progress, forecast)
    with deep_calls(model), alone(model):
        before = judge(model, "the unpruned network")
        prepared = prepare(model, example_inputs, first, None, Clock())
        rows, probes = list[Cell](), dict[tuple[str, str], Probes]()
        for (restore, restorer), (criterion, scoring) in product(ways, scores):
            request = replace(first, restore=restorer, criterion=scoring)
            rows += _line(prepared, request, ratios, Cell(restore, criterion, 0.0), judge, probes)
    return Comparison(tuple(rows), before, judge.name)


def _named(argument: str, members: Named) -> list[tuple[str, Any]]:
    """Members with their names: the user's, or how Python would print them."""
    if isinstance(members, Mapping):
        found = [(str(name), member) for name, member in members.items()]
    elif isinstance(members, Sequence) and not isinstance(members, str):
        found = [(m if isinstance(m, str) else printed(described(m)), m) for m in members]
    else:
        raise InputError(f"{argument} is {named_kind(members)}; pass a list, or a dict of names for the table")
    twice = [name for number, (name, _) in enumerate(found) if name in [other for other, _ in found[:number]]]
    if not found or twice:
        raise InputError(f"{argument}: {f'{twice[0]} is given twice' if twice else 'an empty list'}")
    return found


@dataclass(frozen=True)
class _Shared(NoCache):
    """Keeps the probes of each restorer while a comparison lasts."""

    known: dict[tuple[str, str], Probes]
    key: tuple[str, str]

    def probes(self, make: Callable[[], Probes]) -> Probes:
        """Those that are known, or new ones."""
        if self.key not in self.known:
            self.known[self.key] = make()
        return self.known[self.key]


def _line(
    prepared: Prepared,
    request: CompressionRequest,
    ratios: Sequence[float],
    cell: Cell,
    judge: Judge,
    probes: dict[tuple[str, str], Probes],
) -> Iterator[Cell]:
    """The cells of one restorer and one criterion."""
    subjects = tuple(Subject.of(s.path, s.model, s.inputs, s.graph, request) for s in prepared.subjects)
    prepared = replace(prepared, subjects=subjects)
    ground = unless_refused(lambda: {subject.path: _ground(subject, request, cell, probes) for subject in subjects})
    for ratio in ratios:
        one, started = replace(cell, ratio=float(ratio)), perf_counter()
        made = ground
        if not isinstance(ground, LbylError):
            own = replace(request, ratio=ratio)
            made = unless_refused(lambda own=own, ground=ground: walk(prepared, own, Clock(), ground))
        if not isinstance(made, Result):
            yield replace(one, why=str(made))
            continue
        one = replace(one, seconds=perf_counter() - started)
        yield _measured(prepared, made, one, judge)


def _ground(
    subject: Subject, request: CompressionRequest, cell: Cell, probes: dict[tuple[str, str], Probes]
) -> Analysis:
    """What the ratios share: the probes, and what passes through the channels on them."""
    everything = range(len(subject.graph.groups))
    shared = _Shared(probes, (subject.path, cell.restore if subject.restorer.takes_probes else ""))
    seen = look(subject, request, everything, Clock(), shared, always=subject.restorer.takes_probes)
    return Analysis(subject.restorer, Cuttable(()), seen, Curves(()), {})


def _measured(prepared: Prepared, made: Result, cell: Cell, judge: Judge) -> Cell:
    """The cell with what was measured on the smaller network."""
    with undisturbed(prepared.model), undisturbed(made.model), torch.no_grad():
        expected, found = (prepared.inputs.cloned().call(net) for net in (prepared.model, made.model))
        try:
            error, why = outputs_error(expected, found), ""
        except InputError as refused:
            error, why = None, str(refused)
    report = made.report
    return replace(
        cell,
        parameters=report.parameters[1] / max(1, report.parameters[0]),
        macs=report.macs[1] / report.macs[0] if report.macs and report.macs[0] else None,
        output_error=error,
        why=why,
        agreement=report.forecast.agreement if report.forecast else None,
        score=judge(made.model, f"{cell.restore} at {cell.ratio:g}"),
    )
