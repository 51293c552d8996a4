"""Compress EfficientNet-Lite0 without data, and see what it says about photographs. ``make demo`` runs it."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0 import MEAN, SIZE, STD, model
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.models import EfficientNet_B0_Weights

import lbyl

RATIO = 0.15
HIDDEN = {"_blocks.*._expand_conv": RATIO}
"""The hidden channels of every inverted residual: a glob on the layers that make them."""

OUTPUT = Path("demo-out")
SOURCE = f"{os.path.relpath(Path(__file__).with_name('efficientnet_lite0.py'))}:network"
CLASSES: list[str] = EfficientNet_B0_Weights.DEFAULT.meta["categories"]

console = Console(highlight=False)


def main(files: Sequence[str]) -> None:
    """Run the demo; ``files`` are photographs to ask about besides those that scikit-learn ships."""
    clear_output()
    photos = {Path(name).name: Image.open(name).convert("RGB") for name in files} | sample_photos()
    net = model()
    example = torch.zeros(1, 3, SIZE, SIZE)

    console.rule("EfficientNet-Lite0, ImageNet weights", align="left")
    console.print(
        f"Dropping {RATIO:.0%} of the hidden channels of every inverted residual. "
        "No image is used and no weight is trained.\n"
    )
    with Stages() as stage:
        stage("pruning")
        pruned = lbyl.compress(net, example, ratio=HIDDEN, restore="prune", forecast=False)
        stage("tracing")
        started = time.perf_counter()
        result = lbyl.compress(net, example, ratio=HIDDEN, source=SOURCE, progress=stage)
        seconds = time.perf_counter() - started
        stage("measuring latency")
        latency = median_milliseconds([net, result.model], example)

    console.print(f"Compressed in {seconds:.0f} s, of which:", stages(result.report.seconds))
    console.print(size_table(result.report, latency))
    nets = {"before": net, "plain pruning": pruned.model, "restored": result.model}
    console.print(answer_table(nets, photos))
    console.print(agreement_table(nets, photos))
    for note in notes(result.report):
        console.print(Text(f"note: {note}"))

    result.save(OUTPUT)
    console.rule(f"saved to {OUTPUT}/", align="left")
    console.print("See what was cut:\n")
    console.print(f"    {command('lbyl')} show {OUTPUT}\n", style="bold")
    console.print("Load it in Python, from this folder:\n")
    console.print("    import lbyl", style="bold")
    console.print(f'    full = lbyl.load_source("{SOURCE}")', style="bold")
    console.print(f'    net = lbyl.load("{OUTPUT}", full)\n', style="bold")


def clear_output() -> None:
    """Make room for the smaller model, but never remove what no demo wrote."""
    if not OUTPUT.exists():
        return
    if not (OUTPUT / "lbyl.json").is_file():
        sys.exit(f"error: {OUTPUT.resolve()} exists and is not from an earlier demo; move it away first")
    shutil.rmtree(OUTPUT)


def command(name: str) -> str:
    """How the user calls a console script: by path unless its environment is active."""
    if shutil.which(name):
        return name
    return os.path.relpath(Path(sys.executable).with_name(name))


class Stages(Progress):
    """What is going on; with an estimate of the time left where the amount of work is known."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        left = TimeRemainingColumn()
        # A step of dreaming may take longer than Rich looks back by default.
        super().__init__(*columns, left, console=console, transient=True, speed_estimate_period=3600)

    def __call__(self, stage: str, done: int = 0, total: int | None = None) -> None:
        """The progress callback of ``lbyl.compress``."""
        if not self.tasks or self.tasks[0].description != stage:
            for task in self.task_ids:
                self.remove_task(task)
            self.add_task(stage, total=total)
        self.update(self.task_ids[0], completed=done)


# -- photographs --------------------------------------------------------------------------------------------


def sample_photos() -> dict[str, Image.Image]:
    """The two photographs that scikit-learn ships (CC BY)."""
    bunch = load_sample_images()
    names = (Path(name).name for name in bunch["filenames"])
    return {name: Image.fromarray(pixels) for name, pixels in zip(names, bunch["images"], strict=True)}


def center(photo: Image.Image) -> tuple[float, float, float, float]:
    """The largest square in the middle."""
    side = min(photo.size)
    left, top = (photo.width - side) / 2, (photo.height - side) / 2
    return left, top, left + side, top + side


