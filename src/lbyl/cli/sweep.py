"""`lbyl sweep`."""

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
    check_budgets,
    make_budget,
    parse_budgets,
)
from lbyl.cli.sources import example_inputs, load_model, read_batches


@app.command()
def sweep(
    source: Source,
    budget: Annotated[
        list[str],
        typer.Option(
            metavar="macs=R,R,...",
            callback=check_budgets,
            help="What may stay, one network each: shares of macs, params or latency, or a size_mb. "
            "Repeat it for other kinds.",
            rich_help_panel=BUDGET,
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="A new folder, or that of a sweep to go on with."),
    ],
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="MODULE:FUNCTION",
            help="Called with each network, returns a number such as an accuracy: package.module:function or "
            "file.py:function. It is code: it is run.",
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
    as_json: Json = False,
) -> None:
    """Compress to several budgets, for the price of one: a folder each, a table and a picture of what they cost.

    Whatever stops it, the same command goes on where it was; with other budgets it adds networks.
    """
    renorm, photographs = (False if left_out else None for left_out in (no_renorm, no_photographs))
    fitting = Fitting(moments, solve, ridge, renorm, sequential, data, mean, std, photographs, memory)
    fitting.check(restore)
    with working(f"loading {source}") as stage:
        import lbyl
        from lbyl.io.sources import load_function
        from lbyl.pipeline.sweep.state import exists

        exists(output)  # before any time is spent, like all that follows
        if data is not None:
            from lbyl.io.images import find_images

            find_images(data)
        budgets = [
            make_budget(name, amount, round_to, min_keep, max_ratio, exclude) for name, amount in parse_budgets(budget)
        ]
        judge = load_function(evaluate) if evaluate else None
        model = load_model(source, weights, not no_pretrained)
        inputs = example_inputs(source, model, input, seed)
        batches = None
        if data is not None:
            stage(f"reading images from {data}")
            batches = read_batches(data, source, model, inputs[0], bool(input), fitting, seed)
        chosen = restore.value if restore is not RestorerName.auto else fitting.restorer(batches, model)
        stage("tracing")
        swept = lbyl.sweep(
            model,
            inputs,
            budgets,
            output,
            evaluate=judge,
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
        if not swept.made:
            reasons = "; ".join(f"{point.asked}: {point.reason}" for point in swept.points)
            raise lbyl.InputError(f"no point could be made ({reasons})")
    if as_json:
        print_json(swept.to_dict())
        return
    out.print(swept)
    out.print(Text(f"saved to {output}"))
