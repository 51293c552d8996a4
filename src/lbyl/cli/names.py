"""Names of criteria, restorers and moment sources on the command line, and the user's code that adds some.

The names are those of `lbyl.runtime.registry`, which does not import torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from lbyl.runtime.registry import names


def choices(family: str) -> tuple[str, ...]:
    """What can be named: the members of the family, and auto among restorers and criteria."""
    return (*(("auto",) if family in ("restorer", "criterion") else ()), *names(family))


def name_option(family: str, help: str, panel: str | None = None) -> Any:
    """An option that takes the name of a family's member. Help and completion list the names."""
    return typer.Option(
        metavar=f"<{'|'.join(choices(family))}>",
        autocompletion=completion(family),
        help=help,
        rich_help_panel=panel,
    )


def completion(family: str) -> Callable[[str], list[str]]:
    """What a shell is told when it asks for the names that begin with a text."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in choices(family) if name.startswith(incomplete)]

    return complete


def check_name(option: str, family: str, name: str) -> None:
    """A usage error where no member of the family has this name."""
    if name not in choices(family):
        known = ", ".join(choices(family))
        raise typer.BadParameter(f"{name!r} is no {_WORDS[family]}; choose one of {known}", param_hint=option)


_WORDS = {"criterion": "criterion", "restorer": "restorer", "moments": "source of moments"}


def is_factory(source: str) -> bool:
    """Whether a source is a function of the user's, whose module may register names.

    >>> is_factory("file.py:net"), is_factory("timm:resnet18"), is_factory("resnet18")
    (True, False, False)
    """
    place, _, name = source.rpartition(":")
    return bool(place and name) and place not in ("timm", "torchvision")


def import_plugins(places: Sequence[str] | None) -> None:
    """Import modules and run files of the user's, in order, so that they can register names.

    Raises:
        InputError: no such file or module, or an error in it.
    """
    for place in places or ():
        _run_file(Path(place)) if place.endswith(".py") else _import_module(place)


def _import_module(name: str) -> None:
    from lbyl.errors import InputError

    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"--plugin {name} can't be imported ({type(error).__name__}: {error}); write package.module or file.py"
        ) from error


def _run_file(file: Path) -> None:
    from lbyl.errors import InputError

    if not file.is_file():
        raise InputError(f"--plugin {file}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"lbyl_plugin_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise InputError(f"--plugin {file} can't be run: {type(error).__name__}: {error}") from error
