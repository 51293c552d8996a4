"""`lbyl compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from lbyl.cli.app import app, out, print_json, working
from lbyl.cli.options import Json, Source
from lbyl.cli.settings import BUDGET, Settings, with_settings
from lbyl.cli.sources import check_images, check_output, prepare
from lbyl.cli.texts import check_budget, check_ratios, parse_budget, parse_ratio

_RUNS = 7
"""How often each network is timed: enough for a median and its margin, and short next to a compression."""

Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="New folder to write.")]
Ratio = Annotated[
    list[str] | None,
    typer.Option(
        metavar="R|GLOB=R",
        callback=check_ratios,
        help="Share of the channels that each group loses. Repeat it as GLOB=R for single groups or layers. "
        "The last match counts, and without a plain R the others stay whole. Default: 0.5.",
        show_default=False,
    ),
]
OneBudget = Annotated[
    str | None,
    typer.Option(
        metavar="macs=R|params=R|latency=R|size_mb=X",
        callback=check_budget,
        help="What may stay, in place of a ratio. The widths of the groups are then chosen for the least predicted "
        "error. Latency is measured on this machine.",
        rich_help_panel=BUDGET,
    ),
]
NoLatency = Annotated[
    bool, typer.Option("--no-latency", help="Do not measure how long both networks take on this machine.")
]


@app.command()
@with_settings
def compress(
    *,
    source: Source,
    output: Output,
    ratio: Ratio = None,
    budget: OneBudget = None,
    settings: Settings,
    no_latency: NoLatency = False,
    as_json: Json = False,
) -> None:
    """Drop channels, let the kept ones make up for them, and save the smaller network."""
    settings.check(source)
    _check(ratio, budget, settings)
    with working(f"loading {source}") as stage:
        check_output(output)
        import lbyl
        from lbyl.io.artifact import PAGE, document, read_manifest
        from lbyl.io.report.format import shown
        from lbyl.io.report.snippets import load_line

        check_images(settings)
        limit = settings.budget(*parse_budget(budget)) if budget is not None else None
        prepared = prepare(source, settings, stage)
        result = lbyl.compress(
            prepared.model,
            prepared.inputs,
            ratio=parse_ratio(ratio) if ratio else None,
            budget=limit,
            **prepared.arguments,
        )
        if not no_latency:
            timed = lbyl.bench(result.model, prepared.inputs, against=prepared.model, runs=_RUNS, progress=stage)
            result = result.timed(timed)
        stage(f"writing {output}")
        result.save(output)
        # The saved report may say more, such as whether a config.json could be written.
        saved = read_manifest(output)
    if as_json:
        print_json(document(output, saved.plan, saved.report))
        return
    out.print(saved.report)
    out.print(shown(f"saved to {output}; {output / PAGE} is the report for people"), soft_wrap=True)
    out.print(Text(f"load it with\n\n    {load_line(output, source)}\n"), soft_wrap=True)


def _check(ratio: list[str] | None, budget: str | None, settings: Settings) -> None:
    if budget is not None and ratio:
        raise typer.BadParameter("--ratio and --budget: give one of them; a budget chooses each group's ratio")
    names = ("round_to", "min_keep", "max_ratio", "exclude", "uniform_layers")
    if budget is None and any(getattr(settings, name) != getattr(Settings, name) for name in names):
        raise typer.BadParameter("--round-to, --min-keep, --max-ratio, --exclude and --uniform-layers need --budget")
