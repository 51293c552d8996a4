"""Draws widths and errors of the groups as Matplotlib figures, without changing Matplotlib's global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING
from unicodedata import east_asian_width

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lbyl.io.report.colors import PLAIN, Palette
from lbyl.io.report.rows import ReportData, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMED = 40
"""With more groups than this, the picture does not become larger, and only some groups are named."""
_LETTERS = 24
_INCHES = 4.8, 0.21  # width of a panel, height of a row
_TERMS = (("RE", "re", "o"), ("BE", "be", "s"), ("AE", "ae", "D"))


def plot(report: ReportData) -> Figure:
    """Draw widths before and after, and errors if there are any, with one row for each group.

    Args:
        report: its rows are drawn; the network's input is at the top.

    Returns:
        A figure without a window or backend; ``figure.savefig("widths.png")`` writes it.
    """
    rows = report.rows
    panels = [_widths] + ([_errors] if has_errors(rows) else [])
    figure = Figure((_INCHES[0] * len(panels), _height(rows)), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, rows, PLAIN)
    return figure


def widths(report: ReportData, palette: Palette) -> Figure:
    """The panel of widths alone."""
    figure = Figure((_INCHES[0], _height(report.rows)), layout="constrained")
    _widths(figure.subplots(), report.rows, palette)
    return figure


_LARGEST = 1e12


def errors(report: ReportData, palette: Palette) -> Figure:
    """The panel of errors alone."""
    figure = Figure((_INCHES[0], _height(report.rows)), layout="constrained")
    _errors(figure.subplots(), report.rows, palette)
    return figure


def has_errors(rows: Sequence[Row]) -> bool:
    """Whether there is an error to draw."""
    return any(math.isfinite(_finite(value)) for row in rows for value in (*(row.errors or ()), row.re, row.be, row.ae))


def _widths(axes: Axes, rows: Sequence[Row], palette: Palette) -> None:
    _bars(axes, [row.before for row in rows], palette.before, "channels before")
    _bars(axes, [row.after for row in rows], palette.after, "after")
    _frame(axes, rows, palette)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _errors(axes: Axes, rows: Sequence[Row], palette: Palette) -> None:
    """Draw errors of the consumers' outputs after pruning and restoration if they were measured, else the paper's."""
    places = np.arange(len(rows))
    if any(row.errors for row in rows):
        pruned, restored = np.array([[*map(_finite, row.errors or (None, None))] for row in rows]).T
        axes.hlines(places, pruned, restored, colors=palette.line, linewidth=2, zorder=1)
        axes.plot(pruned, places, "o", color=palette.before, markersize=5, label="error of the consumers, pruned")
        axes.plot(restored, places, "o", color=palette.after, markersize=5, label="restored")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        colors = palette.after, palette.before, palette.ink
        for step, (label, name, marker), color in zip((-0.2, 0, 0.2), _TERMS, colors, strict=True):
            values = [_finite(getattr(row, name)) for row in rows]
            axes.plot(values, places + step, marker, color=color, markersize=4, label=label)
    _frame(axes, rows, palette)
    axes.set_xlim(left=0)


def _finite(value: float | None) -> float:
    """The value, or NaN for values that can't be drawn; Matplotlib skips NaN."""
    return value if value is not None and abs(value) < _LARGEST else math.nan


def _bars(axes: Axes, values: Sequence[float], color: str, label: str) -> None:
    """Draw horizontal bars as a single path, so that a picture of a thousand groups is still a small file."""
    half = 0.5 if len(values) > _NAMED else 0.36
    edges = [edge for place in range(len(values)) for edge in (place - half, place + half)]
    steps = [step for value in values for step in (value, 0)][:-1]
    if half == 0.5:
        edges = [place - half for place in range(len(values) + 1)]
        steps = list(values)
    axes.stairs(steps, edges, orientation="horizontal", fill=True, color=color, label=label, linewidth=0)


def _frame(axes: Axes, rows: Sequence[Row], palette: Palette) -> None:
    """Set names on the left, the first group on top, a light grid, and the legend above."""
    every = math.ceil(len(rows) / _NAMED)
    places = range(0, len(rows), every)
    axes.set_yticks(places, [_short(rows[place].group) for place in places], parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(length=0, labelsize=9, colors=palette.ink)
    axes.grid(axis="x", color=palette.line, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=palette.ink,
        borderaxespad=0.2,
        handlelength=1,
        handletextpad=0.5,
        columnspacing=1.2,
    )


def _height(rows: Sequence[Row]) -> float:
    return 0.8 + _INCHES[1] * min(len(rows), _NAMED)


def _short(name: str) -> str:
    """The end of a name, which is its most specific part, without characters that fonts or XML can't represent."""
    name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    ends = accumulate(2 if east_asian_width(letter) in "WF" else 1 for letter in reversed(name))
    fitting = sum(end < _LETTERS for end in ends)
    return name if fitting >= len(name) - 1 else "…" + name[-fitting:]
