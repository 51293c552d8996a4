"""Every size from one run: what a sweep of eight budgets takes, in compressions.

    python benchmarks/points.py [--data DIR] [--networks digits,resnet56] [--fresh]

Probes, error curves and sums are made once for all points of a sweep, as `lbyl.sweep` does. Each network is compressed
once to 0.7 of its multiply-accumulates, and swept over eight budgets from 0.9 to 0.55, both by default, in processes of
their own and with and without forecasts. ResNet-14 is trained here on scikit-learn's digits; ResNet-56 is the network
of `accuracy.py`, for which `DIR` is needed.
"""

from __future__ import annotations

import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from networks import digits_resnet, held_out_digits, resnet56
from output import Run, Table, known_cells
from peak import alone
from rich.console import Console

import lbyl

NETWORKS = {"digits": "ResNet-14 on digits", "resnet56": "ResNet-56"}
ONE, POINTS = 0.7, tuple(round(0.9 - 0.05 * number, 2) for number in range(8))


def measure(network: str, data: Path | None, forecast: bool, sweep: bool) -> dict[str, Any]:
    """CPU seconds of one compression or sweep in this process."""
    torch.set_num_threads(1)
    if network == "digits":
        net, x = digits_resnet(), held_out_digits().pixels[:1]
    else:
        assert data is not None
        net, x = resnet56(data), torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    lbyl.inspect(net, x)  # what is loaded at first use is no part of either
    started = time.process_time()
    if sweep:
        with tempfile.TemporaryDirectory() as place:
            budgets = [lbyl.Budget(macs=share) for share in POINTS]
            made = lbyl.sweep(net, x, budgets, Path(place) / "points", forecast=forecast).made
            assert len(made) == len(POINTS)
    else:
        lbyl.compress(net, x, budget=lbyl.Budget(macs=ONE), forecast=forecast)
    return {"seconds": round(time.process_time() - started, 2)}


def tabulate(run: Run) -> None:
    """A row a network and kind."""
    found = {(c["network"], c["forecast"], c["sweep"]): c["seconds"] for c in run.measurements}
    rows = []
    for name, title in NETWORKS.items():
        for forecast in (False, True):
            one, all_ = (found.get((name, forecast, sweep)) for sweep in (False, True))
            if one is not None and all_ is not None:
                rows.append([title, "yes" if forecast else "no", one, all_, f"{all_ / one:.2f}"])
    columns = ("network", "forecasts", "one compression", "sweep of 8", "compressions")
    note = "CPU seconds by default, on one thread; compressions is how many the sweep costs as much as."
    run.tables = [Table("A sweep of eight budgets", columns, rows, note)]


def main(
    data: Annotated[Path | None, typer.Option(envvar="LBYL_DATA", help="Folder with ResNet-56.")] = None,
    networks: Annotated[str | None, typer.Option(help="Which to measure; by default, all that are there.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is known.")] = False,
    inner: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure what is not known yet."""
    if inner:
        network, forecast, sweep = inner.split(":")
        print(json.dumps(measure(network, data, forecast == "True", sweep == "True")))
        return
    run = Run("points", "Every size from one run", "python benchmarks/points.py --data DIR", pieced=True)
    names = networks.split(",") if networks else list(NETWORKS) if data else ["digits"]
    if not {*names} <= {*NETWORKS} or ("resnet56" in names and data is None):
        raise typer.BadParameter(f"--networks {networks}: choose {', '.join(NETWORKS)}; resnet56 needs --data")
    for name in names:
        for forecast in (False, True):
            for sweep in (False, True):
                run.measurements = known_cells("points")
                key = {"network": name, "forecast": forecast, "sweep": sweep}
                others = [c for c in run.measurements if any(c[k] != v for k, v in key.items())]
                if len(others) < len(run.measurements) and not fresh:
                    continue
                place = ["--data", str(data)] if data else []
                found = alone(__file__, *place, "--inner", f"{name}:{forecast}:{sweep}")
                cell = {**key, **found, "lbyl": version("lbyl")}
                run.measurements = [*others, cell]
                run.save(tabulate)
                Console().print(cell)


if __name__ == "__main__":
    typer.run(main)
