"""Turn the JSON files in benchmarks/results/ into tables and plots in docs/, and the figures of README.md.

    python benchmarks/tables.py

docs/results.md and docs/coverage.md get all tables. README.md and the pages in `PAGES` get small ones, lists and some
sentences, each between ``<!-- results:NAME -->`` and ``<!-- /results -->``; the NAMEs are the keys of `BLOCKS`. A
dagger marks tables and rows that were measured with other code than that of src/lbyl, and the line below them says with
which.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from output import RESULTS, stamps_of
from plots import CAPTIONS, SUMMARY, draw
from provenance import ROOMS, Stamp, age, changed, current, named

ROOT = Path(__file__).parent.parent
OLD = "†"
PAGES = ("README.md", "docs/files.md", "docs/quantization.md", "docs/scale.md")
# The paper's story first; whatever else there is follows by name.
ORDER = ("paper", "accuracy", "speed")
SHOWN = """\
What is left of a network's accuracy when channels are removed, and at what cost in time and memory. The first table is
top-1 accuracy in percent, averaged over seeds, at the middle one of the ratios that were measured; *removed* is the
share of the channels inside blocks, or of hidden neurons for LeNet. The default sees no image of the task.

![Top-1 accuracy against the share of channels removed.](summary.svg)"""
ABOUT = """\
## How to read the tables

`benchmarks/` has a script for each section, named below it, and `python benchmarks/tables.py` writes this page from
what they measured. `DIR` is a folder with the published networks and test sets; each script says where they come from.
The methods in the columns are:

- **Prune** removes channels and restores nothing.
- **Merge** is Neuron Merging: each removed channel is added to the one kept channel that is most like it.
- **Coreset** draws the kept channels at random and reweights them.
- **LBYL** is the paper's closed form, from the weights alone, with the constants that batch norms state.
- **Gaussian**, **Noise** and **Dream** are least squares with the second moments that they name; Dream is without
  photographs.
- **Default** is what `lbyl.compress` does when you give it neither data nor settings.
- **Data** is least squares on a small sample of the test images, without their labels.

