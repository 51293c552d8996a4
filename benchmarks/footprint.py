"""How much memory a whole compression takes, against what it was allowed.

    python benchmarks/footprint.py [--fresh] [--check]

`lbyl.compress` at 50 % with its default restoration, verification included, in a process of its own. What may be held
at once are three times the model, the moments of as many consumers as are solved together (one at least, and no more
than `LeastSquares.budget` holds), the probes themselves, and as many bytes of activations as `LeastSquares.memory` and
`Dream.memory` say; and as many again where freed memory is kept. The peak of the resident memory above that before the
call must be below their sum. A tiny network is compressed before, for libraries that are loaded once are no data of
ours, and the model itself is there before, so that it counts as one of the three already.

Networks have random weights, which take as much memory as any, and dream in 2 steps in place of 20: what is held does
not depend on how often. Needs no data. Exits with 1 where the peak is above; --check only measures the first cell
again. benchmarks/results/footprint.json is
written after every cell, and what stands there for the same version is not measured again (--fresh does).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Annotated, Any

import torch
import torchvision
import typer
from output import Run, Table, known_cells
from peak import PeakMemory, alone, size
from speed import settle
from torch import nn

import lbyl
from lbyl.moments import Probes, ProbeSource
from lbyl.restore.least_squares.solve import empty_sums
from lbyl.restore.registry import choose_restorer
from lbyl.restore.targets import find_targets
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.memory import ROOM, is_plenty
from lbyl.runtime.progress import Progress
from lbyl.selection.criteria.base import resolve_criterion
from lbyl.selection.select import ByCriterion, kept_by_ratio, select

RATIO, STEPS = 0.5, 2
ROOMS = (ROOM, 2**30)
NETWORKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "MobileNetV2": (torchvision.models.mobilenet_v2, 224),
    "ResNet-50": (torchvision.models.resnet50, 224),
    "DenseNet-121": (torchvision.models.densenet121, 224),
    "EfficientNet-B4": (torchvision.models.efficientnet_b4, 380),
    "VGG-16 with batch norm": (torchvision.models.vgg16_bn, 224),
    "ViT-B/16": (torchvision.models.vit_b_16, 224),
}


class Weighed:
    """A source of probes that notes how many bytes they take."""

    def __init__(self, source: ProbeSource) -> None:
        self.source, self.bytes = source, 0

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """What the source makes."""
        made = self.source.probes(model, inputs, generator, progress)
        self.bytes = size(tensor for batch in (*made.batches, made.held_out) for tensor in batch.tensors())
        return made


def restorer(net: nn.Module, x: torch.Tensor, room: int) -> lbyl.LeastSquares:
    """The default, with so much room for activations."""
    chosen = replace(choose_restorer(net, ExampleInputs.of(x))[0], memory=room)
    source = chosen.moments
    if isinstance(source, lbyl.Dream):
        source = replace(source, memory=room, steps=STEPS)
    assert isinstance(source, ProbeSource)
    return replace(chosen, moments=Weighed(source))


def moments(net: nn.Module, x: torch.Tensor, settings: lbyl.LeastSquares) -> int:
    """Bytes of the moments that are collected together."""
    graph, state = lbyl.inspect(net, x).graph, tensors_of(net)
    choose = settings.choose(ByCriterion(resolve_criterion("l2")))
    selection = select(graph, state, kept_by_ratio(graph, RATIO), "inner", choose, 0)
    sizes = [empty_sums(site, selection, state, settings, 0)[1] for site in find_targets(graph, selection)]
    return max(max(sizes), min(sum(sizes), settings.budget))


def measure(name: str, room: int) -> dict[str, Any]:
    """One compression, in this process."""
    tiny = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    lbyl.compress(
        tiny,
        torch.zeros(1, 3, 16, 16),
        restore=restorer(tiny, torch.zeros(1, 3, 16, 16), room),
        ratio=0.5,
        forecast=False,
    )
    torch.manual_seed(0)
    make, side = NETWORKS[name]
    net, x = settle(make(weights=None)), torch.randn(1, 3, side, side)
    settings = restorer(net, x, room)
    together, peak = moments(net, x, settings), PeakMemory()
    peak.start()
    started = time.perf_counter()
    result = lbyl.compress(net, x, ratio=RATIO, restore=settings, forecast=False)
    seconds, found, model = time.perf_counter() - started, peak.mebibytes(), size(tensors_of(net).values()) / 2**20
    assert isinstance(settings.moments, Weighed)
    images = settings.moments.bytes
    if found is None:
        raise SystemExit("this system does not tell a process how large it has been")
    return {
        "network": name,
        "lbyl": version("lbyl"),
        "room_mib": room / 2**20,
        "model_mib": model,
        "moments_mib": together / 2**20,
        "probes_mib": images / 2**20,
        "allowed_mib": 3 * model + (together + images + room * (2 if is_plenty(net, room) else 1)) / 2**20,
        # The model was there before, and is one of the three.
        "peak_mib": found + model,
        "seconds": round(seconds, 1),
        "parameters": result.report.parameters,
        "verified": result.report.verified,
        "notes": result.report.notes,
    }


def table(cells: list[dict[str, Any]]) -> Table:
    """Peaks against what was allowed."""
    rows = [
        [
            cell["network"],
            f"{cell['room_mib'] / 1024:g} GiB",
            round(cell["model_mib"]),
            round(cell["moments_mib"]),
            round(cell["probes_mib"]),
            round(cell["allowed_mib"]),
            round(cell["peak_mib"]),
            "yes" if cell["peak_mib"] <= cell["allowed_mib"] else "no",
        ]
        for cell in cells
    ]
    columns = ["network", "memory", "model MiB", "moments MiB", "probes MiB", "allowed MiB", "peak MiB", "within"]
    note = (
        "One whole `lbyl.compress` at 50 %, default restoration, verification included. Allowed: three times the "
        "model, the moments that are collected together, the probes, and `memory` for activations. Where not even four "
        "dreams fit into that, as of EfficientNet-B4 (380 pixels), all probes are smaller images."
    )
    return Table("Peak memory", columns, rows, note)


def main(
    fresh: Annotated[bool, typer.Option(help="Measure again what is known.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only measure the first cell again.")] = False,
    cell: Annotated[tuple[str, int] | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, write, compare."""
    if cell is not None:
        print(json.dumps(measure(*cell)))
        return
    if check:
        found = alone(__file__, "--cell", next(iter(NETWORKS)), str(ROOMS[0]))
        print(f"{found['network']}: {found['peak_mib']:.0f} MiB of {found['allowed_mib']:.0f} MiB")
        raise SystemExit(int(found["peak_mib"] > found["allowed_mib"]))
    run = Run("footprint", "Peak memory", "python benchmarks/footprint.py", pieced=True)
    run.settings = {"ratio": RATIO, "steps": STEPS}
    known = [] if fresh else known_cells("footprint")
    for name in NETWORKS:
        for room in ROOMS:
            found = [each for each in known if (each["network"], each["room_mib"]) == (name, room / 2**20)]
            if not found:
                found = [alone(__file__, "--cell", name, str(room))]
            run.measurements += found
            run.tables = [table(run.measurements)]
            print(*run.tables[0].rows[-1], sep="\t", flush=True)
            run.write()
    if any(each["peak_mib"] > each["allowed_mib"] for each in run.measurements):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
