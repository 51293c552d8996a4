"""What each part of the default restoration is worth: the default with one thing changed at a time.

    python benchmarks/ablation.py --data DIR [--network resnet56] [--fresh]

Accuracy on the full test sets with one seed, so that a difference of a few tenths of a point says nothing. All variants
keep the same channels, and those that differ in how they solve share their probes. DIR is that of accuracy.py.

benchmarks/results/ablation.json is written after every cell, and what stands there for the same version is not
computed again (--fresh does). tables.py makes a table of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from accuracy import NETWORKS, Restorers, compressed, of
from networks import Given
from output import Cell, Run, Table, known_cells
from rich.console import Console

import lbyl
from lbyl.moments import Probes
from lbyl.runtime.batches import batch_size

RATIOS = {"resnet56": (0.5, 0.7), "efficientnet_lite0": (0.2, 0.3), "digits": (0.7, 0.8)}

SOLVED: dict[str, dict[str, Any]] = {
    "the default": {},
    "all consumers at once only": {"sequential": False},
    "in turn, whatever the held-out error": {"sequential": True},
    "no renorm": {"renorm": False},
    "mix in place of patch": {"solve": "mix"},
    "all at once, no renorm": {"sequential": False, "renorm": False},
    "all at once, no renorm, mix": {"sequential": False, "renorm": False, "solve": "mix"},
}
"""Settings of the solves, on the default's probes."""

PROBED: dict[str, Callable[[int], Any]] = {
    "half as many dreams and crops": lambda dreams: lbyl.Dream(images=dreams // 2),
    "a quarter as many": lambda dreams: lbyl.Dream(images=dreams // 4),
    "dreams of 5 steps": lambda dreams: lbyl.Dream(steps=5),
    "pink noise in place of dreams": lambda dreams: lbyl.Dream(steps=0),
    "painted scenes in place of crops": lambda dreams: lbyl.Dream(photographs=False),
    "crops alone": lambda dreams: lbyl.Photographs(),
    "noise alone": lambda dreams: lbyl.Noise(),
}
"""Other probes than the default's, given how many dreams it makes."""

COLORED = ("painted scenes in place of crops", "crops alone")
"""What is the default, or is not there, where inputs are not color images."""


def dreamed(probes: Probes) -> int:
    """How many of the probes are dreams."""
    return sum(
        batch_size(batch) for index, batch in enumerate(probes.batches) if index not in probes.recalibration_batches
    )


def changed(restorers: Restorers, variant: str) -> lbyl.LeastSquares:
    """The default with one thing changed, its probes made."""
    default = restorers.settled("Default", 0)
    if variant in SOLVED:
        return replace(default, **SOLVED[variant])
    assert isinstance(default.moments, Given)
    source = PROBED[variant](dreamed(default.moments.made))
    return replace(default, moments=Given(restorers.probes(source, 0), source))


def key(name: str, variant: str, ratio: float) -> dict[str, Any]:
    """What a cell is found by."""
    return {"network": name, "variant": variant, "ratio": ratio, "lbyl": version("lbyl")}


def table(cells: Sequence[dict[str, Any]]) -> Table:
    """Variants against networks and ratios."""
    columns = [(name, ratio) for name, ratios in RATIOS.items() for ratio in ratios]
    rows: list[list[Cell]] = []
    for variant in (*SOLVED, *PROBED):
        found = [of(cells, variant=variant, network=name, ratio=ratio) for name, ratio in columns]
        rows.append([variant, *(cell[0]["accuracy"] if cell else None for cell in found)])
    titles = [f"{NETWORKS[name].title.split(' / ')[0]}, {ratio:.0%}" for name, ratio in columns]
    note = (
        "Top-1 in percent, seed 0, full test sets. Digits are gray, so the default has painted scenes for crops there."
    )
    return Table("The default with one thing changed", ["", *titles], rows, note)


def save(run: Run, names: Sequence[str]) -> None:
    """Write the file, with what another process may have found about other networks meanwhile."""
    run.join(names)
    run.tables = [table(run.measurements)]
    run.write()


def main(
    data: Annotated[Path, typer.Option(envvar="LBYL_DATA", help="Folder with weights/ and data/.")],
    network: Annotated[list[str] | None, typer.Option(help="One of RATIOS; may be given again. All without.")] = None,
    fresh: Annotated[bool, typer.Option(help="Compute again what is known, for these networks.")] = False,
) -> None:
    """Fill the table cell by cell."""
    console, names = Console(), network or list(RATIOS)
    for name in names:
        if name not in RATIOS:
            raise typer.BadParameter(f"{name!r}: choose {', '.join(RATIOS)}", param_hint="--network")
    run = Run("ablation", "What each part is worth", "python benchmarks/ablation.py --data DIR", pieced=True)
    run.settings = {"seed": 0, "criterion": "l2", "scope": "inner", "ratios": RATIOS}
    run.measurements = [cell for cell in known_cells("ablation") if not (fresh and cell["network"] in names)]
    for name in names:
        spec = NETWORKS[name]
        net, images = spec.build(data), spec.images(data)
        restorers = Restorers(spec, net, images.pixels)
        console.rule(spec.title)
        color = images.pixels.shape[1] == 3
        for variant in (*SOLVED, *(variant for variant in PROBED if color or variant not in COLORED)):
            missing = [ratio for ratio in RATIOS[name] if not of(run.measurements, **key(name, variant, ratio))]
            restore = changed(restorers, variant) if missing else None
            for ratio in missing:
                result = compressed(net, images, spec, ratio, restore, 0)
                accuracy = images.accuracy(result.model, spec.batch)
                cell = {**key(name, variant, ratio), "accuracy": accuracy, "notes": result.report.notes}
                run.measurements.append(cell)
                console.print(f"{variant:38} {ratio:4.0%}  {accuracy:6.2f} %")
                save(run, names)


if __name__ == "__main__":
    typer.run(main)
