"""Short names of criteria, restorers, moment sources and export formats: these are the four families.

The names of lbyl are listed in `lbyl._public`. Other programs add names by :func:`register`, or by an entry point of
the group ``lbyl.criterion``, ``lbyl.restorer``, ``lbyl.moments`` or ``lbyl.format`` in an installed package.
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
    """Register a short name, which arguments and the command line then accept.

    Args:
        family: "criterion", "restorer", "moments" or "format".
        name: the short name.
        member: a class that can be made without arguments, or a function that makes one.

    Raises:
        InputError: there is no such family, lbyl itself uses the name, or the member can't be called.
    """
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    if not isinstance(name, str) or not name or not callable(member):
        raise InputError(f"register({family!r}, {name!r}, {member!r}): pass a name and a class")
    if name in FAMILIES[family] or name == "auto":
        raise InputError(f"the {family} name {name!r} is already used by lbyl; choose another name")
    _REGISTERED[family][name] = member


def names(family: str) -> tuple[str, ...]:
    """All short names of a family, with those of lbyl first."""
    return tuple(dict.fromkeys([*FAMILIES[family], *_REGISTERED[family], *_installed()[family]]))


@cache
def _installed() -> dict[str, dict[str, EntryPoint]]:
    """The entry points of installed packages, by family and name; they are looked up once."""
    found = entry_points()
    return {family: {entry.name: entry for entry in found.select(group=f"lbyl.{family}")} for family in FAMILIES}


def make(family: str, name: str) -> Any:
    """Make a member of a family, given its short name, without arguments.

    Raises:
        InputError: no member has this name, or it can't be made without arguments.
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
    """The names that a user may give: all members of the family, and "auto" for restorers and criteria."""
    return (*(("auto",) if family in ("restorer", "criterion") else ()), *names(family))


def find(family: str, name: str) -> Any:
    """The class or function with a short name.

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
