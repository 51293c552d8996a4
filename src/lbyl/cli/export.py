"""`lbyl export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbyl.cli.app import WithExamples, app, out, print_json, working
from lbyl.cli.names import check_name, name_option
from lbyl.cli.options import Folder, Json, Quiet, SameInputs, Seed
from lbyl.cli.sources import example_inputs
from lbyl.cli.texts import check_source


@app.command(cls=WithExamples)
def export(
    folder: Folder,
    format: Annotated[
        str, name_option("format", "onnx: for most runtimes; pt2: for torch.export.load; gguf: for llama.cpp.")
    ] = "onnx",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            callback=check_source,
            help="Source of the unpruned model (module:factory), if it is neither from timm nor from torchvision.",
        ),
    ] = None,
    input: SameInputs = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="New file. Default: model.FORMAT in the folder."),
    ] = None,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="Accept only the example's batch size in the file.")
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a saved network as one file for other runtimes, into its folder, and check it by running it."""
    check_name("--format", "format", format)
    with working(f"reading {folder}", quiet) as stage:
        from lbyl.io.artifact import read_manifest

        if format != "gguf":  # which takes any folder of a language model
            read_manifest(folder)  # before the user's code runs
        import lbyl
        from lbyl.io.report.format import shown
        from lbyl.io.sources import load_source

        fresh = load_source(model, pretrained=False) if model else None
        inputs = example_inputs(model or "", fresh, input, seed) if input else None
        stage(f"exporting and checking {format}")
        exported = lbyl.export(
            folder, fresh, to=output, format=format, inputs=inputs, dynamic=not fixed_batch, seed=seed
        )
    if as_json:
        print_json(exported.to_dict())
    else:
        out.print(*map(shown, exported.summary()), sep="\n", soft_wrap=True)
