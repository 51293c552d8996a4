"""`lbyl compress`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from lbyl.cli.app import Stage, WithExamples, app, out, print_json, working
from lbyl.cli.folder import LowMemory, check_low_memory, compress_low_memory
from lbyl.cli.kept import KeepAnalysis, check_keep, keeping
from lbyl.cli.options import Evaluate, Json, NoForecast, Quiet, Source
from lbyl.cli.settings import BUDGET, Settings, with_settings
from lbyl.cli.sources import check_images, check_output, prepare
from lbyl.cli.texts import check_one_budget, check_ratios, parse_budget, parse_ratio

_RUNS = 7
"""How often each network is timed: enough for a median and its margin, and short next to a compression."""

Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="New folder to write.")]
Ratio = Annotated[
    list[str] | None,
    typer.Option(
        metavar="R|GLOB=R",
        callback=check_ratios,
        help="Share of the channels that each group loses, in place of a budget. Repeat it as GLOB=R for single groups "
        "or layers. The last match counts. Without a plain R, all other groups are left whole.",
        show_default=False,
    ),
]
OneBudget = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="agreement=R|accuracy_drop=X|macs=R|params=R|latency=R|size_mb=X",
        callback=check_one_budget,
        help="Quality to keep or cost to allow, in place of a ratio. The widths of the groups are then chosen for the "
        "least predicted error. agreement: forecast share of real inputs with the same answer. accuracy_drop: needs "
        "--eval. latency: measured on this machine. Default: agreement=0.95, or if no cut keeps it, the cut "
        "that loses least.",
        show_default=False,
        rich_help_panel=BUDGET,
    ),
]


class Cost(str, Enum):
    """The cost to minimize."""

    macs = "macs"
    params = "params"
    latency = "latency"


Minimize = Annotated[
    Cost,
    typer.Option(
        help="The cost to minimize with --budget agreement=R or accuracy_drop=X.",
        rich_help_panel=BUDGET,
    ),
]
Depth = Annotated[
    bool,
    typer.Option(
        "--depth",
        help="Whole residual blocks may be dropped as well, with --budget macs=R, params=R, latency=R or size_mb=X. "
        "What they did is left to the layer before them.",
        rich_help_panel=BUDGET,
    ),
]
Experts = Annotated[
    bool,
    typer.Option(
        "--experts",
        help="Drop whole experts of mixtures, and channels only if experts can't save enough, with --budget params=R "
        "or size_mb=X. Those that stay take over. With --depth, blocks, experts and channels are weighed against each "
        "other.",
        rich_help_panel=BUDGET,
    ),
]
HeadDim = Annotated[
    bool,
    typer.Option(
        "--head-dim",
        help="Make heads of attention smaller inside, and cut nothing else, with --budget macs=R, params=R or "
        "size_mb=X.",
        rich_help_panel=BUDGET,
    ),
]
NoLatency = Annotated[
    bool, typer.Option("--no-latency", help="Do not measure how long both networks take on this machine.")
]


@app.command(cls=WithExamples)
@with_settings
def compress(
    *,
    source: Source,
    output: Output,
    ratio: Ratio = None,
    budgets: OneBudget = None,
    minimize: Minimize = Cost.macs,
    depth: Depth = False,
    experts: Experts = False,
    head_dim: HeadDim = False,
    low_memory: LowMemory = False,
    keep_analysis: KeepAnalysis = False,
    evaluate: Evaluate = None,
    no_forecast: NoForecast = False,
    settings: Settings,
    no_latency: NoLatency = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Drop channels, restore the network by the kept ones, and save the smaller network."""
    settings.check(source)
    budget = budgets[0] if budgets else None
    _check(ratio, budget, evaluate, minimize, settings)
    whole = {"depth": depth, "experts": experts, "head_dim": head_dim}
    options = {f"--{name.replace('_', '-')}": given for name, given in whole.items()}
    _check_whole(options, ratio, budget, settings)
    if low_memory:
        check_low_memory(source, ratio, budget, settings, {"--eval": evaluate is not None, **options})
        compress_low_memory(source, output, ratio, budget, settings, quiet)
        return show(output, as_json, source)
    if keep_analysis:
        check_keep(source, settings, {**options, "--low-memory": low_memory})
    with working(f"loading {source}", quiet) as stage:
        check_output(output)
        from lbyl.io.artifact import is_saved

        check_images(settings)
        asked = {"best_effort": budget is None, **whole}
        limit = None if ratio else settings.budget(*parse_budget(budget or _DEFAULT), minimize.value, **asked)
        with keeping(output, settings, keep_analysis) as place:
            make(
                source,
                settings,
                output,
                stage,
                ratio=parse_ratio(ratio) if ratio else None,
                budget=limit,
                evaluate=evaluate,
                forecast=not no_forecast,
                latency=not no_latency,
                analysis=place,
            )
    show(output, as_json, settings.builder if is_saved(source) else source)


