"""`lbyl compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from lbyl.cli.app import app, out, print_json, working
from lbyl.cli.options import (
    BUDGET,
    FITTING,
    CriterionName,
    Fitting,
    Inputs,
    Json,
    MomentsName,
    NoPretrained,
    RestorerName,
    Scope,
    Seed,
    Solve,
    Source,
    Strict,
    Submodule,
    Weights,
    check_budget,
    check_multiple,
    check_ratios,
    parse_budget,
    parse_divisors,
    parse_numbers,
    parse_ratio,
)
from lbyl.cli.sources import check_output, example_inputs, load_model, read_batches


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
    round_to: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            callback=check_multiple,
            help="Kept channels come in multiples of this.",
            rich_help_panel=BUDGET,
        ),
    ] = "1",
    min_keep: Annotated[int, typer.Option(min=1, help="No group keeps fewer.", rich_help_panel=BUDGET)] = 1,
    max_ratio: Annotated[
        float, typer.Option(min=0, max=0.999, help="No group loses a larger share.", rich_help_panel=BUDGET)
    ] = 0.9,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Groups and layers that stay whole.", rich_help_panel=BUDGET),
    ] = None,
    scope: Annotated[
        Scope, typer.Option(help="inner: groups that no residual sum couples; all: every prunable one.")
    ] = Scope.inner,
    criterion: Annotated[CriterionName, typer.Option(help="How channels are scored.")] = CriterionName.l2,
    restore: Annotated[
        RestorerName,
        typer.Option(help="How dropped channels are made up for. auto: the best that this network allows."),
    ] = RestorerName.auto,
    moments: Annotated[
        MomentsName | None,
        typer.Option(
            help="Where second moments come from: the weights, Gaussian theory, noise images, dreamed images "
            "or your own (--data).",
            rich_help_panel=FITTING,
        ),
    ] = None,
    solve: Annotated[
        Solve | None,
        typer.Option(help="mix: one number a channel pair; patch: the reader's whole kernel.", rich_help_panel=FITTING),
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(min=0, help="Penalty, relative to the moments' mean diagonal.", rich_help_panel=FITTING),
    ] = None,
    no_renorm: Annotated[
        bool,
        typer.Option("--no-renorm", help="Leave batch-norm statistics alone.", rich_help_panel=FITTING),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Take moments from images in a folder and those in it, preprocessed as the model expects; "
            "no labels are needed.",
            rich_help_panel=FITTING,
        ),
    ] = None,
    mean: Annotated[
        Any,
        typer.Option(
            metavar="M[,M,M]",
            parser=parse_numbers,
            help="Subtracted from the pixels of --data, which are 0 to 1. "
            "Default: as timm or torchvision say, else ImageNet's.",
            show_default=False,
            rich_help_panel=FITTING,
        ),
    ] = None,
    std: Annotated[
        Any,
        typer.Option(
            metavar="S[,S,S]",
            parser=parse_divisors,
            help="What the pixels are then divided by.",
            show_default=False,
            rich_help_panel=FITTING,
        ),
    ] = None,
    weights: Weights = None,
    input: Inputs = None,
    seed: Seed = 0,
    no_verify: Annotated[
        bool,
        typer.Option("--no-verify", help="Don't compare the cut network with the masked one (huge models)."),
    ] = False,
    no_pretrained: NoPretrained = False,
    submodule: Submodule = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Drop channels, let the kept ones make up for them, and save the smaller network."""
    fitting = Fitting(moments, solve, ridge, False if no_renorm else None, data, mean, std)
    fitting.check(restore)
    if budget is not None and ratio:
        raise typer.BadParameter("--ratio and --budget: give one of them; a budget chooses each group's ratio")
    if budget is None and (round_to != "1" or min_keep != 1 or max_ratio != 0.9 or exclude):
        raise typer.BadParameter("--round-to, --min-keep, --max-ratio and --exclude need --budget")
    with working(f"loading {source}") as stage:
        check_output(output)
        import lbyl
        from lbyl.artifact import PAGE, document, read_manifest
        from lbyl.recipe import load_line

        if data is not None:
            from lbyl.images import find_images

            find_images(data)  # before any time is spent
        limit = None
        if budget is not None:
            name, amount = parse_budget(budget)
            multiple = round_to if round_to == "auto" else int(round_to)
            limit = lbyl.Budget(
                **{name: amount},  # pyright: ignore[reportArgumentType]
                round_to=multiple,
                min_keep=min_keep,
                max_ratio=max_ratio,
                exclude=tuple(exclude or ()),
            )
        model = load_model(source, weights, not no_pretrained)
        inputs = example_inputs(source, model, input, seed)
        batches = None
        if data is not None:
            stage(f"reading images from {data}")
            batches = read_batches(data, source, model, inputs[0], bool(input), fitting, seed)
        chosen = restore.value if restore is not RestorerName.auto else fitting.restorer(batches)
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
