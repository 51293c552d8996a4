"""The paper's figures, by the published weights and on the full test sets.

    python benchmarks/paper.py --data DIR [--check]

1. LeNet-300-100 on FashionMNIST at 50, 60, 70 and 80 %: LBYL and Prune must equal the published figures
   within 0.01 points, or this exits with 1. Merge and Coreset only stand beside them.
2. ResNet-56 on CIFAR-10 at 10 to 50 % by every restorer of the paper's comparison. --check leaves this out, and
   writes nothing.

The folder DIR (or the environment variable LBYL_DATA) holds

- weights/lenet_300_100.pth.tar (1.1 MB): 784-300-100-10 for FashionMNIST, 89.80 %; from the LBYL authors
- weights/resnet56_cifar10.pth.tar (3.5 MB): 93.88 %; from the Neuron Merging authors
- data/fashion_mnist_test.npz (4.4 MB; `images` uint8 N x 28 x 28, `labels`): the 10,000 test images of
  FashionMNIST, MIT; also in Debian's package dataset-fashion-mnist
- data/cifar10_test.npz (28 MB; `images` uint8 N x 32 x 32 x 3, `labels`): the 10,000 test images of CIFAR-10

None of it is part of this repository; where no license is named, we know of none. Writes
benchmarks/results/paper.json; tables.py turns it into tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Annotated

import torch
import typer
from networks import Images, cifar10, fashion_mnist, lenet_300_100, resnet56
from output import Cell, Run, Table
from rich.console import Console
from torch import nn

import lbyl

PUBLISHED: dict[str, tuple[float, ...]] = {
    "LBYL": (88.83, 87.75, 83.92, 78.05),
    "Merge": (87.86, 88.07, 83.27, 77.11),
    "Prune": (87.86, 83.03, 71.21, 63.90),
}
"""LeNet-300-100 on FashionMNIST at 50, 60, 70, 80 %, L2 criterion (arXiv 2502.08474)."""
EXACT = ("LBYL", "Prune")
TOLERANCE = 0.01
LENET_RATIOS = (0.5, 0.6, 0.7, 0.8)
LENET_RIDGES = (0.3, 0.6, 0.3, 1e-6)
"""Tuned ratio by ratio, by the paper's authors."""
RESNET_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
RESNET_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
RESNET_BN = 1e-4
SEEDS = (0, 1, 2)


class Bench:
    """A network, its test set, and where the figures go."""

    def __init__(self, name: str, net: nn.Module, images: Images, run: Run) -> None:
        self.name, self.net, self.images, self.run = name, net, images, run
        self.unpruned = images.accuracy(net)

    def accuracy(self, ratio: float, restore: lbyl.Restorer, seed: int = 0) -> float:
        """Compress, test, and take a note of it."""
        result = lbyl.compress(
            self.net, self.images.pixels[:1], ratio=ratio, restore=restore, seed=seed, forecast=False
        )
        found = self.images.accuracy(result.model)
        setting = {"network": self.name, "ratio": ratio, "restore": repr(restore), "seed": seed}
        self.run.measurements.append({**setting, "accuracy": found})
        return found

    def seeded(self, ratio: float) -> str:
        """Coreset draws its channels, so it is run three times: mean and spread."""
        found = [self.accuracy(ratio, lbyl.Coreset(), seed) for seed in SEEDS]
        return f"{mean(found):.2f} ± {pstdev(found):.2f}"


