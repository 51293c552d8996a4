"""`lbyl resize`."""

from __future__ import annotations

from typing import Annotated

import typer

from lbyl.cli.app import WithExamples, app, working
from lbyl.cli.compress import Cost, Minimize, NoLatency, Output, check_budget_kind, make, show
from lbyl.cli.kept import ANALYSIS, kept_settings
from lbyl.cli.options import Builder, Evaluate, Folder, Json, NoForecast, Quiet, Weights
from lbyl.cli.settings import BUDGET
from lbyl.cli.sources import check_output
from lbyl.cli.texts import check_one_budget, parse_budget

NewBudget = Annotated[
    list[str],
    typer.Option(
        "--budget",
        metavar="agreement=R|accuracy_drop=X|macs=R|params=R|latency=R|size_mb=X",
        callback=check_one_budget,
        help="Quality to keep or cost to allow, as for compress.",
        show_default=False,
        rich_help_panel=BUDGET,
    ),
]
Plugin = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE|FILE.py", help="Modules that compress was called with. A module is code, which is run."
    ),
]


@app.command(cls=WithExamples)
def resize(
    *,
    folder: Folder,
    budgets: NewBudget,
    output: Output,
    minimize: Minimize = Cost.macs,
    evaluate: Evaluate = None,
    model: Builder = None,
    weights: Weights = None,
    plugin: Plugin = None,
    no_forecast: NoForecast = False,
    no_latency: NoLatency = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cut a network to another size, from the analysis that compress --keep-analysis left in DIR.

    All other settings are those of that compression. The unpruned network is loaded again: from its source, or from
    --model if that is code of yours, and with --weights if it was compressed with weights from a file.
    """
    (budget,) = budgets
    check_budget_kind(budget, evaluate, minimize)
    with working(f"reading {folder}", quiet) as stage:
        from lbyl.errors import InputError
        from lbyl.io.artifact import read_manifest
        from lbyl.surgery.plan import is_rebuildable

        check_output(output)
        settings = kept_settings(folder, weights=weights, plugin=plugin)
        source = model or read_manifest(folder).plan.source
        if source is None or (model is None and not is_rebuildable(source)):
            raise InputError(f"{folder} does not say how its network is built, or that takes code; pass --model SOURCE")
        limit = settings.budget(*parse_budget(budget), minimize.value)
        make(
            source,
            settings,
            output,
            stage,
            budget=limit,
            evaluate=evaluate,
            forecast=not no_forecast,
            latency=not no_latency,
            analysis=folder / ANALYSIS,
        )
    show(output, as_json, source)
