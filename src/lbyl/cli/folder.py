"""The option `--low-memory` of `lbyl compress`: from folder to folder, one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lbyl.cli.app import working
from lbyl.cli.names import import_plugins
from lbyl.cli.settings import BUDGET, Settings
from lbyl.cli.sources import check_output
from lbyl.cli.texts import parse_budget, parse_ratio

LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="Read, cut and write one decoder layer after the other, for language models (hf:DIR) that are larger than "
        "memory. Takes --ratio, --budget params=R or size_mb=X, and text from --data or English sentences that come "
        "with lbyl. A killed command goes on where it was if it is repeated.",
        rich_help_panel=BUDGET,
    ),
]

_TAKEN = ("data", "criterion", "seed", "solve", "ridge", "memory", "no_verify", "round_to", "min_keep", "max_ratio")
_TAKEN += ("uniform_layers", "plugin")
"""The settings that apply."""


def check_low_memory(
    source: str, ratio: list[str] | None, budget: str | None, settings: Settings, given: Mapping[str, bool]
) -> None:
    """Raise a usage error for options that need the whole model.

    Args:
        source: the source.
        ratio: ratios as given.
        budget: a budget as given.
        settings: the other settings.
        given: whether other options were given, such as "--eval".
    """
    if not source.startswith("hf:"):
        raise typer.BadParameter(f"--low-memory is for hf:DIR, a folder with a language model, and not for {source}")
    if not ratio and (budget is None or parse_budget(budget)[0] not in ("params", "size_mb")):
        raise typer.BadParameter("--low-memory needs --ratio R, --budget params=R or --budget size_mb=X")
    default = Settings()
    changed = [name for name in vars(default) if getattr(settings, name) != getattr(default, name)]
    others = [f"--{name.replace('_', '-')}" for name in changed if name not in _TAKEN]
    others += [option for option, is_given in given.items() if is_given]
    if others:
        raise typer.BadParameter(
            f"{' and '.join(others)}: this needs the whole model in memory; leave out either it or --low-memory"
        )


def compress_low_memory(
    source: str, output: Path, ratio: list[str] | None, budget: str | None, settings: Settings, quiet: bool
) -> None:
    """Compress from folder to folder, and write the output."""
    with working(f"reading {source}", quiet) as stage:
        check_output(output)
        import lbyl

        import_plugins(settings.plugin)
        settings.check_names()
        changes: dict[str, Any] = {"ridge": settings.ridge}
        if settings.solve:
            changes["solve"] = settings.solve.value
        if settings.memory is not None:
            changes["memory"] = round(settings.memory * 2**30)
        lbyl.compress_folder(
            source.removeprefix("hf:"),
            output,
            ratio=parse_ratio(ratio) if ratio else None,
            budget=None if ratio else settings.budget(*parse_budget(budget or "")),
            data=settings.data,
            criterion=settings.criterion,
            restore=lbyl.LeastSquares(**changes),
            seed=settings.seed,
            verify=not settings.no_verify,
            progress=stage,
        )