def make(
    source: str,
    settings: Settings,
    output: Path,
    stage: Stage,
    *,
    ratio: Any = None,
    budget: Any = None,
    evaluate: str | None = None,
    forecast: bool = True,
    latency: bool = True,
    analysis: Path | None = None,
) -> None:
    """Load a network, compress it, measure its latency and save it."""
    import lbyl
    from lbyl.io.sources import load_function

    judge = load_function(evaluate) if evaluate else None
    prepared = prepare(source, settings, stage)
    result = lbyl.compress(
        prepared.model,
        prepared.inputs,
        ratio=ratio,
        budget=budget,
        evaluate=judge,
        forecast=forecast,
        analysis=analysis,
        **prepared.arguments,
    )
    if prepared.notes:
        notes = (*result.report.notes, *prepared.notes)
        result = replace(result, report=replace(result.report, notes=notes))
    if latency:
        timed = lbyl.bench(
            result.model,
            prepared.inputs,
            against=prepared.model,
            runs=_RUNS,
            runtime=settings.runtime.value,
            progress=stage,
        )
        result = result.timed(timed)
    stage(f"writing {output}")
    result.save(output)


def show(output: Path, as_json: bool, origin: str | None) -> None:
    """Print the saved report. It has more notes than the result's, such as whether a config.json could be written."""
    from lbyl.io.artifact import PAGE, document, read_manifest
    from lbyl.io.report.format import shown
    from lbyl.io.report.snippets import load_line

    saved = read_manifest(output)
    if as_json:
        print_json(document(output, saved.plan, saved.report))
        return
    out.print(saved.report)
    out.print(shown(f"saved to {output}; {output / PAGE} is the report for people"), soft_wrap=True)
    out.print(Text(f"load it with\n\n    {load_line(output, origin or saved.plan.source)}\n"), soft_wrap=True)


_DEFAULT = "agreement=0.95"


def _check(
    ratio: list[str] | None, budget: str | None, evaluate: str | None, minimize: Cost, settings: Settings
) -> None:
    if budget is not None and ratio:
        raise typer.BadParameter("--ratio and --budget: give only one of them; a budget chooses each group's ratio")
    names = ("round_to", "min_keep", "max_ratio", "exclude", "uniform_layers")
    if ratio and any(getattr(settings, name) != getattr(Settings, name) for name in names):
        raise typer.BadParameter("--round-to, --min-keep, --max-ratio, --exclude and --uniform-layers need --budget")
    check_budget_kind(None if ratio else budget or _DEFAULT, evaluate, minimize)


def check_budget_kind(budget: str | None, evaluate: str | None, minimize: Cost) -> None:
    """Raise a usage error for options that do not go with this kind of budget; None for a ratio."""
    name = None if budget is None else parse_budget(budget)[0]
    if name == "accuracy_drop" and evaluate is None:
        raise typer.BadParameter("--budget accuracy_drop=X needs --eval, a function that measures accuracy")
    if minimize is not Cost.macs and name not in ("agreement", "accuracy_drop"):
        raise typer.BadParameter("--minimize is for --budget agreement=R or accuracy_drop=X")


def _check_whole(options: Mapping[str, bool], ratio: list[str] | None, budget: str | None, settings: Settings) -> None:
    """Raise a usage error for options that do not go with dropping blocks or experts, or with smaller heads."""
    name = None if ratio else parse_budget(budget or _DEFAULT)[0]
    given = [option for option, is_given in options.items() if is_given]
    if "--head-dim" in given and len(given) > 1:
        others = " and ".join(option for option in given if option != "--head-dim")
        raise typer.BadParameter(f"give {others} or --head-dim, and compress the result once more with the other")
    for option in given:
        if option == "--experts" and name not in ("params", "size_mb"):
            raise typer.BadParameter("--experts needs a budget of size: --budget params=R or size_mb=X")
        if option == "--depth" and name not in ("macs", "params", "size_mb", "latency"):
            raise typer.BadParameter(
                "--depth needs a budget of cost: --budget macs=R, params=R, latency=R or size_mb=X"
            )
        if option == "--head-dim" and name not in ("macs", "params", "size_mb"):
            raise typer.BadParameter("--head-dim needs a budget of cost: --budget macs=R, params=R or size_mb=X")
        if settings.submodule is not None:
            raise typer.BadParameter(f"{option} and --submodule: this is for whole networks; give only one")
