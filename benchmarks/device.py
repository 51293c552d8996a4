"""The whole path on whatever device is here: every restorer and moment source, dreams, verification, saving, latency.

    python benchmarks/device.py [--device cuda|mps|cpu]

A small residual network with batch norms and a small vision transformer, both with random weights, lose half of the
channels of each group, once for each method. On an accelerator each cut is made on the CPU as well, and the columns say
how far the outputs of the two smaller networks are apart, relative to the outputs, and whether they kept the same
channels. Needs no data. Exits with 1 if a cut fails or is not verified.

benchmarks/results/device.json has one table for each device that was measured.
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import torchvision
import typer
from output import Run, Table, known_cells
from speed import settle
from torch import Tensor, nn

import lbyl
from lbyl.errors import first_line
from lbyl.runtime.latency import waits

RATIO = 0.5


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(x + self.norms[1](self.second(inner)))


def residual() -> nn.Module:
    """Three blocks of 32 channels for images of 32 x 32 pixels."""
    stem = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    return settle(nn.Sequential(*stem, *(Block(32) for _ in range(3)), *head))


def transformer() -> nn.Module:
    """Two layers of width 64 for images of 32 x 32 pixels."""
    made = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10)
    nn.init.normal_(
        made.get_parameter("heads.head.weight"), 0, 0.3
    )  # it begins with zeros, from which nothing can be dreamed
    return made.eval()


NETWORKS = {"residual network": residual, "vision transformer": transformer}
METHODS: dict[str, Any] = {
    "default": "auto",
    "plain pruning": "prune",
    "merging": "merge",
    "coreset": "coreset",
    "closed form": "lbyl",
    "moments of weights": lbyl.LeastSquares(moments=lbyl.Weights(), solve="mix"),
    "Gaussian moments": lbyl.LeastSquares(moments=lbyl.Gaussian(), solve="mix"),
    "noise": lbyl.LeastSquares(moments=lbyl.Noise(images=64)),
    "photographs": lbyl.LeastSquares(moments=lbyl.Photographs()),
    "dreams": lbyl.LeastSquares(moments=lbyl.Dream()),
    "class dreams": lbyl.LeastSquares(moments=lbyl.ClassDream()),
}
ONLY = {"dreams": "residual network", "Gaussian moments": "residual network", "closed form": "residual network"}
"""Methods that need batch norms."""


def found_device() -> torch.device:
    """The accelerator of this machine, or else its CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def described(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return {"mps": "Apple GPU (mps)", "cpu": f"CPU, {torch.get_num_threads()} threads"}.get(device.type, str(device))


def at_work(device: torch.device) -> torch.device:
    """Where a network for this device is cut: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def cut(network: str, method: str, device: torch.device) -> tuple[lbyl.Result, float]:
    """One compression on a device, and its seconds."""
    torch.manual_seed(0)
    place = at_work(device)
    model, x = NETWORKS[network]().to(place), torch.randn(2, 3, 32, 32).to(place)
    started = time.perf_counter()
    result = lbyl.compress(model, x, ratio=RATIO, restore=METHODS[method], forecast=method == "default")
    for wait in waits(device):
        wait()
    seconds = time.perf_counter() - started
    return replace(result, model=result.model.to(device)), seconds


def kept(result: lbyl.Result) -> dict[str, tuple[int, ...]]:
    """The kept channels of each group."""
    return {group.name: tuple(group.keep) for group in result.plan.groups}


def measure(network: str, method: str, device: torch.device) -> dict[str, Any]:
    """One cell: a cut on the device, and on an accelerator one on the CPU beside it."""
    cell: dict[str, Any] = {
        "network": network,
        "method": method,
        "device": device.type,
        "name": described(device),
        "lbyl": version("lbyl"),
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        result, seconds = cut(network, method, device)
    except (lbyl.LbylError, RuntimeError, TypeError, NotImplementedError) as error:
        return {**cell, "failed": f"{type(error).__name__}: {first_line(error)}"}
    if device.type == "cuda":
        cell["peak_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    assessment = result.report.assessment
    there = {tensor.device.type for tensor in result.model.state_dict().values()}
    cell |= {
        "seconds": round(seconds, 2),
        "verified": result.report.verified,
        "error": assessment.restored if assessment else None,
        "stays": there == {device.type},
        "notes": list(result.report.notes),
    }
    if device.type == "cpu":
        return cell
    other, on_cpu = cut(network, method, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 3, 32, 32, generator=generator)
    with torch.no_grad():
        ours, theirs = copy.deepcopy(result.model).cpu()(x).double(), other.model(x).double()
    apart = float((ours - theirs).norm() / theirs.norm())
    return {**cell, "cpu_seconds": round(on_cpu, 2), "apart": apart, "same_channels": kept(result) == kept(other)}


def rest(device: torch.device) -> dict[str, Any]:
    """What follows a cut: a budget, a folder that is written and read, and latencies."""
    torch.manual_seed(0)
    model, x = residual(), torch.randn(2, 3, 32, 32)
    cell: dict[str, Any] = {
        "network": "residual network",
        "method": "budget, folder, latency",
        "device": device.type,
        "name": described(device),
        "lbyl": version("lbyl"),
    }
    started = time.perf_counter()
    try:
        place = at_work(device)
        result = lbyl.compress(model.to(place), x.to(place), budget=lbyl.Budget(macs=0.6), scope="all")
        model, x = model.to(device), x.to(device)
        result = replace(result, model=result.model.to(device))
        with tempfile.TemporaryDirectory() as place:
            loaded = lbyl.load(result.save(Path(place) / "net"), residual()).to(device)
        with torch.no_grad():
            same = torch.equal(loaded(x), result.model(x))
        bench = lbyl.bench(result.model, x, against=model)
    except (lbyl.LbylError, RuntimeError, TypeError, NotImplementedError) as error:
        return {**cell, "failed": f"{type(error).__name__}: {first_line(error)}"}
    ratio = bench.whole.ratio
    return {
        **cell,
        "seconds": round(time.perf_counter() - started, 2),
        "verified": result.report.verified,
        "error": result.report.assessment.restored if result.report.assessment else None,
        "stays": same and bench.device.startswith(device.type),
        "latency_ratio": ratio.median if ratio else None,
        "notes": list(result.report.notes),
    }


def tabulate(run: Run) -> None:
    """One table for each device."""
    run.tables = []
    for name in dict.fromkeys(cell["name"] for cell in run.measurements):
        cells = [cell for cell in run.measurements if cell["name"] == name]
        accelerated = cells[0]["device"] != "cpu"
        columns = ["network", "method", "seconds", "cut vs. masked", "error of outputs"]
        columns += ["seconds on the CPU", "apart from the CPU's", "same channels"] if accelerated else []
        rows = [[*row_of(cell), *(compared(cell) if accelerated else [])] for cell in cells]
        run.tables.append(Table(name, columns, rows, note(cells)))


def row_of(cell: dict[str, Any]) -> list[Any]:
    """What every device has."""
    if "failed" in cell:
        return [cell["network"], cell["method"], None, cell["failed"], None]
    verified = f"{cell['verified']:.0e}" if cell["verified"] is not None else None
    return [cell["network"], cell["method"], cell["seconds"], verified, cell["error"]]


def compared(cell: dict[str, Any]) -> list[Any]:
    """What accelerators have."""
    if "apart" not in cell:
        return [None, None, None]
    return [cell["cpu_seconds"], f"{cell['apart']:.0e}", "yes" if cell["same_channels"] else "no"]


def note(cells: list[dict[str, Any]]) -> str:
    """What was done, and where."""
    told = "Half of the channels of each group removed; random weights; *cut vs. masked* is the verified difference."
    if cells[0]["device"] == "cpu":
        return f"{told} There was no accelerator to measure: this is the same path on the CPU."
    return f"{told} Every cut was made on the CPU as well."


def main(
    device: Annotated[str, typer.Option(help="cuda, mps or cpu. Default: the accelerator, if there is one.")] = "",
) -> None:
    """Measure, write, and say what failed."""
    place = torch.device(device) if device else found_device()
    if place.type == "cpu":
        print("no accelerator here: measuring the same path on the CPU", flush=True)
    run = Run("device", "Devices", "python benchmarks/device.py", pieced=True)
    run.settings = {"ratio": RATIO}
    known = [cell for cell in known_cells("device") if cell["device"] != place.type]
    measured: list[dict[str, Any]] = []
    for network in NETWORKS:
        for method in METHODS:
            if ONLY.get(method, network) == network:
                measured.append(measure(network, method, place))
                print(*row_of(measured[-1]), sep="\t", flush=True)
    measured.append(rest(place))
    print(*row_of(measured[-1]), sep="\t", flush=True)
    run.measurements = [*known, *measured]
    run.save(tabulate)
    if any("failed" in cell or not cell["stays"] for cell in measured):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