def lenet(bench: Bench) -> tuple[Table, list[str]]:
    """The paper's table, ours beside it, and the cells in which they differ though they must not."""
    rows: list[Sequence[Cell]] = []
    wrong = []
    for index, ratio in enumerate(LENET_RATIOS):
        ours = {
            "LBYL": bench.accuracy(ratio, lbyl.LBYL(ridge=LENET_RIDGES[index], center=True)),
            "Merge": bench.accuracy(ratio, lbyl.Merge(threshold=0.45)),
            "Prune": bench.accuracy(ratio, lbyl.Prune()),
        }
        theirs = {method: figures[index] for method, figures in PUBLISHED.items()}
        all_merged = bench.accuracy(ratio, lbyl.Merge(threshold=None))
        pairs = [value for method in PUBLISHED for value in (ours[method], theirs[method])]
        rows.append([f"{ratio:.0%}", *pairs, all_merged, bench.seeded(ratio)])
        wrong += [
            f"{method} at {ratio:.0%}: {ours[method]:.2f}, published {theirs[method]:.2f}"
            for method in EXACT
            if abs(ours[method] - theirs[method]) > TOLERANCE + 1e-9
        ]
    columns = ["ratio"]
    for method in PUBLISHED:
        columns += [method, f"{method}, published"]
    note = (
        f"Top-1 in percent, unpruned {bench.unpruned:.2f}. LBYL with center=True and the authors' ridges "
        f"({', '.join(map(str, LENET_RIDGES))}); Merge with threshold 0.45, and without any. "
        "Coreset draws its own channels: mean and spread of three seeds."
    )
    return Table(bench.name, [*columns, "Merge, no threshold", "Coreset"], rows, note), wrong


def resnet(bench: Bench) -> Table:
    """Every restorer of the paper's comparison, in-block channels only."""
    rows: list[Sequence[Cell]] = []
    for ratio in RESNET_RATIOS:
        prune, merge = bench.accuracy(ratio, lbyl.Prune()), bench.accuracy(ratio, lbyl.Merge())
        default = bench.accuracy(ratio, lbyl.LBYL())
        best = max(bench.accuracy(ratio, lbyl.LBYL(bn=RESNET_BN, ridge=ridge)) for ridge in RESNET_RIDGES)
        released = bench.accuracy(ratio, lbyl.Merge(released=True))
        rows.append([f"{ratio:.0%}", prune, bench.seeded(ratio), merge, released, best, default])
    columns = ["ratio", "Prune", "Coreset", "Merge", "Merge, as released", "the paper's form, best of 4", "LBYL"]
    note = (
        f"Top-1 in percent on all 10,000 test images, unpruned {bench.unpruned:.2f}; channels inside the "
        f"blocks, by their L2 norm. The paper's form has lambda_1 = "
        f"{RESNET_BN} and the best of the ridges {', '.join(map(str, RESNET_RIDGES))}, chosen on the test set itself; "
        "nothing is chosen for LBYL, the default. Coreset draws its own channels: mean and spread of three seeds."
    )
    return Table(bench.name, columns, rows, note)


def main(
    data: Annotated[Path, typer.Option(envvar="LBYL_DATA", help="Folder with weights/ and data/.")],
    check: Annotated[bool, typer.Option("--check", help="Only compare LeNet with the published figures.")] = False,
) -> None:
    """Print and record the paper's tables; exit with 1 where ours depart from the published ones."""
    torch.manual_seed(0)
    console = Console()
    run = Run("paper", "The paper's figures", "python benchmarks/paper.py --data DIR")
    run.settings = {"lenet_ridges": LENET_RIDGES, "resnet_ridges": RESNET_RIDGES, "seeds": SEEDS}
    table, wrong = lenet(Bench("LeNet-300-100 / FashionMNIST", lenet_300_100(data), fashion_mnist(data), run))
    run.tables.append(table)
    for row in table.rows:
        console.print(*row, sep="  ")
    if not check:
        table = resnet(Bench("ResNet-56 / CIFAR-10", resnet56(data), cifar10(data), run))
        run.tables.append(table)
        for row in table.rows:
            console.print(*row, sep="  ")
        console.print(f"written to {run.write()}")
    for line in wrong:
        console.print(line, style="red")
    if wrong:
        raise typer.Exit(1)
    console.print("LeNet-300-100: LBYL and Prune equal the published figures.")


if __name__ == "__main__":
    typer.run(main)
