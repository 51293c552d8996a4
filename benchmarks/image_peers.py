"""Ours beside other methods on image networks: the same kept counts, accuracy, CPU seconds and memory.

    python benchmarks/image_peers.py --data DIR [--network resnet56] [--ratio 0.5] [--method "ours, default"] [--fresh]

The other methods are those in `peers/`, each a short implementation after its paper, and those that lbyl has itself.
DIR (or the environment variable LBYL_DATA) is as for `accuracy.py`; the digits networks are trained here. Methods that
see images see the same 128: training images of the digits, and the last ones of CIFAR-10's test set, whose first 3,000
are what accuracy is measured on. Each cell is measured in a process of its own, with one thread.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from depth import digits_vit
from networks import Images, cifar10, digits, digits_resnet, held_out_digits, resnet56
from output import RESULTS, Cell, Run, Table, known_cells
from peak import PeakMemory
from peers.corp import corp
from peers.folding import clusters, fold, fold_repaired
from peers.grail import Activation, grail
from peers.magnitude import prune
from peers.merging import neuron_merging
from peers.pairs import Pair, pairs_of, reduced, reestimated
from rich.console import Console
from torch import Tensor, nn

import lbyl

SEEN, TESTED = 128, 3000
RATIOS = (0.5, 0.3, 0.7)
"""The one whose seconds and memory are shown comes first."""
Names = tuple[str, str | None, str]


@dataclass(frozen=True)
class Network:
    """What is benchmarked: how it is built, its images, and the pairs of layers between which channels go."""

    title: str
    build: Callable[[Path], nn.Module]
    images: Callable[[Path], tuple[Tensor, Images]]
    """Images to look at, and those to measure on."""
    names: Sequence[Names]
    activation: Activation
    layers: str | None = None
    """A glob over the layers that lose channels; None for all inner groups."""


def basic_blocks(blocks: int) -> list[Names]:
    """The layers of the blocks of a ResNet for small images."""
    paths = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(blocks)]
    return [(f"{path}.conv1", f"{path}.bn1", f"{path}.conv2") for path in paths]


def split_cifar10(data: Path) -> tuple[Tensor, Images]:
    """The end of the test set to look at, its beginning to measure on."""
    images = cifar10(data)
    return images.pixels[-SEEN:], Images(images.pixels[:TESTED], images.labels[:TESTED])


def split_digits(data: Path) -> tuple[Tensor, Images]:
    """Training images to look at, held-out ones to measure on."""
    return digits().pixels[:SEEN], held_out_digits()


NETWORKS = {
    "resnet56": Network(
        "ResNet-56 / CIFAR-10, in-block channels", resnet56, split_cifar10, basic_blocks(9), torch.relu
    ),
    "digits": Network(
        "ResNet-14 / digits, in-block channels", lambda data: digits_resnet(), split_digits, basic_blocks(2), torch.relu
    ),
    "vit": Network(
        "ViT / digits, neurons of MLPs",
        lambda data: digits_vit(),
        split_digits,
        [(f"blocks.{block}.mlp.fc1", None, f"blocks.{block}.mlp.fc2") for block in range(8)],
        nn.functional.gelu,
        "blocks.*.mlp.*",
    ),
}


@dataclass(frozen=True)
class Subject:
    """A network with its images, ready to be cut."""

    network: Network
    net: nn.Module
    seen: Tensor
    tested: Images

    def ours(self, ratio: float, **more: Any) -> lbyl.Result:
        """One compression by lbyl."""
        share = {"*": 0.0, self.network.layers: ratio} if self.network.layers else ratio
        return lbyl.compress(self.net, self.seen[:1], ratio=share, forecast=False, **more)

    def data(self) -> lbyl.LeastSquares:
        """Least squares on the images, a fifth of them held out."""
        return lbyl.LeastSquares(lbyl.Data(list(self.seen.split([51, 51, 26])), batches=3))


@cache
def subject(name: str, data: Path) -> Subject:
    """Build and load, once in a process."""
    network = NETWORKS[name]
    return Subject(network, network.build(data), *network.images(data))


@dataclass(frozen=True)
class Method:
    """A way to a smaller network.

    Attributes:
        sees: whether it sees images of the task.
        make: gives the smaller network, from the subject, the pairs and the ratio.
        norms: whether it only makes sense where there are batch norms (True), or is not made for them (False).
    """

    sees: bool
    make: Callable[[Subject, list[Pair], float], nn.Module]
    norms: bool | None = None


def _reduced(how: Any, again: bool = False) -> Callable[[Subject, list[Pair], float], nn.Module]:
    def make(s: Subject, pairs: list[Pair], ratio: float) -> nn.Module:
        small = reduced(s.net, pairs, how)
        return reestimated(small, s.seen) if again else small

    return make


def _grail(how: Any, again: bool = False) -> Callable[[Subject, list[Pair], float], nn.Module]:
    def make(s: Subject, pairs: list[Pair], ratio: float) -> nn.Module:
        small = grail(s.net, pairs, s.seen, s.network.activation, how, sequential=False)
        return reestimated(small, s.seen) if again else small

    return make


def _ours(**more: Any) -> Callable[[Subject, list[Pair], float], nn.Module]:
    return lambda s, pairs, ratio: s.ours(ratio, **more).model


METHODS: dict[str, Method] = {
    "Magnitude": Method(False, _reduced(prune)),
    "Magnitude, batch norms re-estimated": Method(True, _reduced(prune, True), True),
    "Model Folding": Method(False, _reduced(fold)),
    "Model Folding, approximate REPAIR": Method(False, lambda s, pairs, ratio: fold_repaired(s.net, pairs), True),
    "Model Folding, batch norms re-estimated": Method(True, _reduced(fold, True), True),
    "GRAIL over magnitude": Method(True, _grail(prune)),
    "GRAIL over folding": Method(True, _grail(fold)),
    "GRAIL over magnitude, batch norms re-estimated": Method(True, _grail(prune, True), True),
    "GRAIL over folding, batch norms re-estimated": Method(True, _grail(fold, True), True),
    "Neuron Merging, the authors' code": Method(False, _reduced(neuron_merging), True),
    "Neuron Merging, the paper": Method(False, _ours(restore=lbyl.Merge()), True),
    "LBYL, the authors' lambdas": Method(False, _ours(restore=lbyl.LBYL(bn=1e-4, ridge=1e-2)), True),
    "CORP": Method(True, lambda s, pairs, ratio: corp(s.net, pairs, s.seen, s.network.activation), False),
    "ours, effort low": Method(False, _ours(effort="low")),
    "ours, default": Method(False, _ours()),
    "ours, 128 images": Method(True, lambda s, pairs, ratio: s.ours(ratio, restore=s.data()).model),
}


def applies(method: Method, network: Network) -> bool:
    """Whether a method is for a network with or without batch norms."""
    return method.norms is None or method.norms == any(norm for _, norm, _ in network.names)


@cache
def pairs_at(name: str, data: Path, ratio: float) -> list[Pair]:
    """The pairs of layers that lose channels, with those that lbyl keeps by magnitude."""
    s = subject(name, data)
    kept = {
        group.name: group.keep for group in s.ours(ratio, restore="prune", criterion="l2", verify=False).plan.groups
    }
    return pairs_of(s.net, kept, s.network.names)


def warm(s: Subject) -> None:
    """Load what libraries load once, and give back memory that is free, so that neither blurs a peak."""
    with torch.no_grad():
        s.net(s.seen[:2])
    clusters(torch.eye(4), 2)
    tiny = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    lbyl.compress(tiny, torch.zeros(1, 3, 8, 8), ratio=0.5, restore="prune", forecast=False)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc


def measure(name: str, data: Path, method: str, ratio: float) -> dict[str, Any]:
    """One cell, in this process."""
    torch.set_num_threads(1)
    s = subject(name, data)
    warm(s)
    pairs = pairs_at(name, data, ratio)
    peak = PeakMemory()
    peak.start()
    started = time.process_time()
    small = METHODS[method].make(s, pairs, ratio)
    seconds, mebibytes = time.process_time() - started, peak.mebibytes()
    widths = [len(pair.layers(small)[0].weight) for pair in pairs]
    if widths != [len(pair.keep) for pair in pairs]:
        raise RuntimeError(f"{method} on {name} kept other widths than the rest")
    return {
        **key(name, ratio, method),
        "accuracy": s.tested.accuracy(small),
        "seconds": round(seconds, 2),
        "peak_mib": mebibytes,
    }


def key(name: str, ratio: float, method: str) -> dict[str, Any]:
    """What a cell is found by."""
    return {"network": name, "ratio": ratio, "method": method, "lbyl": version("lbyl")}


def unpruned(name: str, data: Path) -> float:
    """Accuracy of the whole network."""
    torch.set_num_threads(1)
    s = subject(name, data)
    return s.tested.accuracy(s.net)


def alone(work: Callable[[], Any]) -> Any:
    """Measure in a process of its own, which has the network already where processes can be forked."""
    ways = multiprocessing.get_all_start_methods()
    with multiprocessing.get_context("fork" if "fork" in ways else "spawn").Pool(1) as pool:
        return pool.apply(work)


def _unpruned_before() -> dict[str, float]:
    file = RESULTS / "image_peers.json"
    return json.loads(file.read_text(encoding="utf-8"))["settings"]["unpruned"] if file.is_file() else {}


def table(name: str, run: Run) -> Table:
    """Methods by ratios."""
    cells = {(cell["method"], cell["ratio"]): cell for cell in run.measurements if cell["network"] == name}
    shown, rows = sorted(RATIOS), []
    for method, what in METHODS.items():
        first = cells.get((method, RATIOS[0]))
        if first:
            accuracies: list[Cell] = [cells[method, r]["accuracy"] if (method, r) in cells else None for r in shown]
            rows.append(
                [method, "yes" if what.sees else "no", *accuracies, first["seconds"], round(first["peak_mib"] or 0)]
            )
    columns = ["method", "sees images", *(f"{ratio:.0%}" for ratio in shown), "CPU s", "peak MiB"]
    note = (
        f"Top-1 in percent, unpruned {run.settings['unpruned'][name]:.2f}; the same number of channels is left by all "
        f"methods. CPU seconds and memory (the peak above the start) of making the network at {RATIOS[0]:.0%}."
    )
    return Table(NETWORKS[name].title, columns, rows, note)


def tabulate(run: Run) -> None:
    """One table for each network."""
    measured = {cell["network"] for cell in run.measurements}
    run.tables = [table(name, run) for name in NETWORKS if name in measured]


def main(
    data: Annotated[Path, typer.Option(envvar="LBYL_DATA", help="Folder with weights/ and data/.")],
    network: Annotated[list[str] | None, typer.Option(help="One of NETWORKS; may be given again.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="A share of channels to remove; all without.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="One of METHODS; may be given again.")] = None,
    fresh: Annotated[bool, typer.Option(help="Compute again what is known of what was asked for.")] = False,
) -> None:
    """Fill the tables cell by cell."""
    torch.set_num_threads(1)
    console, names = Console(), network or list(NETWORKS)
    methods = method or list(METHODS)
    for given, there in ((names, NETWORKS), (methods, METHODS), (ratio or (), RATIOS)):
        for each in given:
            if each not in there:
                raise typer.BadParameter(f"{each!r} is not one of: {'; '.join(map(str, there))}")
    run = Run("image_peers", "Beside other methods", "python benchmarks/image_peers.py --data DIR", pieced=True)
    run.settings = {"seen": SEEN, "networks": {name: each.title for name, each in NETWORKS.items()}, "unpruned": {}}
    asked = [key(name, share, each) for name in names for share in ratio or RATIOS for each in methods]
    run.measurements = [
        cell for cell in known_cells("image_peers") if not fresh or all(cell != {**cell, **each} for each in asked)
    ]
    run.settings["unpruned"] = _unpruned_before()
    for name in names:
        subject(name, data)
        if fresh or name not in run.settings["unpruned"]:
            run.settings["unpruned"][name] = alone(partial(unpruned, name, data))
    for share, name in product(ratio or RATIOS, names):
        pairs_at(name, data, share)
        known = {(cell["method"], cell["ratio"]) for cell in run.measurements if cell["network"] == name}
        for each in methods:
            if (each, share) not in known and applies(METHODS[each], NETWORKS[name]):
                cell = alone(partial(measure, name, data, each, share))
                run.measurements.append(cell)
                console.print(name, f"{share:.0%}", each, cell["accuracy"], cell["seconds"], cell["peak_mib"])
                run.save(tabulate)
    run.save(tabulate)


if __name__ == "__main__":
    typer.run(main)
