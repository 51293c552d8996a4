"""What `lbyl` foretells of a smaller network, against what real images say.

    python benchmarks/forecast.py --data DIR [--network NAME] [--fit]

Networks whose real images are known are cut by several methods at several ratios, from nearly nothing to ruins. Of each
the file keeps what was seen on the probes of a forecast (agreement and relative error, kind by kind), which no restorer
solved on, and what is true on real images. The map from one to the other, a few numbers in
`src/lbyl/runtime/forecast.py`, is fitted on all of them by --fit, which prints it; the table here is made with the
network in question left out.

DIR (or the environment variable LBYL_DATA) holds the files that accuracy.py lists; digits are scikit-learn's, and
networks for them are those of normless.py. benchmarks/results/forecast.json is written after every cell, and what
stands there is not computed again (--fresh does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from accuracy import NETWORKS as PUBLISHED
from networks import Given, Images, held_out_digits
from normless import NETWORKS as NORMLESS
from normless import trained
from output import Run, Table, known_cells
from rich.console import Console
from torch import Tensor, nn

import lbyl
from lbyl.moments import Photographs, ProbeSource
from lbyl.moments.forecast_probes import forecast_probes
from lbyl.moments.photographs import takes_photographs
from lbyl.restore.least_squares.restorer import LeastSquares
from lbyl.restore.registry import choose_restorer
from lbyl.runtime.copying import copy_model
from lbyl.runtime.forecast import (
    MAPS,
    NINE_IN_TEN,
    Forecast,
    Map,
    clearness,
    foretell_agreement,
    logit,
    scores_error,
)
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.output_error import outputs_error
from lbyl.runtime.seeding import generator_for

SLIGHT = 15.0
"""Points of accuracy: what loses more is not worth a close look."""


@dataclass(frozen=True)
class Case:
    """A network, its images, and what is done to it."""

    title: str
    family: str
    build: Callable[[Path], nn.Module]
    images: Callable[[Path], Images]
    cells: tuple[tuple[str, float], ...]
    layers: str | None = None
    scope: str = "inner"
    batch: int = 100
    count: int = 1000


def cells(**ratios: Sequence[float]) -> tuple[tuple[str, float], ...]:
    """Methods and their ratios."""
    return tuple((method, ratio) for method, found in ratios.items() for ratio in found)


def published(name: str, made: tuple[tuple[str, float], ...], family: str, count: int = 1000) -> Case:
    """A network of accuracy.py."""
    spec = PUBLISHED[name]
    return Case(spec.title, family, spec.build, spec.images, made, spec.layers, "inner", min(spec.batch, 100), count)


def of_digits(name: str, seed: int) -> Case:
    """A network of normless.py."""
    title, make, scope = NORMLESS[name]
    made = cells(Prune=(0.1, 0.3), LBYL=(0.2, 0.4), Default=(0.2, 0.4, 0.6))
    return Case(
        f"{title}, seed {seed}",
        f"digits {name}",
        lambda data: trained(make, seed),
        lambda data: held_out_digits(),
        made,
        None,
        scope,
    )


CASES = {
    "lenet": published("lenet", cells(Prune=(0.3, 0.5, 0.6), LBYL=(0.5, 0.7), Default=(0.5, 0.6, 0.7, 0.8)), "lenet"),
    "resnet56": published(
        "resnet56",
        cells(Prune=(0.1, 0.2, 0.3), LBYL=(0.1, 0.3), Photographs=(0.2, 0.4, 0.6)),
        "resnet56",
        600,
    ),
    "digits": published("digits", cells(Prune=(0.3, 0.5), LBYL=(0.5,), Default=(0.5, 0.7, 0.8)), "digits resnet"),
    "efficientnet_lite0": published(
        "efficientnet_lite0", cells(Prune=(0.02, 0.04), LBYL=(0.05,), Photographs=(0.1, 0.2)), "efficientnet", 200
    ),
    "resnet56_folded": published("resnet56_folded", cells(Prune=(0.1, 0.2), Photographs=(0.3,)), "resnet56", 600),
    "efficientnet_lite0_folded": published(
        "efficientnet_lite0_folded", cells(Prune=(0.03,), Photographs=(0.1,)), "efficientnet", 300
    ),
    **{f"{name}_{seed}": of_digits(name, seed) for seed in (0, 1) for name in NORMLESS},
}
"""Those that share weights or a kind share a family; a family is left out as a whole."""


class Restorers:
    """What goes into ``restore``, with probes made once."""

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        self.net, self.inputs = net, ExampleInputs.of(example)
        self.made: dict[str, LeastSquares] = {}

    def __call__(self, method: str) -> Any:
        """The restorer of a method."""
        if method in ("Prune", "LBYL"):
            return getattr(lbyl, method)()
        if method not in self.made:
            chosen = choose_restorer(self.net, self.inputs)[0]
            if method != "Default":
                chosen = lbyl.LeastSquares(moments=getattr(lbyl, method)(), sequential=False)
            source = chosen.moments
            assert isinstance(source, ProbeSource)
            made = source.probes(copy_model(self.net).eval(), self.inputs, generator_for(0, "probes"), None)
            self.made[method] = replace(chosen, moments=Given(made, source))
        return self.made[method]


@torch.no_grad()
def scores(net: nn.Module, pixels: Tensor, batch: int) -> Tensor:
    """Logits."""
    return torch.cat([net(part) for part in pixels.split(batch)]).float()


def compared(before: Tensor, after: Tensor) -> dict[str, float]:
    """Agreement and relative error on some inputs."""
    same = (before.argmax(1) == after.argmax(1)).double().mean()
    return {
        "agreement": float(same),
        "error": outputs_error([before], [after]),
        "scores_error": scores_error(before, after),
        "count": len(before),
    }


def measure(name: str, data: Path, run: Run, console: Console, seeds: int = 1) -> None:
    """All cells of one network that are not there."""
    case = CASES[name]
    known = {(cell["method"], cell["ratio"]) for cell in run.measurements if cell["network"] == name}
    if known >= set(case.cells):
        return
    net, images = case.build(data), case.images(data)
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(1))[: case.count]
    pixels, labels = images.pixels[order], images.labels[order]
    made = forecast_probes(net, ExampleInputs.of(pixels[:1]), generator_for(0, "forecast"))
    kinds = {f"{made.kind} {number}": each for number, each in enumerate(made.batches)}
    if made.kind == "dreamed" and takes_photographs(ExampleInputs.of(pixels[:1])):
        crops = Photographs(images=48).probes(net, ExampleInputs.of(pixels[:1]), generator_for(0, "crops"), None)
        kinds["photographs 0"] = crops.batches[0]
    probes = {kind: each.tensors()[0] for kind, each in kinds.items()}
    original = {kind: scores(net, each, case.batch) for kind, each in probes.items()}
    truth, restorers = scores(net, pixels, case.batch), Restorers(net, pixels[:1])
    whole = 100 * float((truth.argmax(1) == labels).double().mean())
    for method, ratio in case.cells:
        if (method, ratio) in known:
            continue
        wanted = {case.layers: ratio} if case.layers else ratio
        smaller = lbyl.compress(
            net, pixels[:1], ratio=wanted, restore=restorers(method), scope=case.scope, verify=False
        ).model
        found = scores(smaller, pixels, case.batch)
        seen = {kind: compared(original[kind], scores(smaller, each, case.batch)) for kind, each in probes.items()}
        cell = {
            "network": name,
            "family": case.family,
            "method": method,
            "ratio": ratio,
            "classes": truth.shape[1],
            "probes": seen,
            "real": compared(truth, found),
            "unpruned": whole,
            "accuracy": 100 * float((found.argmax(1) == labels).double().mean()),
            "lbyl": version("lbyl"),
        }
        run.measurements.append(cell)
        told = ", ".join(f"{kind} {value['agreement']:.2f}" for kind, value in seen.items())
        console.print(f"{name} {method} {ratio:.0%}  real {cell['real']['agreement']:.3f}; {told}")
        run.join([name])
        run.write()


def kinds_of(cell: dict[str, Any]) -> list[str]:
    """The kinds of probes that a cell was looked at with, each of which has a map."""
    return list(dict.fromkeys(probe.split()[0] for probe in cell["probes"]))


def seen_on(cell: dict[str, Any], kind: str) -> tuple[list[float], dict[str, float]]:
    """The errors of the scores on all batches of a kind, and what was seen on the first one."""
    batches = [seen for probe, seen in cell["probes"].items() if probe.split()[0] == kind]
    return [seen["scores_error"] for seen in batches], batches[0]


def features(cell: dict[str, Any], kind: str) -> tuple[list[float], float]:
    """What the map is given, and the logit that it should give."""
    (errors, first), real = seen_on(cell, kind), cell["real"]
    row = [1.0, mean(map(clearness, errors)), logit(first["agreement"], int(first["count"]))]
    return row, logit(real["agreement"], real["count"])


def lost(cell: dict[str, Any]) -> float:
    """Points of accuracy."""
    return cell["unpruned"] - cell["accuracy"]


PRIOR = Map(1.4, 1.3, 0.25, 0.5)
"""What constants are drawn to, as much as half a cell says."""


Pairs = Sequence[tuple[dict[str, Any], str]]
"""Cells, each with one of its kinds of probes."""


def solved(pairs: Pairs) -> list[float]:
    """Shift and slopes: ridge regression of logits, in which ruins count little."""
    rows = [features(cell, kind) for cell, kind in pairs]
    x = torch.tensor([row for row, _ in rows], dtype=torch.float64).reshape(-1, 3)
    y = torch.tensor([value for _, value in rows], dtype=torch.float64)
    weighed = x * torch.tensor([weight(cell) for cell, _ in pairs], dtype=torch.float64)[:, None]
    prior = torch.tensor([PRIOR.shift, PRIOR.error, PRIOR.agreement], dtype=torch.float64)
    ridge = torch.tensor([0.1, 2.0, 4.0], dtype=torch.float64).diag()
    return (prior + torch.linalg.solve(weighed.T @ x + ridge, weighed.T @ (y - x @ prior))).tolist()


def weight(cell: dict[str, Any]) -> float:
    """What a cell counts."""
    return 1.0 if lost(cell) < 20 else 0.1


WITHIN = 0.93
"""Share of the cells of left-out families within the bounds: a little more than bounds promise, as families are few."""


def fitted(found: Sequence[dict[str, Any]], kind: str) -> Map:
    """The map of one kind of probes."""
    pairs = [(cell, kind) for cell in found if kind in kinds_of(cell)]
    shift, error, agreement = solved(pairs)
    return Map(round(shift, 2), round(error, 2), round(agreement, 2), round(spread_of(pairs), 2))


def spread_of(pairs: Pairs) -> float:
    """What families leave over that were left out: the deviation, or more if residuals have heavy tails."""
    families, residuals = {cell["family"] for cell, _ in pairs}, []
    for family in families:
        solution = solved([pair for pair in pairs if pair[0]["family"] != family])
        for cell, kind in pairs:
            if cell["family"] == family:
                row, value = features(cell, kind)
                residuals.append((abs(value - sum(a * b for a, b in zip(solution, row, strict=True))), weight(cell)))
    if not residuals:
        return PRIOR.spread
    rests, counts = torch.tensor(sorted(residuals), dtype=torch.float64).T
    deviation = float((counts @ rests.square() / counts.sum()).sqrt())
    tail = float(rests[counts.cumsum(0) >= WITHIN * counts.sum()][0])
    spread = max(PRIOR.spread, deviation, tail / NINE_IN_TEN)
    return spread * 1.5 if len(families) < 3 else spread  # few families say little of what others would leave over


def foretold(cell: dict[str, Any], kind: str, chosen: Map) -> Forecast:
    """The forecast with a map."""
    errors, first = seen_on(cell, kind)
    return foretell_agreement(first["agreement"], errors, int(first["count"]), chosen)


def left_out(run: Run) -> list[tuple[dict[str, Any], str, Forecast]]:
    """Each cell with the forecast of a map that was fitted on the other families."""
    found: list[tuple[dict[str, Any], str, Forecast]] = []
    for cell in run.measurements:
        others = [each for each in run.measurements if each["family"] != cell["family"]]
        found += [(cell, kind, foretold(cell, kind, fitted(others, kind))) for kind in kinds_of(cell)]
    return found


def tabulate(run: Run) -> None:
    """A row a cell, and what the errors come to where the loss is slight."""
    cells = left_out(run)
    rows: list[list[Any]] = []
    for cell, kind, forecast in cells:
        assert forecast.agreement is not None
        assert forecast.low is not None
        assert forecast.high is not None
        assert forecast.loss is not None
        told = f"{forecast.agreement:.0%} ({forecast.low:.0%} to {forecast.high:.0%})"
        real = f"{cell['real']['agreement']:.0%}"
        title = CASES[cell["network"]].title
        what = f"{cell['method']} {cell['ratio']:.0%}"
        rows.append([title, what, kind, told, real, round(100 * forecast.loss, 1), round(lost(cell), 1)])
    summary: list[list[Any]] = []
    for kind in (*MAPS, "all"):
        slight = [(cell, f) for cell, seen, f in cells if kind in (seen, "all") and lost(cell) < SLIGHT]
        if slight:
            losses = mean(abs(100 * (f.loss or 0.0) - lost(cell)) for cell, f in slight)
            answers = mean(abs(100 * (f.agreement or 0.0) - 100 * cell["real"]["agreement"]) for cell, f in slight)
            within = mean((f.low or 0.0) <= cell["real"]["agreement"] <= (f.high or 0.0) for cell, f in slight)
            summary.append([kind, len(slight), round(answers, 2), round(losses, 2), f"{within:.0%}"])
    columns = ["probes", "cells", "agreement off by", "loss off by", "within the bounds"]
    note = (
        f"Points, mean of absolute errors where less than {SLIGHT:.0f} points are lost; the network's family left out."
    )
    run.tables = [Table("Forecast against truth", columns, summary, note)]
    columns = ["network", "cut", "probes", "foretold agreement", "real", "foretold loss", "lost"]
    run.details = [Table("Forecast against truth, cell by cell", columns, rows)]


def main(
    data: Annotated[Path, typer.Option(envvar="LBYL_DATA", help="Folder with weights/ and data/.")],
    network: Annotated[list[str] | None, typer.Option(help="One of CASES; may be given again. All without.")] = None,
    fresh: Annotated[bool, typer.Option(help="Compute again what is known, for these networks.")] = False,
    fit: Annotated[bool, typer.Option(help="Compute nothing; print the map that fits what is known.")] = False,
) -> None:
    """Fill the table cell by cell."""
    console, names = Console(width=200), network or list(CASES)
    run = Run("forecast", "Forecast against truth", "python benchmarks/forecast.py --data DIR", pieced=True)
    run.measurements = [cell for cell in known_cells("forecast") if not (fresh and cell["network"] in names)]
    for name in () if fit else names:
        measure(name, data, run, console)
    if fit:
        for kind in MAPS:
            console.print(f"{kind!r}: {fitted(run.measurements, kind)},")
    run.save(tabulate)
    for table in run.tables:
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
