"""Round trips through ONNX: networks of many families, exported by PyTorch, read back, cut, written, and run.

    python benchmarks/onnx_trips.py [--only GLOB] [--fresh]

The networks of `export.py` at full size with random weights are written by both of PyTorch's exporters, at several
opsets. `lbyl.load_source` reads each file, `lbyl.compress` takes 25 % of the channels by plain pruning, and the written
file is run by onnxruntime. It has to keep the channels that the PyTorch network keeps, and to compute what the smaller
PyTorch network does. Where the PyTorch code can't run with fewer heads of attention, and the file can, the file is
compressed again with these groups left whole. No data is needed.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from export import NETWORKS, RATIO, network
from output import Run, Table, known_cells
from provenance import ROOMS
from rich.console import Console
from torch import nn

import lbyl
from lbyl.io.comparison import difference
from lbyl.io.onnx.check import run_file
from lbyl.io.onnx.network import OnnxNetwork
from lbyl.io.quiet import quiet
from lbyl.runtime.contexts import plain_attention
from lbyl.runtime.inputs import ExampleInputs, outputs

EXPORTERS: dict[str, dict[str, Any]] = {
    "TorchScript, 13": {"dynamo": False, "opset_version": 13},
    "TorchScript, 17": {"dynamo": False, "opset_version": 17},
    "dynamo, 18": {"dynamo": True, "opset_version": 18, "optimize": False},
    "dynamo, newest": {"dynamo": True, "optimize": False},
}
"""Batch norms are kept apart: where they are folded, other filters are the smallest."""
SCOPES: dict[str, Any] = {"timm:repvgg_a0": "all"}
"""Residual connections couple all of its channels."""


def exported(net: nn.Module, x: Any, file: Path, exporter: str) -> None:
    """The file that PyTorch writes."""
    args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})
    given = dict(EXPORTERS[exporter])
    if not given["dynamo"]:
        given |= {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    # The older exporter does not know the operation that the fast path of attention is.
    with warnings.catch_warnings(), quiet(), torch.no_grad(), plain_attention():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, args, file, kwargs=kwargs, external_data=False, **given)


def beyond(ours: Sequence[Any], theirs: Sequence[Any]) -> list[str]:
    """The groups of the file that the PyTorch network lacks, where the others keep the same; else none."""
    rest = list(theirs)
    more = []
    for group in ours:
        if rest and group.keep == rest[0].keep:
            rest.pop(0)
        else:
            more.append(group.name)
    return [] if rest else more


def round_trip(name: str, net: nn.Module, x: Any, exporter: str, folder: Path) -> dict[str, Any]:
    """What came of one round trip."""
    file = folder / "net.onnx"
    try:
        exported(net, x, file, exporter)
    except Exception as error:  # then the exporter is to blame
        return {"written": False, "why": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    started = time.perf_counter()
    read = lbyl.load_source(str(file))
    assert isinstance(read, OnnxNetwork)
    reading = time.perf_counter() - started
    given = tuple(ExampleInputs.of(x).tensors())
    settings: dict[str, Any] = {"ratio": RATIO, "criterion": "l2", "restore": "prune", "forecast": False}
    settings["scope"] = SCOPES.get(name, "inner")
    ours, theirs = lbyl.compress(read, given, **settings), lbyl.compress(net, x, **settings)
    more = beyond(ours.plan.groups, theirs.plan.groups)
    if more:
        ours = lbyl.compress(read, given, **{**settings, "ratio": {"*": RATIO, **dict.fromkeys(more, 0.0)}})
    saved = ours.save(folder / "smaller") / "model.onnx"
    found = run_file(saved, read.program.inputs, ExampleInputs(given))
    expected = outputs(theirs.model, ExampleInputs.of(x))
    kept = [[group.keep for group in result.plan.groups] for result in (ours, theirs)]
    return {
        "written": True,
        "groups": [len(each) for each in kept],
        "more": len(more),
        "same": kept[0] == kept[1],
        "relative": max(difference(a, b)[1] for a, b in zip(expected, found, strict=True)),
        "mb": file.stat().st_size / 1e6,
        "reading": round(reading, 2),
        "macs": [ours.report.macs, theirs.report.macs],
        "left": [list(item) for item in ours.report.left if "ratio 0" not in item[1]][:6],
    }


def tabulate(run: Run) -> None:
    """A row a network."""
    rows = []
    for name in NETWORKS:
        cells = {c["exporter"]: c for c in run.measurements if c["network"] == name}
        if not cells:
            continue
        row: list[Any] = [name]
        for exporter in EXPORTERS:
            cell = cells.get(exporter)
            row += [_said(cell)]
        done = [c for c in cells.values() if c.get("written") and "relative" in c]
        row += [f"{max(c['mb'] for c in done):.0f}" if done else None, max((c["reading"] for c in done), default=None)]
        rows.append(row)
    done = [c for c in run.measurements if c.get("written")]
    same = sum(c.get("same", False) and c["relative"] <= 1e-4 for c in done)
    note = (
        f"{same} of {len(done)} files lose the same channels as the PyTorch network and compute what it then does, to "
        "1e-4 of the largest output. Otherwise: how many groups were cut in the file and in PyTorch. + n: the file has "
        "n groups more, heads of attention that the PyTorch code can't lose; they were left whole. repvgg_a0 with "
        'scope="all", since residual connections couple all of its channels.'
    )
    columns = ["network", *EXPORTERS, "MB", "s to read"]
    run.tables = [Table("Exported, read, pruned by 25 %, written, run", columns, rows, note)]
    failures = [[c["network"], c["exporter"], c["why"]] for c in run.measurements if "why" in c]
    run.details = [Table("What failed", ["network", "exporter", "what was said"], failures)] if failures else []


def _said(cell: dict[str, Any] | None) -> str | None:
    if cell is None:
        return None
    if not cell.get("written"):
        return "not exported"
    if "why" in cell:
        return "fails"
    same = "" if cell["same"] else f", {cell['groups'][0]} of {cell['groups'][1]} groups"
    more = f" + {cell['more']}" if cell.get("more") else ""
    return f"{cell['relative']:.0e}{more}{same}"


def main(
    only: Annotated[str, typer.Option(help="A glob over names.")] = "*",
    exporter: Annotated[str, typer.Option(help="A glob over exporters.")] = "*",
    fresh: Annotated[bool, typer.Option(help="Measure again what is known, for these names.")] = False,
) -> None:
    """Fill the table network by network."""
    torch.set_num_threads(1)
    console = Console()
    run = Run("onnx_trips", "Round trips through ONNX", "python benchmarks/onnx_trips.py", {"ratio": RATIO})
    run.rooms = (*ROOMS, "io/onnx")

    def asked(name: str, kind: str) -> bool:
        return fnmatch(name, only) and fnmatch(kind, exporter)

    run.measurements = [c for c in known_cells("onnx_trips") if not (fresh and asked(c["network"], c["exporter"]))]
    known = {(c["network"], c["exporter"]) for c in run.measurements}
    for name in NETWORKS:
        kinds = [kind for kind in EXPORTERS if asked(name, kind) and (name, kind) not in known]
        if not kinds:
            continue
        net, x = network(name)
        for kind in kinds:
            with tempfile.TemporaryDirectory() as place:
                try:
                    found = round_trip(name, net, x, kind, Path(place))
                except lbyl.LbylError as error:
                    found = {"written": True, "why": f"{type(error).__name__}: {error}"[:300]}
            run.measurements.append({"network": name, "exporter": kind, "lbyl": version("lbyl"), **found})
            console.print(f"{name} {kind}: {found}", markup=False, soft_wrap=True)
            run.save(tabulate)
    run.save(tabulate)


if __name__ == "__main__":
    typer.run(main)
