"""Networks that are asked for by their agreement, against what real images say.

    python benchmarks/agreement.py --data DIR [--network NAME] [--fresh]

`lbyl.compress(net, image, budget=lbyl.Budget(agreement=...))` looks for the smallest network that is expected to give
the original's answer as often as asked for. The table says how often it does on real images. DIR (or LBYL_DATA) is
what accuracy.py describes. Results are written point by point and not computed again.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accuracy import NETWORKS
from forecast import scores
from output import Run, Table, known_cells
from rich.console import Console

import lbyl

ASKED = (0.98, 0.95, 0.9)
TRIED = ("resnet56", "efficientnet_lite0", "digits", "resnet56_folded", "efficientnet_lite0_folded")
IMAGES = 2000


def measure(name: str, asked: float, data: Path) -> dict[str, Any]:
    """One network, cut as far as the agreement allows."""
    network = NETWORKS[name]
    net, images = network.build(data), network.images(data)
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(1))[:IMAGES]
    pixels, labels = images.pixels[order], images.labels[order]
    started = time.perf_counter()
    result = lbyl.compress(net, pixels[:1], budget=lbyl.Budget(agreement=asked))
    seconds = time.perf_counter() - started
    before, after = (scores(each, pixels, 50) for each in (net, result.model))
    forecast, macs = result.report.forecast, result.report.macs
    assert forecast
    assert macs
    return {
        "network": name,
        "asked": asked,
        "foretold": forecast.agreement,
        "low": forecast.low,
        "high": forecast.high,
        "real": float((before.argmax(1) == after.argmax(1)).double().mean()),
        "macs": macs[1] / macs[0],
        "unpruned": 100 * float((before.argmax(1) == labels).double().mean()),
        "accuracy": 100 * float((after.argmax(1) == labels).double().mean()),
        "seconds": seconds,
        "lbyl": version("lbyl"),
    }


def tabulate(run: Run) -> None:
    """A row a network and agreement."""
    rows: list[list[Any]] = []
    for name in TRIED:
        for asked in ASKED:
            for cell in run.measurements:
                if (cell["network"], cell["asked"]) == (name, asked):
                    told = f"{cell['foretold']:.1%} ({cell['low']:.0%} to {cell['high']:.0%})"
                    lost = round(cell["unpruned"] - cell["accuracy"], 1)
                    title = NETWORKS[name].title
                    rows.append([title, f"{asked:.0%}", told, f"{cell['real']:.1%}", f"{cell['macs']:.0%}", lost])
    columns = ["network", "asked for", "foretold", "real", "MACs left", "accuracy lost"]
    note = f"On {IMAGES:,} real images of the test set, or all that there are; no data, one seed, points of accuracy."
    run.tables = [Table("Networks asked for by their agreement", columns, rows, note)] if rows else []


def main(
    data: Annotated[Path, typer.Option(envvar="LBYL_DATA", help="Folder with weights/ and data/.")],
    network: Annotated[list[str] | None, typer.Option(help="One of TRIED; may be given again. All without.")] = None,
    fresh: Annotated[bool, typer.Option(help="Compute again what is known, for these networks.")] = False,
) -> None:
    """Fill the table point by point."""
    console, names = Console(width=200), network or list(TRIED)
    run = Run("agreement", "Asked for by agreement", "python benchmarks/agreement.py --data DIR", pieced=True)
    run.measurements = [cell for cell in known_cells("agreement") if not (fresh and cell["network"] in names)]
    for name in names:
        for asked in ASKED:
            if any((cell["network"], cell["asked"]) == (name, asked) for cell in run.measurements):
                continue
            cell = measure(name, asked, data)
            run.measurements.append(cell)
            console.print(", ".join(f"{key} {value}" for key, value in cell.items()))
            tabulate(run)
            run.join([name])
            run.write()
    run.save(tabulate)


if __name__ == "__main__":
    typer.run(main)