def views(photo: Image.Image) -> list[tuple[float, float, float, float]]:
    """Square windows of three sizes across a photograph."""
    windows = []
    for zoom in (1.0, 0.8, 0.6):
        side = zoom * min(photo.size)
        for across in (0.0, 0.5, 1.0):
            for down in (0.0, 1.0) if zoom < 1 else (0.0,):
                left, top = across * (photo.width - side), down * (photo.height - side)
                windows.append((left, top, left + side, top + side))
    return windows


def prepare(photo: Image.Image, window: tuple[float, float, float, float]) -> Tensor:
    """A window of a photograph as the network takes it."""
    small = photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=window)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float()
    return (pixels - MEAN) / STD


@torch.inference_mode()
def probabilities(net: nn.Module, images: list[Tensor]) -> Tensor:
    """Class probabilities, one row an image."""
    return net(torch.stack(images)).softmax(1)


# -- tables -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def median_milliseconds(nets: Sequence[nn.Module], x: Tensor, runs: int = 30) -> list[float]:
    """Median latency of each network on one thread.

    The networks take turns, so that whatever else the machine does slows all of them down. Several threads
    would wait for one another on a busy machine, and that would be measured.
    """
    times: list[list[float]] = [[] for _ in nets]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for run in range(runs + 5):
        for net, taken in zip(nets, times, strict=True):
            started = time.perf_counter()
            net(x)
            if run >= 5:  # the first calls allocate memory and choose kernels
                taken.append(1000 * (time.perf_counter() - started))
    torch.set_num_threads(threads)
    return [statistics.median(taken) for taken in times]


def stages(seconds: Mapping[str, float]) -> str:
    """Seconds by stage on one line."""
    return ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items() if value >= 0.05)


def notes(report: lbyl.Report) -> list[str]:
    """What the report wants known: its own notes, and one example of what it says about single groups."""
    remarks = [(row.group, row.note) for row in report.rows if row.note]
    several = f" ({len(remarks)} of {len(report.rows)} groups have such a note)" if remarks else ""
    return [*report.notes, *(f"{group}: {note}{several}" for group, note in remarks[:1])]


def size_table(report: lbyl.Report, latency: list[float]) -> Table:
    """What the compression saved."""
    table = Table("", "before", "after", "", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, before: float, after: float, form: str) -> None:
        table.add_row(name, form.format(before), form.format(after), f"{after / before - 1:+.1%}")

    row("parameters", *report.parameters, "{:,}")
    if report.macs:
        row("multiply-accumulates", *report.macs, "{:,}")
    row("latency, 1 image, 1 thread", latency[0], latency[1], "{:.1f} ms")
    return table


def answer_table(nets: dict[str, nn.Module], photos: dict[str, Image.Image]) -> Table:
    """What every network says about the middle of every photograph: its three first answers."""
    table = Table("photograph", *nets, box=box.SIMPLE_HEAD, title="What it sees", title_justify="left")
    answers = [probabilities(net, [prepare(p, center(p)) for p in photos.values()]) for net in nets.values()]
    for index, name in enumerate(photos):
        if index:
            table.add_section()
        believed = set(answers[0][index].topk(3).indices.tolist())
        tops = [answer[index].topk(3) for answer in answers]
        for place in range(3):
            cells = []
            for top in tops:
                number, share = int(top.indices[place]), float(top.values[place])
                cells.append(Text(f"{CLASSES[number]} {share:.0%}", "green" if number in believed else "red"))
            table.add_row(name if place == 0 else "", *cells)
    return table


def agreement_table(nets: dict[str, nn.Module], photos: dict[str, Image.Image]) -> Table:
    """On how many windows each network gives the unpruned network's answers."""
    images = [prepare(photo, window) for photo in photos.values() for window in views(photo)]
    answers = [probabilities(net, images) for net in nets.values()]
    first = answers[0].argmax(1)
    table = Table(f"on {len(images)} crops of them", *nets, box=box.SIMPLE_HEAD)
    same = [int((answer.argmax(1) == first).sum()) for answer in answers]
    near = [int((answer.topk(5).indices == first[:, None]).any(1).sum()) for answer in answers]
    table.add_row("same first answer", *(f"{count} of {len(images)}" for count in same))
    table.add_row("it is among the first five", *(f"{count} of {len(images)}" for count in near))
    return table


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main(sys.argv[1:])
