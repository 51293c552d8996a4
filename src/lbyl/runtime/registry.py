"""Members of a family (criteria, restorers, moment sources, export formats) by their short names.

Those of lbyl are listed in `lbyl._public`. Others join them by :func:`register`, or by an entry point of the group
``lbyl.criterion``, ``lbyl.restorer``, ``lbyl.moments`` or ``lbyl.format`` in an installed package.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lbyl._public import FAMILIES, HOME
from lbyl.errors import InputError, LbylError, first_line

_REGISTERED: dict[str, dict[str, Any]] = {family: {} for family in FAMILIES}


def register(family: str, name: str, member: Any) -> None:
    """Give a member of a family a short name, for arguments and the command line.

    Args:
        family: "criterion", "restorer", "moments" or "format".
        name: the short name.
        member: a class that can be made without arguments, or a function that makes one.

    Raises:
        InputError: no such family, a name that lbyl itself uses, or a member that can't be called.
    """
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    if not isinstance(name, str) or not name or not callable(member):
        raise InputError(f"register({family!r}, {name!r}, {member!r}): give a name and a class")
    if name in FAMILIES[family] or name == "auto":
        raise InputError(f"{name!r} is already a {family} of lbyl; choose another name")
    _REGISTERED[family][name] = member


def names(family: str) -> tuple[str, ...]:
    """All short names of a family, those of lbyl first."""
    return tuple(dict.fromkeys([*FAMILIES[family], *_REGISTERED[family], *_installed()[family]]))


@cache
def _installed() -> dict[str, dict[str, EntryPoint]]:
    """The members that installed packages add, by family and name; what is installed is looked at once."""
    found = entry_points()
    return {family: {entry.name: entry for entry in found.select(group=f"lbyl.{family}")} for family in FAMILIES}


def make(family: str, name: str) -> Any:
    """A member of a family by its short name, made without arguments.

    Raises:
        InputError: no member has this name, or it can't be made.
    """
    member = find(family, name)
    try:
        return member()
    except LbylError:
        raise
    except Exception as error:
        raise InputError(
            f"the {family} {name!r} can't be made without arguments ({first_line(error)}); "
            "register a class or function that needs none, or pass an object"
        ) from error


def choices(family: str) -> tuple[str, ...]:
    """What can be named: the members of the family, and auto among restorers and criteria."""
    return (*(("auto",) if family in ("restorer", "criterion") else ()), *names(family))


def find(family: str, name: str) -> Any:
    """The class of a short name.

    Raises:
        InputError: no member of the family has this name.
    """
    if name in FAMILIES[family]:
        module, _, member = FAMILIES[family][name].rpartition(":")
        return getattr(importlib.import_module(module or HOME[member]), member)
    if name in _REGISTERED[family]:
        return _REGISTERED[family][name]
    if name in _installed()[family]:
        try:
            return _installed()[family][name].load()
        except Exception as error:
            raise InputError(f"the {family} {name!r} of an installed package can't be loaded: {error}") from error
    raise InputError(f"unknown {family} {name!r}; choose one of {', '.join(choices(family))}")
