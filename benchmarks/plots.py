"""The plots of accuracy.json; `tables.py` calls this. Needs Matplotlib."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Of middling lightness on a transparent ground, so that a white page and a black one both show them; what
# needs data is dashed, and markers tell methods apart without color.
STYLES = {
    "Prune": ("#8c8c8c", "x", "-"),
    "Coreset": ("#b07aa1", "v", "-"),
    "Merge": ("#4e8fc7", "s", "-"),
    "LBYL": ("#2ca089", "D", "-"),
    "Gaussian": ("#c9a227", "^", "-"),
    "Noise": ("#e07b39", "P", "-"),
    "Dream": ("#a06fd0", "d", "-"),
    "Default": ("#d94f4f", "o", "-"),
    "Data": ("#7f7f7f", "", "--"),
}
INK = "#808080"
SUMMARY = {"Prune": "plain pruning", "LBYL": "paper", "Default": "default", "Data": "with data"}
"""The methods that README.md shows, and what it calls them."""
IN_SUMMARY = ("resnet56", "efficientnet_lite0")
CAPTIONS = {
    "accuracy": "Accuracy against the share of channels that was cut, one line a method.",
    "assessment": "Accuracy against the output error that the report estimates without data.",
}


def draw(cells: list[dict[str, Any]], titles: dict[str, str], folder: Path) -> None:
    """accuracy.svg and assessment.svg, a panel for each network that was measured; summary.svg for README.md."""
    cells = [cell for cell in cells if cell["kind"] == "accuracy"]
    measured = {cell["network"] for cell in cells if cell["method"] != "Unpruned"}
    titles = {network: title for network, title in titles.items() if network in measured}
    if not titles:
        return
    style: Any = {
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": INK,
        "grid.alpha": 0.25,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "svg.fonttype": "path",
        "svg.hashsalt": "lbyl",  # or the same data would make another file every time
    }
    with mpl.rc_context(style):
        _panels(cells, titles, folder / "accuracy.svg", _accuracy)
        _panels(cells, titles, folder / "assessment.svg", _assessment)
        few = {network: title for network, title in titles.items() if network in IN_SUMMARY}
        if few:
            _panels(cells, few, folder / "summary.svg", _summary)


def _panels(cells: list[dict[str, Any]], titles: dict[str, str], file: Path, paint: Any) -> None:
    figure, axes = plt.subplots(1, len(titles), figsize=(4 * len(titles), 3.6), squeeze=False)
    for axis, (network, title) in zip(axes[0], titles.items(), strict=True):
        paint(axis, [cell for cell in cells if cell["network"] == network])
        axis.set_title(title.replace(" / ", "\n"), fontsize=9)
    _legend(figure, axes[0])
    figure.savefig(file, transparent=True, metadata={"Date": None})
    plt.close(figure)


def _accuracy(axis: Axes, cells: list[dict[str, Any]]) -> None:
    """Accuracy against ratio, one line a method, whiskers from the lowest to the highest seed."""
    found = _by_method(cells)
    for method, (color, marker, line) in STYLES.items():
        points = sorted(found[method].items())
        if not points:
            continue
        x, y = [100 * ratio for ratio, _ in points], [mean(values) for _, values in points]
        spread = [
            [a - min(values) for a, (_, values) in zip(y, points, strict=True)],
            [max(values) - a for a, (_, values) in zip(y, points, strict=True)],
        ]
        width = 2.2 if method == "Default" else 1.3
        axis.errorbar(x, y, spread, None, line, marker=marker, ms=5, color=color, lw=width, label=method)
    axis.set_xticks(sorted({100 * cell["ratio"] for cell in cells if cell["ratio"]}))
    axis.xaxis.set_major_formatter("{x:.0f}")
    for values in found["Unpruned"].values():
        axis.axhline(values[0], color=INK, lw=0.8, ls=":")
    axis.set(xlabel="channels dropped, %", ylabel="top-1, %")


def _summary(axis: Axes, cells: list[dict[str, Any]]) -> None:
    """Accuracy against ratio, a few methods, from the unpruned network on; means over seeds."""
    found = _by_method(cells)
    for method, label in SUMMARY.items():
        color, marker, line = STYLES[method]
        points = sorted({**found["Unpruned"], **found[method]}.items())
        x, y = [100 * ratio for ratio, _ in points], [mean(values) for _, values in points]
        style: Any = {"marker": marker, "ms": 5, "lw": 2.4 if method == "Default" else 1.5}
        if method == "Data":  # rings, for it nearly coincides with the default
            style = {"marker": "o", "ms": 10, "mfc": "none", "lw": 1.5}
        axis.plot(x, y, line, color=color, label=label, **style)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set(xlabel="channels removed, %", ylabel="top-1 accuracy, %", ylim=(0, 100))


def _by_method(cells: list[dict[str, Any]]) -> dict[str, dict[float, list[float]]]:
    """The accuracies of all seeds, by method and ratio."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        found[cell["method"]][cell["ratio"]].append(cell["accuracy"])
    return found


def _assessment(axis: Axes, cells: list[dict[str, Any]]) -> None:
    """Accuracy against the error that was estimated without data."""
    for method, (color, marker, _) in STYLES.items():
        told = [c for c in cells if c["method"] == method and c["assessment"]]
        if told:
            x = [cell["assessment"]["restored"] for cell in told]
            y = [cell["accuracy"] for cell in told]
            axis.scatter(x, y, 28, color=color, marker=marker or "+", label=method)
    axis.set(xlabel="estimated error of the outputs", ylabel="top-1, %")


def _legend(figure: Figure, axes: Any) -> None:
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=len(entries), frameon=False)
