"""The option `--keep-analysis` of `lbyl compress`, and the settings that `lbyl resize` goes on with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lbyl.cli.settings import Effort, Scope, Settings, Solve
from lbyl.cli.texts import InputSpec

KeepAnalysis = Annotated[
    bool,
    typer.Option(
        "--keep-analysis",
        help="Also keep what does not depend on the size (probes, error curves, moments), in the folder DIR/analysis. "
        "`lbyl resize DIR` then cuts the network to another size in a part of the time.",
    ),
]

ANALYSIS = "analysis"
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class _Stored:
    """The settings that are stored: all but those that name files, the user's data, or code."""

    round_to: str | None
    min_keep: int
    max_ratio: float
    exclude: list[str] | None
    uniform_layers: bool | None
    scope: Scope
    criterion: str
    restore: str
    effort: Effort
    moments: str | None
    solve: Solve | None
    ridge: float | None
    no_renorm: bool
    sequential: bool | None
    no_photographs: bool
    memory: float | None
    task: str | None
    input: list[str] | None
    seed: int
    no_verify: bool
    no_pretrained: bool
    submodule: str | None
    strict: bool


def check_keep(source: str, settings: Settings, given: Mapping[str, bool]) -> None:
    """Raise a usage error for options whose analysis is not kept; ``given`` says which others were given."""
    from lbyl.io.artifact import is_saved

    for option, is_given in {"--data": bool(settings.data), **given}.items():
        if is_given:
            raise typer.BadParameter(f"--keep-analysis and {option}: what is measured then is not kept; give only one")
    if is_saved(source):
        raise typer.BadParameter("--keep-analysis starts from an unpruned network, and not from a saved folder")


@contextmanager
def keeping(output: Path, settings: Settings, keep: bool) -> Iterator[Path | None]:
    """A place for the analysis until the folder ``output`` is there, into which it is moved at the end."""
    from lbyl.io.files import finish, stage, write_whole
    from lbyl.runtime.documents import document_text

    if not keep:
        yield None
        return
    with stage(output) as place:
        yield place / ANALYSIS
        stored = {field.name: getattr(settings, field.name) for field in fields(_Stored)}
        plain = asdict(_Stored(**stored))
        write_whole(place / ANALYSIS / _SETTINGS, document_text(plain, "the settings", indent=1))
        finish(place / ANALYSIS)
        (place / ANALYSIS).rename(output / ANALYSIS)


def kept_settings(folder: Path, **more: Any) -> Settings:
    """The settings that a folder was compressed with, and others that name files or code.

    Raises:
        InputError: the folder keeps no analysis.
        ArtifactError: the settings are damaged.
    """
    from lbyl.errors import ArtifactError, InputError
    from lbyl.runtime.documents import read_as, read_json

    file = folder / ANALYSIS / _SETTINGS
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; pass one that was compressed with --keep-analysis")
    if not file.is_file():
        raise InputError(f"{folder} keeps no analysis: compress it with --keep-analysis first, or use lbyl sweep")
    stored = read_as(_Stored, read_json(file), str(file))
    settings = Settings(**{field.name: getattr(stored, field.name) for field in fields(_Stored)}, **more)
    try:
        for text in stored.input or ():
            InputSpec.parse(text)
        replace(settings, task=None).check("")  # the source is not known here, and the task only goes with some
    except typer.BadParameter as error:
        raise ArtifactError(f"{file} is damaged: {error}") from error
    return settings
