"""The version of this library."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def library_version() -> str:
    """The version of this library."""
    try:
        return version("lbyl")
    except PackageNotFoundError:
        return "unknown"
