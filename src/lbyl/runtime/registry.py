"""Members of a family (criteria, restorers, moment sources, export formats) by their short names.

Those of lbyl are listed in `lbyl._public`. Others join them by :func:`register`, or by an entry point of the group
``lbyl.criterion``, ``lbyl.restorer``, ``lbyl.moments`` or ``lbyl.format`` in an installed package.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from lbyl._public import FAMILIES, HOME
from lbyl.errors import InputError

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
    if family not in FAMILIES:
        raise InputError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    if name in FAMILIES[family] or name == "auto":
        raise InputError(f"{name!r} is already a {family} of lbyl; choose another name")
    if not name or not callable(member):
        raise InputError(f"register({family!r}, {name!r}, {member!r}): give a name and a class")
    _REGISTERED[family][name] = member


def names(family: str) -> tuple[str, ...]:
    """All short names of a family, those of lbyl first."""
    found = (entry.name for entry in entry_points(group=f"lbyl.{family}"))
    return tuple(dict.fromkeys([*FAMILIES[family], *_REGISTERED[family], *found]))


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
    for entry in entry_points(group=f"lbyl.{family}", name=name):
        return entry.load()
    choices = (*(("auto",) if family in ("restorer", "criterion") else ()), *names(family))
    raise InputError(f"unknown {family} {name!r}; choose one of {', '.join(choices)}")
