"""`lbyl sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbyl.cli.app import WithExamples, app, out, print_json, working
from lbyl.cli.options import Evaluate, Json, NoForecast, Quiet, Source
from lbyl.cli.settings import BUDGET, Settings, with_settings
from lbyl.cli.sources import check_images, prepare
from lbyl.cli.texts import check_budgets, parse_budgets

Budgets = Annotated[
    list[str],
    typer.Option(
        metavar="agreement=R,R,...|macs=R,R,...",
        callback=check_budgets,
        help="Qualities to keep (agreement, accuracy_drop) or costs to allow (shares of macs, params or latency, or a "
        "size_mb), with one network for each amount. "
        "Repeat it for other kinds.",
        rich_help_panel=BUDGET,
        show_default=False,
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="New folder, or the folder of a sweep to continue.")
]

Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="auto|ADDRESS",
        help="Make the networks on the machines of this Ray cluster. auto: the cluster that runs here, or else the "
        "cores of this machine. It takes the extra 'ray' of lbyl, on all machines.",
        show_default=False,
    ),
]


@app.command(cls=WithExamples)
@with_settings
def sweep(
    *,
    source: Source,
    budget: Budgets,
    output: Output,
    evaluate: Evaluate = None,
    ray: Ray = None,
    no_forecast: NoForecast = False,
    settings: Settings,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress to several budgets in little more time than one takes.

    Each network gets a folder. A table and a picture show what each costs and how well it does.

    If a sweep is stopped, the same command continues it. With other budgets, it adds networks.
    """
    settings.check(source)
    with working(f"loading {source}", quiet) as stage:
        import lbyl
        from lbyl.io.report.format import shown
        from lbyl.io.sources import load_function
        from lbyl.pipeline.sweep.state import exists
        from lbyl.runtime.cluster import check_address

        exists(output)  # like all checks, before any time is spent
        if ray is not None:
            check_address(ray)
        check_images(settings)
        budgets = [settings.budget(name, amount) for name, amount in parse_budgets(budget)]
        judge = load_function(evaluate) if evaluate else None
        prepared = prepare(source, settings, stage)
        swept = lbyl.sweep(
            prepared.model,
            prepared.inputs,
            budgets,
            output,
            evaluate=judge,
            ray=ray,
            forecast=not no_forecast,
            **prepared.arguments,
        )
        if not swept.made:
            reasons = "; ".join(f"{point.asked}: {point.reason}" for point in swept.points)
            raise lbyl.InputError(f"no point could be made ({reasons})")
    if as_json:
        print_json(swept.to_dict())
        return
    out.print(swept)
    out.print(shown(f"saved to {output}"), soft_wrap=True)
