"""`lbyl compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from lbyl.cli.app import app, out, print_json, working
from lbyl.cli.options import (
    BUDGET,
    Criterion,
    CriterionName,
    Exclude,
    Fitting,
    Images,
    Inputs,
    InScope,
    Json,
    MaxRatio,
    Mean,
    Memory,
    MinKeep,
    Moments,
    NoPhotographs,
    NoPretrained,
    NoRenorm,
    NoVerify,
    Restore,
    RestorerName,
    Ridge,
    RoundTo,
    Scope,
    Seed,
    Sequential,
    SolveFor,
    Source,
    Std,
    Strict,
    Submodule,
    Weights,
    check_budget,
    check_ratios,
    make_budget,
    parse_budget,
    parse_ratio,
)
from lbyl.cli.sources import check_output, example_inputs, load_model, read_batches

_RUNS = 7
"""Enough for a median and its margin, in a time that nobody minds after a compression."""


@app.command()
def compress(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="New folder to write.")],
    ratio: Annotated[
        list[str] | None,
        typer.Option(
            metavar="R|GLOB=R",
            callback=check_ratios,
            help="Share of the channels that each group loses. "
            "Repeat it as GLOB=R for single groups or layers; "
            "the last match counts, and without a plain R the others stay whole. Default: 0.5.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="macs=R|params=R|latency=R|size_mb=X",
            callback=check_budget,
            help="What may stay, in place of a ratio; each group's width is then chosen for the least predicted error. "
            "A latency is measured on this machine.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    round_to: RoundTo = "1",
    min_keep: MinKeep = 1,
    max_ratio: MaxRatio = 0.9,
    exclude: Exclude = None,
    scope: InScope = Scope.inner,
    criterion: Criterion = CriterionName.l2,
    restore: Restore = RestorerName.auto,
    moments: Moments = None,
    solve: SolveFor = None,
    ridge: Ridge = None,
    no_renorm: NoRenorm = False,
    sequential: Sequential = None,
    no_photographs: NoPhotographs = False,
    memory: Memory = None,
    data: Images = None,
    mean: Mean = None,
    std: Std = None,
    weights: Weights = None,
    input: Inputs = None,
    seed: Seed = 0,
    no_verify: NoVerify = False,
    no_pretrained: NoPretrained = False,
    submodule: Submodule = None,
    strict: Strict = False,
    no_latency: Annotated[
        bool, typer.Option("--no-latency", help="Do not measure how long both networks take on this machine.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Drop channels, let the kept ones make up for them, and save the smaller network."""
    renorm, photographs = (False if left_out else None for left_out in (no_renorm, no_photographs))
    fitting = Fitting(moments, solve, ridge, renorm, sequential, data, mean, std, photographs, memory)
    fitting.check(restore)
    if budget is not None and ratio:
        raise typer.BadParameter("--ratio and --budget: give one of them; a budget chooses each group's ratio")
    if budget is None and (round_to != "1" or min_keep != 1 or max_ratio != 0.9 or exclude):
        raise typer.BadParameter("--round-to, --min-keep, --max-ratio and --exclude need --budget")
    with working(f"loading {source}") as stage:
        check_output(output)
        import lbyl
        from lbyl.io.artifact import PAGE, document, read_manifest
        from lbyl.io.report.snippets import load_line

        if data is not None:
            from lbyl.io.images import find_images

            find_images(data)  # before any time is spent
        limit = None
        if budget is not None:
            limit = make_budget(*parse_budget(budget), round_to, min_keep, max_ratio, exclude)
        model = load_model(source, weights, not no_pretrained)
        inputs = example_inputs(source, model, input, seed)
        batches = None
        if data is not None:
            stage(f"reading images from {data}")
            batches = read_batches(data, source, model, inputs[0], bool(input), fitting, seed)
        chosen = restore.value if restore is not RestorerName.auto else fitting.restorer(batches, model)
        stage("tracing")
        result = lbyl.compress(
            model,
            inputs,
            ratio=parse_ratio(ratio) if ratio else None,
            budget=limit,
            scope=scope.value,
            criterion=criterion.value,
            seed=seed,
            verify=not no_verify,
            strict=strict,
            submodule=submodule,
            source=source,
            progress=stage.follow,
            # Left out, not repeated: "auto" is whatever the library does by itself.
            **({"restore": chosen} if chosen is not None else {}),
        )
        if not no_latency:
            result = result.timed(lbyl.bench(result.model, inputs, against=model, runs=_RUNS, progress=stage))
        stage(f"writing {output}")
        result.save(output)
        # What was written may say more: whether a config.json could be, for one.
        saved = read_manifest(output)
    if as_json:
        print_json(document(output, saved.plan, saved.report))
        return
    out.print(saved.report)
    out.print(Text(f"saved to {output}; {output / PAGE} is the report for people"))
    out.print(Text(f"load it with\n\n    {load_line(output, source)}\n"))
