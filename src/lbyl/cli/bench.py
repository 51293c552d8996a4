"""`lbyl bench`."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lbyl.cli.app import WithExamples, app, out, print_json, working
from lbyl.cli.options import Folder, Json, Quiet, Runtime, SameInputs, Seed, Timed
from lbyl.cli.sources import example_inputs, load_model
from lbyl.cli.texts import InputSpec, check_source

if TYPE_CHECKING:
    from lbyl.surgery.plan import Plan

_LARGEST_INPUT = 2**28

_Against = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        callback=check_source,
        help="The unpruned network: timm:NAME, torchvision:NAME, hf:DIR, model.onnx, package.module:factory or "
        "file.py:factory. Default: the source that the folder was compressed from, unless it is a factory or a .pt2.",
        show_default=False,
    ),
]
_Weights = Annotated[
    Path | None,
    typer.Option(
        help="State dict for the unpruned network. Without it, the weights are random, which takes the same time."
    ),
]
_Model = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        callback=check_source,
        help="Source of the unpruned model that the folder is loaded into. "
        "Default: the source that the folder was compressed from, or --against if that is your own factory or a .pt2.",
        show_default=False,
    ),
]


@app.command(cls=WithExamples)
def bench(
    folder: Folder,
    against: _Against = None,
    weights: _Weights = None,
    model: _Model = None,
    input: SameInputs = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Batch size, in place of that of the inputs.", show_default=False)
    ] = None,
    runs: Annotated[int, typer.Option(min=3, help="How many times each network is timed.")] = 20,
    runtime: Timed = Runtime.torch,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how much faster a saved network is than the unpruned one, as a whole and layer by layer."""
    with working(f"reading {folder}", quiet) as stage:
        from lbyl.io.artifact import read_manifest

        plan = read_manifest(folder).plan  # before the user's code runs
        import lbyl
        from lbyl.errors import InputError
        from lbyl.io.sources import load_source
        from lbyl.surgery.plan import is_rebuildable

        known = bool(plan.source) and is_rebuildable(plan.source or "")
        original = against or (plan.source if known else None)
        if original is None:
            was = f" (it was compressed from {plan.source})" if plan.source else ""
            raise InputError(f"{folder}: the plan can't build the unpruned network{was}; name it with --against SOURCE")
        texts = _shapes(plan, input, batch)
        unpruned = load_model(original, weights, pretrained=False)
        builder = model or (None if known else original)
        smaller = lbyl.load(folder, load_source(builder, pretrained=False) if builder else None)
        found = lbyl.bench(
            smaller,
            example_inputs(original, unpruned, texts, seed),
            against=unpruned,
            runs=runs,
            runtime=runtime.value,
            progress=stage,
        )
    if as_json:
        print_json({"path": str(folder), "against": original, "inputs": texts, **found.to_dict()})
    else:
        out.print(found)


def _shapes(plan: Plan, typed: list[str] | None, batch: int | None) -> list[str]:
    """The inputs that were typed, or those of the plan, with this batch size."""
    from lbyl.errors import InputError

    texts = typed or []
    for text in plan.inputs.split(", ") if not typed else ():
        if not re.fullmatch(r"\w+ \d+(x\d+)*", text):
            raise InputError(f"the network was compressed on {plan.inputs!r}; pass the inputs to measure on by --input")
        texts.append(text.replace(" ", ":"))
    specs = [InputSpec.parse(text) for text in texts]
    if not typed and any(math.prod(spec.shape) > _LARGEST_INPUT for spec in specs):
        raise InputError(f"the plan describes the inputs as {plan.inputs!r}, which is too large; pass --input")
    if batch is not None:
        old = specs[0].shape[0]
        specs = [replace(s, shape=(batch, *s.shape[1:])) if s.shape[0] == old else s for s in specs]
    return [f"{spec.dtype}:{'x'.join(map(str, spec.shape))}" for spec in specs]
