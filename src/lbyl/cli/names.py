"""Names of criteria, restorers and moment sources on the command line, and plugins that register more of them.

The names are those of `lbyl.runtime.registry`, which does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from lbyl.runtime.registry import choices


def name_option(family: str, help: str, panel: str | None = None) -> Any:
    """An option that takes the name of a family's member. Help and completion list the names."""
    return typer.Option(
        metavar=f"<{'|'.join(choices(family))}>",
        autocompletion=completion(family),
        help=help,
        rich_help_panel=panel,
    )


def completion(family: str) -> Callable[[str], list[str]]:
    """The function for a shell's completion, which lists the names that begin with a text."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in choices(family) if name.startswith(incomplete)]

    return complete


def check_name(option: str, family: str, name: str) -> None:
    """Raise a usage error if no member of the family has this name."""
    if name not in choices(family):
        known = ", ".join(choices(family))
        raise typer.BadParameter(f"{name!r} is not a {_WORDS[family]}; choose one of {known}", param_hint=option)


_WORDS = {"criterion": "criterion", "restorer": "restorer", "moments": "source of moments", "format": "format"}


def is_factory(source: str) -> bool:
    """Whether a source is a user's function, whose module may register names.

    >>> is_factory("file.py:net"), is_factory("timm:resnet18"), is_factory("resnet18"), is_factory("C:/model.onnx")
    (True, False, False, False)
    """
    place, _, name = source.rpartition(":")
    if source.lower().endswith((".onnx", ".pt2")):
        return False
    return bool(place and name) and place not in ("timm", "torchvision")


def import_plugins(places: Sequence[str] | None) -> None:
    """Import the user's modules and run the user's files, in order, so that they can register names.

    Raises:
        InputError: there is no such file or module, or it raises an error.
    """
    from lbyl.errors import InputError
    from lbyl.io.sources import load_module

    for place in places or ():
        if place.endswith(".py") and not Path(place).is_file():
            raise InputError(f"--plugin {place}: there is no such file")
    try:
        for place in places or ():
            load_module(place)
    except InputError as error:
        raise InputError(f"--plugin {error}; write package.module or file.py") from error
