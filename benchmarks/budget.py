"""Widths for a budget against one ratio for all groups: the same restoration, the same cost, real test sets.

    python benchmarks/budget.py --data DIR [--network resnet56] [--fresh]

For each share of the multiply-accumulates, the network is compressed to it twice: with `lbyl.Budget`, which chooses
every group's width for the least predicted error, and with the one ratio for all groups that comes to the same cost
(found by bisection). Both are restored by the default, on the same probes, which are dreamed once for all points.
DIR (or LBYL_DATA) is what accuracy.py describes. Results are written point by point and not computed again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from accuracy import NETWORKS
from networks import Given
from output import Run, Table, known_cells
from provenance import ROOMS
from rich.console import Console
from torch import nn

import lbyl
from lbyl.restore.registry import choose_restorer
from lbyl.runtime.copying import copy_model
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.seeding import generator_for

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def prepared(net: nn.Module, x: Any) -> lbyl.LeastSquares:
    """The default restorer with its probes made."""
    restorer, _ = choose_restorer(net, ExampleInputs.of(x))
    assert isinstance(restorer, lbyl.LeastSquares)
    source: Any = restorer.moments
    probes = source.probes(copy_model(net).eval(), ExampleInputs.of(x), generator_for(0, "probes"), None)
    return replace(restorer, moments=Given(probes, source))  # pyright: ignore[reportArgumentType]


def uniform_ratio(net: nn.Module, x: Any, layers: str | None, wanted: float) -> float:
    """The one ratio at which the network has the wanted share of its MACs, by bisection on plain cuts."""
    low, high = 0.0, 0.95
    for _ in range(12):
        middle = (low + high) / 2
        ratio = {layers: middle} if layers else middle
        macs = lbyl.compress(net, x, ratio=ratio, restore="prune", verify=False, forecast=False).report.macs
        assert macs is not None
        low, high = (middle, high) if macs[1] / macs[0] > wanted else (low, middle)
    return (low + high) / 2


def tabulate(run: Run) -> None:
    """One table a network."""
    run.tables = []
    for name, network in NETWORKS.items():
        rows = []
        for share in SHARES:
            cells = {c["how"]: c for c in run.measurements if c["network"] == name and c["share"] == share}
            if len(cells) == 2:
                a, b = cells["uniform"], cells["budget"]
                gain = b["accuracy"] - a["accuracy"]
                rows.append([f"{share:.0%}", a["macs"], b["macs"], a["accuracy"], b["accuracy"], gain])
        if rows:
            columns = ["MACs allowed", "MACs, uniform", "MACs, budget", "uniform", "budget", "gain"]
            note = "Top-1 in percent, no data, one seed; MACs as a share of the unpruned network's."
            run.tables.append(Table(network.title, columns, rows, note))


def main(
    data: Annotated[Path, typer.Option(envvar="LBYL_DATA", help="Folder with weights/ and data/.")],
    network: Annotated[list[str] | None, typer.Option(help="resnet56, efficientnet_lite0; both.")] = None,
    fresh: Annotated[bool, typer.Option(help="Compute again what is known, for these networks.")] = False,
) -> None:
    """Fill the table point by point."""
    console = Console()
    names = network or ["resnet56", "efficientnet_lite0"]
    run = Run("budget", "Budgets against uniform ratios", "python benchmarks/budget.py --data DIR")
    run.rooms = (*ROOMS, "budget")
    current = version("lbyl")
    run.measurements = [c for c in known_cells("budget") if not (fresh and c["network"] in names)]
    for name in names:
        spec = NETWORKS[name]
        net, images = spec.build(data), spec.images(data)
        x, restorer = images.pixels[:1], None
        # Only the layers that the accuracy benchmark cuts may lose channels.
        groups = lbyl.inspect(net, x).graph.groups
        pattern = spec.layers or "*"
        exclude = tuple(g.name for g in groups if not fnmatchcase(g.name, pattern)) if spec.layers else ()
        for share in SHARES:
            for how in ("uniform", "budget"):
                if any((c["network"], c["share"], c["how"]) == (name, share, how) for c in run.measurements):
                    continue
                restorer = restorer or prepared(net, x)
                started = time.perf_counter()
                if how == "budget":
                    budget = lbyl.Budget(macs=share, exclude=exclude)
                    result = lbyl.compress(net, x, budget=budget, restore=restorer, forecast=False)
                else:
                    result = lbyl.compress(
                        net,
                        x,
                        ratio=spec.ratio(uniform_ratio(net, x, spec.layers, share)),
                        restore=restorer,
                        forecast=False,
                    )
                macs = result.report.macs
                assert macs is not None
                cell = {
                    "network": name,
                    "share": share,
                    "how": how,
                    "lbyl": current,
                    "macs": round(macs[1] / macs[0], 4),
                    "parameters": result.report.parameters,
                    "accuracy": images.accuracy(result.model, 100),
                    "assessment": result.report.assessment and result.report.assessment.restored,
                    "widths": {row.group: [row.before, row.after] for row in result.report.rows},
                    "seconds": round(time.perf_counter() - started, 1),
                }
                run.measurements.append(cell)
                console.print(f"{name} {share:.0%} {how:8} {cell['accuracy']:6.2f} % at {cell['macs']:.3f} of the MACs")
                run.save(tabulate)
    run.save(tabulate)


if __name__ == "__main__":
    typer.run(main)
