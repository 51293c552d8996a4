"""Whether the tables still hold: a cell or two of each, measured once more.

    python benchmarks/check.py [--data DIR] [--only NAME]

The tables of accuracy, the ablation, networks without batch norms, budgets, exports and latency are checked. The table
of covered networks has a check of its own (`coverage.py --check`), and so has the paper's (`paper.py --check`). Each
cell may differ from the recorded one by a tolerance, because other machines round differently. With the files of DIR
(or LBYL_DATA; see accuracy.py) there are also cells of ResNet-56. Exits with 1 if a cell no longer holds, and writes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ablation
import accuracy
import export
import latency
import normless
import torch
import typer
from networks import held_out_digits
from output import measured
from rich.console import Console
from torchvision import models

import lbyl

POINTS = 1.0
"""Points of accuracy that a cell may differ by."""
TIMES = 0.15
"""How far the ratio of two latencies may be off, on another machine."""


@dataclass(frozen=True)
class Claim:
    """One recorded value, and how to measure it once more.

    Attributes:
        table: the benchmark.
        cell: which of its cells.
        recorded: the value in the results file; None if there is no such cell.
        measure: measures it.
        tolerance: largest difference with which the cell holds.
    """

    table: str
    cell: str
    recorded: float | None
    measure: Callable[[], float]
    tolerance: float


def recorded(table: str, value: str, **keys: Any) -> float | None:
    """A value of the last cell with these keys."""
    found = [c for c in measured(table) if all(c.get(k) == v for k, v in keys.items()) and value in c]
    return float(found[-1][value]) if found else None


def of_accuracy(name: str, data: Path, cells: tuple[tuple[str, float], ...]) -> Iterator[Claim]:
    """Cells of the accuracy table."""
    spec = accuracy.NETWORKS[name]
    for method, ratio in cells:

        def again(method: str = method, ratio: float = ratio) -> float:
            net, images = spec.build(data), spec.images(data)
            restore = accuracy.Restorers(spec, net, images.pixels).shared(method, 0)
            return accuracy.measure(name, net, images, images, ratio, method, 0, restore)["accuracy"]

        keys = {"kind": "accuracy", "network": name, "ratio": ratio, "method": method, "seed": 0}
        yield Claim("accuracy", f"{name} {method} {ratio:.0%}", recorded("accuracy", "accuracy", **keys), again, POINTS)


def of_ablation(name: str, variant: str, ratio: float) -> Iterator[Claim]:
    """A cell of the ablation."""

    def again() -> float:
        spec = accuracy.NETWORKS[name]
        net, images = spec.build(Path()), spec.images(Path())
        restorer = ablation.changed(accuracy.Restorers(spec, net, images.pixels), variant)
        return images.accuracy(accuracy.compressed(net, images, spec, ratio, restorer, 0).model, spec.batch)

    old = recorded("ablation", "accuracy", network=name, variant=variant, ratio=ratio)
    yield Claim("ablation", f"{name} {variant} {ratio:.0%}", old, again, POINTS)


def of_normless(name: str) -> Iterator[Claim]:
    """A network without batch norms, by the default."""

    def again() -> float:
        _, make, scope = normless.NETWORKS[name]
        net, test = normless.trained(make, 0), held_out_digits()
        restore = normless.restorer("Default", 0)
        x = test.pixels[:1]
        return test.accuracy(lbyl.compress(net, x, ratio=0.5, scope=scope, restore=restore, forecast=False).model)

    old = recorded("normless", "accuracy", network=name, seed=0, method="Default")
    yield Claim("normless", f"{name} Default", old, again, 3 * POINTS)


def of_budget(data: Path, share: float) -> Iterator[Claim]:
    """The network that a budget gives."""

    def again() -> float:
        spec = accuracy.NETWORKS["resnet56"]
        net, images = spec.build(data), spec.images(data)
        budget = lbyl.Budget(macs=share)
        return images.accuracy(lbyl.compress(net, images.pixels[:1], budget=budget, forecast=False).model, 100)

    old = recorded("budget", "accuracy", network="resnet56", share=share, how="budget")
    yield Claim("budget", f"resnet56 {share:.0%}", old, again, POINTS)


def of_export(name: str) -> Iterator[Claim]:
    """Round trips of one network: whether each passes."""
    for format in ("onnx", "pt2"):

        def again(format: str = format) -> float:
            return float(next(export.round_trips(name, (format,), Console(quiet=True)))["passed"])

        yield Claim("export", f"{name} {format}", recorded("export", "passed", network=name, format=format), again, 0.0)


def of_latency(name: str) -> Iterator[Claim]:
    """The time of a network with half of its multiply-accumulates, as a share of the unpruned one's."""
    old = [c for c in measured("latency") if (c["network"], c["batch"], c["runtime"]) == (name, 1, "torch")]
    multiple = max(latency.MULTIPLES)

    def again() -> float:
        torch.manual_seed(0)
        net, x = models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
        before, after = latency.in_torch([net, latency.cut(net, multiple)[0]], x, 15, 3)
        return after.over(before).median

    told = old[-1]["cut"][str(multiple)]["ratio"]["median"] if old else None
    yield Claim("latency", f"{name} x{multiple}, share of the time", told, again, TIMES)


def claims(data: Path | None) -> Iterator[Claim]:
    """All of them, the quickest first."""
    yield from of_accuracy("digits", Path(), (("Prune", 0.5), ("LBYL", 0.5), ("Default", 0.5)))
    yield from of_ablation("digits", "the default", 0.8)
    yield from of_normless("plain_none")
    yield from of_export("torchvision:mobilenet_v3_large")
    yield from of_latency("mobilenet_v2")
    if data is not None:
        yield from of_accuracy("resnet56", data, (("Prune", 0.3), ("LBYL", 0.3), ("Default", 0.3)))
        yield from of_accuracy("resnet56_folded", data, (("Default", 0.3),))
        yield from of_budget(data, 0.6)


def main(
    data: Annotated[Path | None, typer.Option(envvar="LBYL_DATA", help="Folder with weights/ and data/.")] = None,
    only: Annotated[str | None, typer.Option(help="One table.")] = None,
) -> None:
    """Measure, compare, and tell."""
    console, failed = Console(width=160), 0
    for claim in claims(data):
        if only not in (None, claim.table):
            continue
        if claim.recorded is None:
            console.print(f"{claim.table:10} {claim.cell:46} is not in the results file")
            failed += 1
            continue
        found = claim.measure()
        holds = abs(found - claim.recorded) <= claim.tolerance
        failed += not holds
        told = f"{found:.2f}, recorded {claim.recorded:.2f}"
        console.print(f"{claim.table:10} {claim.cell:46} {'holds' if holds else 'DIFFERS':8} {told}")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
