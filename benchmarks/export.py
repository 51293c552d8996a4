"""Export round trips: networks of many families, pruned, saved, exported and run by the runtime of the format.

    python benchmarks/export.py [--only GLOB] [--fresh] [--check]

Every network is built at full size with random weights, loses 25 % of its channels (scope="all", no restoration: what
counts here is the file), is saved, and is then exported from the saved folder as ONNX and as pt2. `lbyl.export` runs
each file against the PyTorch model on several batch sizes, and refuses it where the outputs differ by more than 1e-4
of the largest one. Results are written file by file; what stands there is not computed again. No data is needed.
--check exports one network again in every format, and exits with 1 where that fails; nothing is written.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from models import build
from output import Run, Table, known_cells
from provenance import ROOMS
from rich.console import Console
from torch import nn

import lbyl
from lbyl.runtime.inputs import ExampleInputs

RATIO = 0.25
FORMATS = ("onnx", "pt2")
CHECKED = "torchvision:shufflenet_v2_x1_0"
NETWORKS = (
    "torchvision:resnet50",
    "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0",
    "torchvision:densenet121",
    "torchvision:vit_b_16",
    "torchvision:swin_t",
    "torchvision:convnext_tiny",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:regnet_y_400mf",
    "torchvision:inception_v3",
    "timm:repvgg_a0",
    "timm:hrnet_w18_small",
    "timm:mobilevit_xs",
    "transformers:bert_base",
)


def network(name: str) -> tuple[nn.Module, Any]:
    """The network in evaluation mode, with batch norms that fit its random weights, and an input."""
    torch.manual_seed(0)
    if name == "transformers:bert_base":
        from transformers import BertConfig, BertForSequenceClassification

        net = BertForSequenceClassification(BertConfig()).eval()
        tokens = torch.randint(0, 30_000, (1, 128))
        return net, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    net, x = build(name)
    for parameter in net.parameters():
        if parameter.dim() > 1 and not parameter.any():  # classifiers that start at zero would hide all differences
            nn.init.normal_(parameter, std=0.02)
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        # Otherwise the signal dies on its way, and a difference between two outputs of nothing says nothing.
        net(torch.randn(4, *x.shape[1:]))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return net.eval(), x


def round_trip(folder: Path, fresh: nn.Module, x: Any, format: str) -> dict[str, Any]:
    """One export of a saved folder, and what came of running the file."""
    started = time.perf_counter()
    try:
        exported = lbyl.export(folder, fresh, format=format, inputs=x)
    except lbyl.LbylError as error:
        return {"passed": False, "why": f"{type(error).__name__}: {error}"[:300]}
    outcome = {key: value for key, value in exported.to_dict().items() if key not in ("file", "format")}
    # Large weights may lie in a file of their own.
    outcome["bytes"] = sum(file.stat().st_size for file in folder.glob(f"{exported.file.name}*"))
    return {"passed": True, **outcome, "seconds": round(time.perf_counter() - started, 1)}


def round_trips(name: str, formats: Sequence[str], console: Console) -> Iterator[dict[str, Any]]:
    """A network pruned, saved, and exported in these formats."""
    net, x = network(name)
    result = lbyl.compress(net, x, ratio=RATIO, scope="all", restore="prune", forecast=False)
    with tempfile.TemporaryDirectory() as place:
        folder = result.save(Path(place) / "smaller")
        for format in formats:
            cell = {
                "network": name,
                "format": format,
                "lbyl": version("lbyl"),
                "inputs": ExampleInputs.of(x).describe(),
                "parameters": result.report.parameters,
                **round_trip(folder, net, x, format),
            }
            said = f"difference {cell['relative']:.1e}" if cell["passed"] else cell["why"]
            console.print(f"{name} {format}: {said}", markup=False)
            yield cell


def tabulate(run: Run) -> None:
    """A row a network: both formats side by side."""
    rows = []
    for name in NETWORKS:
        cells = {c["format"]: c for c in run.measurements if c["network"] == name}
        if not cells:
            continue
        before, after = next(iter(cells.values()))["parameters"]
        row: list[Any] = [name, f"{1 - after / before:.1%}"]
        for format in FORMATS:
            cell = cells.get(format)
            if cell is None:
                row += [None] * 4
            elif not cell["passed"]:
                row += ["fails", None, None, None]
            else:
                batch = "any" if cell["dynamic"] else "fixed"
                row += [round(cell["bytes"] / 1e6, 1), cell["seconds"], f"{cell['relative']:.0e}", batch]
        rows.append(row)
    columns = ["network", "parameters removed"]
    columns += [f"{format}, {what}" for format in FORMATS for what in ("MB", "s", "difference", "batch")]
    passed = [sum(c["passed"] for c in run.measurements if c["format"] == format) for format in FORMATS]
    tried = [sum(c["format"] == format for c in run.measurements) for format in FORMATS]
    note = (
        f"{passed[0]} of {tried[0]} load and agree in onnxruntime, {passed[1]} of {tried[1]} in torch.export.load. "
        "Difference: the largest between the file's outputs and the PyTorch model's over all batch sizes that were "
        "run, relative to the largest output. Seconds: load, export and check, on one thread."
    )
    run.tables = [Table("Pruned by 25 %, saved, exported", columns, rows, note)]
    failures = [[c["network"], c["format"], c["why"]] for c in run.measurements if not c["passed"]]
    notes = [[c["network"], c["format"], c["note"]] for c in run.measurements if c["passed"] and c["note"]]
    run.details = [
        Table(title, ["network", "format", "what was said"], found)
        for title, found in (("What failed", failures), ("Notes", notes))
        if found
    ]


def main(
    only: Annotated[str, typer.Option(help="A glob over names.")] = "*",
    fresh: Annotated[bool, typer.Option(help="Export again what is known, for these names.")] = False,
    check: Annotated[bool, typer.Option("--check", help=f"Only export {CHECKED} again.")] = False,
) -> None:
    """Fill the table network by network."""
    torch.set_num_threads(1)
    if check:
        raise typer.Exit(0 if all(cell["passed"] for cell in round_trips(CHECKED, FORMATS, Console())) else 1)
    console = Console()
    names = [name for name in NETWORKS if fnmatch(name, only)]
    run = Run("export", "Export round trips", "python benchmarks/export.py", {"ratio": RATIO, "scope": "all"})
    run.rooms = (*ROOMS, "io/export")
    run.measurements = [c for c in known_cells("export") if not (fresh and c["network"] in names)]
    known = {(c["network"], c["format"]) for c in run.measurements}
    for name in names:
        formats = [format for format in FORMATS if (name, format) not in known]
        if not formats:
            continue
        for cell in round_trips(name, formats, console):
            run.measurements.append(cell)
            run.save(tabulate)
    run.save(tabulate)


if __name__ == "__main__":
    typer.run(main)