The guide explains [restorers](moments.md#restorers) and [second moments](moments.md). Settings were chosen on the test
sets of LeNet-300-100, ResNet-56 and EfficientNet-Lite0, so those figures are somewhat optimistic. Nothing was chosen on
ResNet-14. The EfficientNet-Lite0 images are a subset of ImageNet's validation set that is easier than the whole, so
look at how much accuracy is lost, not at the accuracy itself."""


def cell(value: Any) -> str:
    """How a value is written."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def grid(columns: list[str], body: list[list[Any]]) -> str:
    """Rows and columns in Markdown."""
    rows = [list(map(str, columns)), *([cell(value) for value in row] for row in body)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        first = row[0].ljust(widths[0])
        rest = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if not i else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def table(data: dict[str, Any], results: dict[str, Any]) -> str:
    """One table in Markdown, its title above, its note below; a dagger marks what other code was measured for."""
    cells = cells_of(data, results)
    old = how_old(results, cells)
    aged = {c["network"] for c in cells if "network" in c and how_old(results, [c])}
    by_row = aged < {c.get("network") for c in cells} and aged <= {row[0] for row in data["rows"]}
    rows = [[f"{row[0]} {OLD}", *row[1:]] if by_row and row[0] in aged else row for row in data["rows"]]
    parts = [f"**{data['title']}**" + f" {OLD}" * bool(old), grid(data["columns"], rows), data["note"]]
    return "\n\n".join(part for part in (*parts, old and f"{OLD} {old}") if part)


def cells_of(data: dict[str, Any], results: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements that a table is made of: those of its networks where it names some, else all."""
    titles = results["settings"].get("networks", {})
    named = {row[0] for row in data["rows"]}
    own = [
        cell
        for cell in results["measurements"]
        if cell.get("network") in named or titles.get(cell.get("network")) == data["title"]
    ]
    return own or results["measurements"]


def how_old(results: dict[str, Any], cells: list[dict[str, Any]]) -> str | None:
    """Which code was measured, where that is no more the code that is here; None where it is."""
    old = age(stamps_of(results, cells), current(), results.get("rooms", ROOMS))
    checked = results.get("checked")
    if old and checked:
        seen = Stamp(**{key: checked[key] for key in ("commit", "date", "sources")})
        since = changed(seen, current(), results["rooms"])
        old += f" Seen to hold {checked['how']} on {named(seen)}" + (
            f", before the last changes of {', '.join(since)}." if since else ", with the code as it is."
        )
    return old


def benchmark(data: dict[str, Any]) -> str:
    """All tables of one benchmark."""
    return "\n\n".join(table(each, data) for each in data["tables"])


def page(results: dict[str, dict[str, Any]]) -> str:
    """docs/results.md."""
    parts = ["# Results", SHOWN, summary(results), ABOUT]
    for data in results.values():
        took = "cell by cell" if data["seconds"] is None else f"in {data['seconds']:,.0f} s when it last ran"
        made = (
            f"Measured by `{data['command']}` {took}, with lbyl {data['lbyl']}, torch {data['torch']}, "
            f"{data['threads']} thread{'s' * (data['threads'] != 1)}."
        )
        plots = [f"![{caption}]({name}.svg)" for name, caption in data.get("plots", {}).items()]
        parts += [
            f"## {data['title']}",
            *plots,
            benchmark(data),
            *(table(each, data) for each in data.get("details", ())),
            made,
        ]
    return "\n\n".join(parts) + "\n"


def coverage(data: dict[str, Any]) -> str:
    """docs/coverage.md."""
    parts = [
        "# Architectures",
        "Written by `python benchmarks/tables.py` from `benchmarks/results/coverage.json`; do not edit by hand.",
        data["about"],
        *(table(each, data) for each in (*data["details"], *data["tables"])),
        *(f"## {title}\n\n{text}" for title, text in data["sections"].items()),
        f"`{data['command']}` with lbyl {data['lbyl']}, torch {data['torch']}, one thread a cell.",
    ]
    return "\n\n".join(parts) + "\n"


def summary(results: dict[str, dict[str, Any]]) -> str:
    """README.md's table: a row a network, at the middle one of its ratios."""
    data = results["accuracy"]
    rows = []
    for network, title in data["settings"]["networks"].items():
        cells = [c for c in data["measurements"] if (c["kind"], c["network"]) == ("accuracy", network)]
        ratios = sorted({cell["ratio"] for cell in cells if cell["ratio"]})
        ratio = ratios[len(ratios) // 2]
        found = {
            method: [cell for cell in cells if cell["method"] == method and cell["ratio"] in (0, ratio)]
            for method in ("Unpruned", *SUMMARY)
        }
        before, after = found["Default"][0]["macs"]
        accuracies = (f"{mean(cell['accuracy'] for cell in group):.1f}" for group in found.values())
        rows.append([title.partition(", ")[0], f"{ratio:.0%}", f"{after / before:.0%}", *accuracies])
    return grid(["network / test set", "removed", "MACs left", "unpruned", *SUMMARY.values()], sorted(rows))


def facts(results: dict[str, dict[str, Any]]) -> str:
    """README.md's sentences with figures in them."""
    accuracy, latency, coverage = results["accuracy"], results["latency"], results["coverage"]
    costs = [
        c for c in accuracy["measurements"] if (c["kind"], c["method"]) == ("cost", "Default") and c["seconds"] > 1
    ]
    titles = {network: title.partition(" / ")[0] for network, title in accuracy["settings"]["networks"].items()}
    took = " and ".join(f"{cell['seconds']:.0f} s for {titles[cell['network']]}" for cell in costs)
    cells = {(cell["network"], cell["runtime"]): cell for cell in latency["measurements"] if cell["batch"] == 1}
    shares = [
        f"{table['title']} {cells[network, 'torch']['cut']['8']['ratio']['median']:.0%} / "
        f"{cells[network, 'onnx']['cut']['8']['ratio']['median']:.0%}"
        for network, table in zip(dict.fromkeys(network for network, _ in cells), latency["tables"], strict=True)
    ]
    threads = costs[0]["threads"]
    passed = next(row[1] for row in coverage["details"][0]["rows"] if row[0] == "pass")
    lines = (
        "**Speed.** With half of the multiply-accumulates removed, these shares of the time remain in PyTorch / "
        f"onnxruntime: {', '.join(shares)} (CPU, {latency['threads']} thread, batch 1, widths in multiples of 8).",
        f"**Architectures.** {passed} classifiers of torchvision and timm can be cut and pass verification.",
        f"**Time to compress.** The default took {took} on {threads} CPU thread{'s' * (threads != 1)}.",
    )
    return "\n".join(f"- {line}" for line in lines)


def operators(results: dict[str, dict[str, Any]]) -> str:
    """The operators of ONNX that are read."""
    from lbyl.io.onnx.operators import operator_names

    names = operator_names()
    return f"{len(names)} operators: {', '.join(f'`{name}`' for name in names)}."


def files_read(results: dict[str, dict[str, Any]]) -> str:
    """What became of the files that the benchmark cuts."""
    return benchmark(results["onnx_files"]) if "onnx_files" in results else ""


def quantized(results: dict[str, dict[str, Any]]) -> str:
    """Pruning and int8."""
    return benchmark(results["quantization"]) if "quantization" in results else ""


def scale(results: dict[str, dict[str, Any]]) -> str:
    """How cost grows, and what a large network would take."""
    return benchmark(results["scale"]) if "scale" in results else ""


def devices(results: dict[str, dict[str, Any]]) -> str:
    """The whole path on the devices that were measured."""
    return benchmark(results["device"]) if "device" in results else ""


BLOCKS: dict[str, Callable[[dict[str, dict[str, Any]]], str]] = {
    "summary": summary,
    "facts": facts,
    "operators": operators,
    "onnx_files": files_read,
    "quantization": quantized,
    "scale": scale,
    "device": devices,
}


def fill(text: str, results: dict[str, dict[str, Any]]) -> str:
    """Replace what stands in the blocks."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]](results)}\n{match[3]}"

    return re.sub(r"(<!-- results:(\w+) -->).*?(<!-- /results -->)", block, text, flags=re.DOTALL)


def main() -> None:
    """Read, render, write."""
    files = {path.stem: path for path in sorted(RESULTS.glob("*.json"))}
    names = [*(name for name in ORDER if name in files), *(name for name in files if name not in ORDER)]
    results = {name: json.loads(files[name].read_text(encoding="utf-8")) for name in names}
    accuracy = results["accuracy"]
    draw(accuracy["measurements"], accuracy["settings"]["networks"], ROOT / "docs")
    accuracy["plots"] = CAPTIONS
    for page_with_blocks in PAGES:
        file = ROOT / page_with_blocks
        file.write_text(fill(file.read_text(encoding="utf-8"), results), encoding="utf-8")
    (ROOT / "docs" / "coverage.md").write_text(coverage(results.pop("coverage")), encoding="utf-8")
    (ROOT / "docs" / "results.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
