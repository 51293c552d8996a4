"""Is half the multiply-accumulates half the time? Wall-clock before and after, in PyTorch and in onnxruntime.

    python benchmarks/latency.py [--network resnet50] [--fresh] [--quick] [--threads N]

torchvision's networks with random weights (which time does not depend on) are cut to half of their multiply-
accumulates, once with widths of any size and once with multiples of 8, without restoration. The unpruned network and
the two cut ones then run in turns, so that whatever slows the machine down slows all three. Besides the times there is
the share of the time that was saved over the share of the multiply-accumulates that was: 1 where time falls as they do.

Run it on a machine that does nothing else. Cells are written one by one, and what was measured before with as many
threads is not measured again. ``--quick`` measures MobileNetV2 at batch 1 in a minute, and writes nothing. No data is
needed; onnxruntime comes with ``pip install '.[export]'``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from output import Run, Table, known_cells
from rich.console import Console
from torch import Tensor, nn
from torchvision import models

import lbyl
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.latency import Runs, interleaved, measure_whole

NETWORKS = {"resnet50": "ResNet-50", "mobilenet_v2": "MobileNetV2", "vit_b_16": "ViT-B/16"}
BATCHES = (1, 16)
RUNTIMES = {"torch": "PyTorch", "onnx": "onnxruntime"}
MULTIPLES = (1, 8)
SHARE = 0.5
SECONDS = 15.0
RUNS = (5, 30)
"""As many runs as fit into so many seconds a cell, within these bounds."""


def cut(net: nn.Module, multiple: int) -> tuple[nn.Module, float]:
    """The network with half of its multiply-accumulates, and the share that it really has."""
    budget = lbyl.Budget(macs=SHARE, round_to=multiple)
    result = lbyl.compress(net, torch.zeros(1, 3, 224, 224), budget=budget, restore="prune", forecast=False)
    assert result.report.macs is not None
    return result.model, result.report.macs[1] / result.report.macs[0]


def session(net: nn.Module, folder: Path) -> Any:
    """The network in onnxruntime, for any batch size, with as many threads as PyTorch has."""
    import onnxruntime

    file, example = folder / f"{id(net)}.onnx", torch.zeros(2, 3, 224, 224)
    logging.disable(logging.CRITICAL)  # the exporter prints what it does, and warns of itself
    try:
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            axes = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(net, (example,), str(file), dynamo=True, dynamic_shapes=axes, verbose=False)
    finally:
        logging.disable(logging.NOTSET)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def in_torch(nets: Sequence[nn.Module], x: Tensor, runs: int, warm_up: int) -> tuple[Runs, ...]:
    """Seconds of each in turns."""
    return measure_whole(nets, ExampleInputs.of(x), runs=runs, warm_up=warm_up)


def in_onnxruntime(sessions: Sequence[Any], x: Tensor, runs: int, warm_up: int) -> tuple[Runs, ...]:
    """The same."""
    feed = {sessions[0].get_inputs()[0].name: x.numpy()}
    calls = [lambda s=s: s.run(None, feed) for s in sessions]
    return interleaved(calls, [time.perf_counter] * len(calls), runs, warm_up)


def measured(measure: Callable[[int, int], tuple[Runs, ...]], most: int) -> tuple[Runs, ...]:
    """As many runs as the time allows; finding out how many warms up."""
    once = sum(found.median for found in measure(3, 1))
    return measure(min(max(int(SECONDS / once), RUNS[0]), most), 0)


def tabulate(run: Run) -> None:
    """One table a network."""
    run.tables = []
    for name, title in NETWORKS.items():
        cells = [cell for cell in run.measurements if cell["network"] == name]
        rows = []
        for cell in sorted(cells, key=lambda c: (c["batch"], list(RUNTIMES).index(c["runtime"]))):
            row = [f"{RUNTIMES[cell['runtime']]}, batch {cell['batch']}", f"{1000 * cell['before']['median']:,.1f} ms"]
            for multiple in MULTIPLES:
                found = cell["cut"][str(multiple)]
                median, margin = found["ratio"]["median"], found["ratio"]["margin"]
                row += [f"{1000 * found['after']['median']:,.1f} ms", f"{median:.2f} ± {margin:.2f}", found["saved"]]
            rows.append(row)
        if rows:
            columns = ["where", "before"]
            for multiple in MULTIPLES:
                columns += [f"×{multiple}", f"×{multiple}: share of time", f"×{multiple}: saved / MACs saved"]
            kept = ", ".join(f"×{m} {cells[0]['cut'][str(m)]['macs']:.3f}" for m in MULTIPLES)
            note = (
                f"×8: kept channels come in multiples of 8. Share of the MACs that is left: {kept}. Medians of "
                f"{min(c['runs'] for c in cells)} to {max(c['runs'] for c in cells)} runs of each in turns, float32; "
                f"± is the margin of the median share. Threads: {cells[0]['threads']}."
            )
            run.tables.append(Table(title, columns, rows, note))


def main(
    network: Annotated[list[str] | None, typer.Option(help=f"{', '.join(NETWORKS)}; all.")] = None,
    fresh: Annotated[bool, typer.Option(help="Measure again what is known, for these networks.")] = False,
    quick: Annotated[bool, typer.Option(help="MobileNetV2 at batch 1, few runs, nothing written.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Of both runtimes. Default: as PyTorch likes.")] = None,
) -> None:
    """Fill the tables cell by cell."""
    if threads is not None:
        torch.set_num_threads(threads)
    names = ["mobilenet_v2"] if quick else network or list(NETWORKS)
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        raise typer.BadParameter(f"no network {unknown[0]!r}; there are {', '.join(NETWORKS)}")
    console, current, count = Console(), version("lbyl"), torch.get_num_threads()
    run = Run("latency", "Time saved by half the multiply-accumulates", "python benchmarks/latency.py")
    run.settings = {
        "share": SHARE,
        "restore": "prune",
        "threads": count,
        "onnxruntime": version("onnxruntime"),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    if not quick:
        run.measurements = [
            c for c in known_cells("latency") if c["threads"] == count and not (fresh and c["network"] in names)
        ]
    known = {(c["network"], c["batch"], c["runtime"]) for c in run.measurements}
    most = RUNS[0] if quick else RUNS[1]
    for name in names:
        wanted = [(b, r) for b in (BATCHES[:1] if quick else BATCHES) for r in RUNTIMES if (name, b, r) not in known]
        if not wanted:
            continue
        torch.manual_seed(0)
        net = models.get_model(name, weights=None).eval()
        smaller = [cut(net, multiple) for multiple in MULTIPLES]
        nets = [net, *(model for model, _ in smaller)]
        with tempfile.TemporaryDirectory() as folder:
            exported = any(runtime == "onnx" for _, runtime in wanted)
            sessions = [session(model, Path(folder)) for model in nets] if exported else []
            for batch, runtime in wanted:
                x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
                if runtime == "torch":
                    found = measured(lambda runs, warm, x=x, nets=nets: in_torch(nets, x, runs, warm), most)
                else:
                    found = measured(lambda runs, warm, x=x, s=sessions: in_onnxruntime(s, x, runs, warm), most)
                before, *after = found
                cuts = {}
                for multiple, (_, macs), seconds in zip(MULTIPLES, smaller, after, strict=True):
                    ratio = seconds.over(before)
                    cuts[str(multiple)] = {
                        "macs": round(macs, 4),
                        "after": seconds.to_dict(),
                        "ratio": ratio.to_dict(),
                        "saved": round((1 - ratio.median) / (1 - macs), 3),
                    }
                cell = {
                    "network": name,
                    "batch": batch,
                    "runtime": runtime,
                    "lbyl": current,
                    "threads": count,
                    "runs": len(before.values),
                    "before": before.to_dict(),
                    "cut": cuts,
                }
                run.measurements.append(cell)
                line = ", ".join(f"x{m}: {c['ratio']['median']:.2f} (saved {c['saved']:.2f})" for m, c in cuts.items())
                console.print(f"{name} batch {batch} {runtime}: {1000 * before.median:.1f} ms; {line}")
                tabulate(run)
                if not quick:
                    run.write()
    tabulate(run)
    if quick:
        console.print(run.tables[0].columns, *run.tables[0].rows, run.tables[0].note, sep="\n")
    else:
        console.print(f"wrote {run.write()}")


if __name__ == "__main__":
    typer.run(main)
