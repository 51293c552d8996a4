"""Smaller heads against narrower layers, at equal parameters and without data.

    python benchmarks/heads.py --data DIR [--model FOLDER] [--networks vit,smollm2,smollm2_read] [--fresh]

`DIR` and the networks are those of `depth.py`: a small ViT for digits, which is trained here, and SmolLM2-135M, also as
`smollm2_read` with real text in place of its own. All heads of a network get the same number of channels. Every method
looks at the same probes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from depth import NAMES, TEXTS, Kept, Subject, subjects
from output import Run, Table, known_cells
from provenance import ROOMS
from rich.console import Console
from torch import nn

import lbyl
from lbyl.pipeline.heads import HeadGround, ground_for_heads
from lbyl.pipeline.prepare import prepare
from lbyl.pipeline.request import CompressionRequest
from lbyl.restore.registry import choose_restorer
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.macs import count_parameters
from lbyl.runtime.progress import Clock

METHODS = ("Plain", "Solved", "Width")
SIZES: Mapping[str, Sequence[int]] = {"vit": (10, 8, 6, 4), "smollm2": (60, 56, 48), "smollm2_read": (60, 56, 48)}
"""How many channels each head keeps."""


def grounded(subject: Subject) -> HeadGround:
    """Heads, probes and moments."""
    inputs = ExampleInputs.of(subject.example)
    made = subject.probes(inputs) if subject.probes else None
    restore = lbyl.LeastSquares(moments=Kept(made)) if made else choose_restorer(subject.model, inputs)[0]
    budget = lbyl.Budget(params=0.9, head_dim=True)
    request = CompressionRequest({"*": 0.5}, budget, "inner", None, restore, 0, True, False, None, None, False)
    return ground_for_heads(prepare(subject.model, subject.example, request, None, Clock()), request, Clock())


def cut(ground: HeadGround, method: str, size: int) -> tuple[nn.Module, float]:
    """The smaller network, and its effect on held-out probes."""
    if method != "Width":
        made = ground.made(size, solved=method == "Solved")
        return made.network, made.effect
    left = count_parameters(ground.made(size, solved=False).network) / count_parameters(ground.model)
    restore = lbyl.LeastSquares(moments=Kept(ground.probes))
    budget = replace(ground.budget, params=left, head_dim=False)
    result = lbyl.compress(
        ground.model, dict(ground.prepared.inputs.kwargs) or ground.prepared.inputs.args, budget=budget,
        restore=restore, forecast=False,
    )  # fmt: skip
    return result.model, ground.effect(result.model)


def main(
    data: Annotated[Path, typer.Option(envvar="LBYL_DATA", help="Folder with texts.")],
    model: Annotated[Path | None, typer.Option(help="Folder of a Llama model in place of SmolLM2-135M.")] = None,
    networks: Annotated[str, typer.Option(help="Which to measure.")] = ",".join(SIZES),
    methods: Annotated[str, typer.Option(help="Which to measure.")] = ",".join(METHODS),
    texts: Annotated[int, typer.Option(help="Sequences of 256 tokens that SmolLM2 writes or reads.")] = 32,
    probes: Annotated[Path | None, typer.Option(help="File that keeps what SmolLM2 wrote.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is known.")] = False,
) -> None:
    """Measure what is not known yet, and write the file after each cell."""
    settings, rooms = {"texts": texts}, (*ROOMS, "budget")
    run = Run(
        "heads", "The inside of heads", "python benchmarks/heads.py --data DIR", settings, pieced=True, rooms=rooms
    )
    for subject in subjects(networks.split(","), data, model, probes, texts):
        ground = grounded(subject)
        whole = ground.layers[0].size
        for method, size in [("Unpruned", whole), *((m, n) for n in SIZES[subject.name] for m in methods.split(","))]:
            key = subject.name, method, size
            run.measurements = known_cells("heads")
            if any((c["network"], c["method"], c["size"]) == key for c in run.measurements) and not fresh:
                continue
            started = time.perf_counter()
            made, effect = (subject.model, 0.0) if method == "Unpruned" else cut(ground, method, size)
            share = 1 - count_parameters(made) / count_parameters(subject.model)
            cell: dict[str, Any] = {"network": subject.name, "method": method, "size": size, "removed": share}
            cell |= {"effect": effect, **subject.score(made.eval()), "lbyl": version("lbyl")}
            cell["seconds"] = round(time.perf_counter() - started, 1)
            others = [c for c in known_cells("heads") if (c["network"], c["method"], c["size"]) != key]
            run.measurements = [*others, cell]
            run.tables = tables(run.measurements)
            Console().print(run.write(), cell)


def tables(cells: Sequence[dict[str, Any]]) -> list[Table]:
    """A table a network and measure: a row a size, a column a method."""
    made = []
    for network in SIZES:
        measure = "perplexity" if network in TEXTS else "accuracy"
        found = {(c["method"], c["size"]): c for c in cells if c["network"] == network}
        whole = next((c for (method, _), c in found.items() if method == "Unpruned"), None)
        if whole is None:
            continue
        rows = []
        for size in sorted({size for _, size in found} - {whole["size"]}, reverse=True):
            values = [found.get((method, size), {}).get(measure) for method in METHODS]
            removed = next(c["removed"] for (_, n), c in found.items() if n == size)
            rows.append([f"{size} of {whole['size']}", f"{removed:.1%}", whole[measure], *values])
        text = "perplexity, lower is better" if measure == "perplexity" else "accuracy (%)"
        columns = ["channels in each head", "removed", "unpruned", *METHODS]
        made.append(Table(f"{NAMES[network]}: {text}", columns, rows, _NOTE if not made else ""))
    return made


_NOTE = (
    "Removed is the share of all parameters. Plain: each head keeps the channels of most power. Solved: it keeps the "
    "best products of queries and keys, and the best values, of that size, which is what lbyl.Budget(head_dim=True) "
    "does. Width: narrower layers and fewer heads, with as many parameters."
)


if __name__ == "__main__":
    typer.run(main)
