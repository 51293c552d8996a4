"""Plain data from JSON into dataclasses; an error names the place inside the document."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from lbyl.errors import ArtifactError

Kind = TypeVar("Kind")


def read_as(kind: type[Kind], data: Any, what: str) -> Kind:
    """Data as a dataclass, its fields checked against their types. Fields that the class doesn't know are ignored.

    Args:
        kind: the dataclass.
        data: what ``json.loads`` gave. (The standard library reads it, because reports may hold NaN.)
        what: what the data is, for the error.

    Raises:
        ArtifactError: a field is missing or has another type.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"{what} is damaged: {error}") from error


def check_no_faults(faults: Iterable[tuple[str, str]], what: str) -> None:
    """Raise ArtifactError for the first fault: what is wrong, and where in the document."""
    for fault, place in faults:
        raise ArtifactError(f"{what} is damaged: {fault} - at `{place}`")
