"""Ours beside the methods of the field on image networks, with the same numbers of channels.

    python benchmarks/image_peers.py --data DIR [--network NAME] [--ratios 0.3,0.5,0.7] [--fresh]

Networks are ResNet-56 on CIFAR-10 and a ResNet-14 that is trained here on scikit-learn's digits; channels inside of
residual blocks go. `DIR` holds what `paper.py` says. Methods with data see 128 images. For CIFAR-10 these are the last
of the test set, and accuracy is measured on its first 3,000; for digits they are of the training set. CPU seconds are
those of the method on one thread; memory is the largest that the process takes above what it took before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import networks
import psutil
import torch
import typer
from output import Run, Table, known_cells
from peers.images import folded, grail, magnitude, reestimated
from rich.console import Console
from torch import Tensor, nn

import lbyl

SEEN, JUDGED = 128, 3000


@dataclass(frozen=True)
class Task:
    """A network, images for methods that need some, and images on which accuracy is measured."""

    net: nn.Module
    images: Tensor
    judged: networks.Images


def resnet56(data: Path) -> Task:
    """ResNet-56 on CIFAR-10."""
    test = networks.cifar10(data)
    judged = networks.Images(test.pixels[:JUDGED], test.labels[:JUDGED])
    return Task(networks.resnet56(data), test.pixels[-SEEN:], judged)


def digits(data: Path) -> Task:
    """ResNet-14 on digits."""
    return Task(networks.digits_resnet(), networks.digits().pixels[:SEEN], networks.held_out_digits())


NETWORKS: dict[str, tuple[str, Callable[[Path], Task]]] = {
    "resnet56": ("ResNet-56 / CIFAR-10", resnet56),
    "digits": ("ResNet-14 / digits", digits),
}


def ours(**settings: Any) -> Callable[[Task, float], nn.Module]:
    """A method of lbyl."""

    def run(task: Task, ratio: float) -> nn.Module:
        return lbyl.compress(task.net, task.images[:1], ratio=ratio, forecast=False, **settings).model

    return run


def on_data(task: Task) -> lbyl.LeastSquares:
    """Moments from the images."""
    return lbyl.LeastSquares(lbyl.Data(list(task.images.split(32))))


METHODS: dict[str, tuple[bool, Callable[[Task, float], nn.Module]]] = {
    "Magnitude": (False, lambda task, ratio: magnitude(task.net, ratio)),
    "Folding": (False, lambda task, ratio: folded(task.net, ratio)),
    "Folding, repaired": (False, lambda task, ratio: folded(task.net, ratio, repair=True)),
    "Neuron Merging": (False, ours(restore="merge")),
    "LBYL, the paper's values": (False, ours(restore=lbyl.LBYL(bn=1e-4, ridge=1e-2), criterion="l2")),
    "lbyl, low effort": (False, ours(effort="low")),
    "lbyl": (False, ours()),
    "Magnitude, re-estimated": (True, lambda task, ratio: reestimated(magnitude(task.net, ratio), task.images)),
    "Folding, re-estimated": (True, lambda task, ratio: reestimated(folded(task.net, ratio), task.images)),
    "GRAIL": (True, lambda task, ratio: grail(task.net, task.images, ratio)),
    "GRAIL, re-estimated": (
        True,
        lambda task, ratio: reestimated(grail(task.net, task.images, ratio), task.images),
    ),
    "lbyl with data": (True, lambda task, ratio: ours(restore=on_data(task))(task, ratio)),
}
"""Whether a method needs data, and the method."""


@dataclass
class Meter:
    """CPU seconds and peak memory of what runs inside it."""

    seconds: float = 0.0
    mebibytes: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Meter:
        process = psutil.Process()
        before, self._started = process.memory_info().rss, time.process_time()

        def watch() -> None:
            while not self._ended.wait(0.01):
                self.mebibytes = max(self.mebibytes, (process.memory_info().rss - before) / 2**20)

        self._thread = threading.Thread(target=watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.process_time() - self._started
        self._ended.set()
        self._thread.join()


def tabulate(run: Run) -> None:
    """A table a network: a row a method."""
    ratios = sorted({cell["ratio"] for cell in run.measurements})
    run.tables = []
    for name, (title, _) in NETWORKS.items():
        cells = {(c["method"], c["ratio"]): c for c in run.measurements if c["network"] == name}
        if not cells:
            continue
        rows = []
        for method, (needs, _) in METHODS.items():
            found = [cells.get((method, ratio)) for ratio in ratios]
            costs = [cell for cell in found if cell]
            if costs:
                accuracy = [cell["accuracy"] if cell else None for cell in found]
                seconds, memory = (max(cell[key] for cell in costs) for key in ("cpu_seconds", "mebibytes"))
                rows.append([method, "yes" if needs else "no", *accuracy, seconds, memory])
        whole = next(iter(cells.values()))["unpruned"]
        note = f"Top-1 in percent, unpruned {whole:.2f}. Seconds and MiB are the largest over the ratios."
        columns = ["method", "data", *(f"{ratio:.0%}" for ratio in ratios), "CPU s", "MiB"]
        run.tables.append(Table(f"{title}, channels inside of blocks", columns, rows, note))


def main(
    data: Annotated[Path, typer.Option(envvar="LBYL_DATA", help="Folder with weights and test sets.")],
    network: Annotated[list[str] | None, typer.Option(help="Which to measure. Repeat it.")] = None,
    ratios: Annotated[str, typer.Option(help="Shares of the channels.")] = "0.3,0.5,0.7",
    methods: Annotated[str, typer.Option(help="A glob over methods.")] = "*",
    fresh: Annotated[bool, typer.Option(help="Measure again what is known.")] = False,
) -> None:
    """Measure what is not known yet, and write the file after each cell."""
    torch.set_num_threads(1)
    chosen = network or list(NETWORKS)
    settings = {"images": SEEN, "judged": JUDGED}
    run = Run("image_peers", "Image networks, beside other methods", "python benchmarks/image_peers.py", settings)
    run.pieced = True
    run.measurements = known_cells("image_peers")
    for name in chosen:
        task = NETWORKS[name][1](data)
        whole = task.judged.accuracy(task.net)
        for ratio in map(float, ratios.split(",")):
            for method, (_, make) in METHODS.items():
                key = {"network": name, "method": method, "ratio": ratio}
                same = [cell for cell in run.measurements if key.items() <= cell.items()]
                if not fnmatch(method, methods) or (same and not fresh):
                    continue
                with Meter() as meter:
                    net = make(task, ratio)
                cell = {
                    **key,
                    "accuracy": task.judged.accuracy(net),
                    "unpruned": whole,
                    "cpu_seconds": round(meter.seconds, 1),
                    "mebibytes": round(meter.mebibytes),
                    "lbyl": version("lbyl"),
                }
                run.measurements = [each for each in run.measurements if each not in same] + [cell]
                run.save(tabulate)
                Console().print(cell)


if __name__ == "__main__":
    typer.run(main)
