"""Plain data from JSON into dataclasses, and back; an error names the place inside the document."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lbyl.errors import ArtifactError, InputError

Kind = TypeVar("Kind")

_LARGEST = 8 * 2**20
_MOST_VALUES = 1_000_000
"""More than the plan of any network that fits into a machine, and not enough to fill one."""
_DEEPEST = 32
_LARGEST_INTEGER = 2**63


def read_json(file: Path) -> Any:
    """A small JSON document that anybody may have written, as plain data.

    Size, values and depth are bounded before they take memory; text is Unicode, and whole numbers have 64 bits.

    Raises:
        ArtifactError: it can't be read, is no JSON, or is beyond a bound.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
    except OSError as error:
        raise ArtifactError(f"{file} can't be read: {error.strerror or error}") from error
    return parse_json(content, str(file))


def parse_json(content: bytes, what: str) -> Any:
    """The same for a document that was read already; ``what`` it is, for the error."""
    if fault := _beyond(content):
        raise ArtifactError(f"{what} {fault}: no document of lbyl")
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{what} is damaged: {error}") from error
    check_no_faults(_foreign(data), what)
    return data


def to_json(data: Any, *, indent: int | None = None) -> str:
    """Plain data as JSON that every program can read: numbers that are not finite become null."""
    try:
        return json.dumps(data, allow_nan=False, indent=indent)
    except ValueError:
        return json.dumps(_finite(data), allow_nan=False, indent=indent)


def document_text(data: Any, what: str, *, indent: int | None = None) -> str:
    """Plain data as the text of a document that :func:`read_json` reads back, NaN and infinity included.

    Raises:
        InputError: it is too large to be read back.
    """
    text = json.dumps(data, indent=indent)
    if fault := _beyond(text.encode()):
        raise InputError(f"{what} {fault}, and could not be read back; prune fewer groups")
    return text


def read_as(kind: type[Kind], data: Any, what: str) -> Kind:
    """Data as a dataclass, its fields checked against their types. Fields that the class doesn't know are ignored.

    Args:
        kind: the dataclass.
        data: what :func:`read_json` gave. (The standard library reads it, because reports may hold NaN.)
        what: what the data is, for the error.

    Raises:
        ArtifactError: a field is missing or has another type.
    """
    try:
        return msgspec.convert(data, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{what} is damaged: {error}") from error


def check_no_faults(faults: Iterable[tuple[str, str]], what: str) -> None:
    """Raise ArtifactError for the first fault: what is wrong, and where in the document."""
    for fault, place in faults:
        raise ArtifactError(f"{what} is damaged: {fault} - at `{place}`")


def _beyond(content: bytes) -> str:
    """Which bound a document is beyond; "" for none."""
    if len(content) > _LARGEST:
        return f"is larger than {_LARGEST // 2**20} MiB"
    values = sum(map(content.count, (b",", b":", b"[", b"{")))
    return f"holds more than {_MOST_VALUES:,} values" if values > _MOST_VALUES else ""


def _foreign(value: Any, place: str = "$", depth: int = 0) -> Iterator[tuple[str, str]]:
    """What no document of lbyl holds, whatever it is about."""
    if isinstance(value, str):
        if not _is_unicode(value):
            yield "text that is no Unicode", place
    elif isinstance(value, int):
        if abs(value) >= _LARGEST_INTEGER:
            yield "a whole number of more than 64 bits", place
    elif isinstance(value, (list, dict)):
        if depth == _DEEPEST:
            yield f"more than {_DEEPEST} levels", place
            return
        named = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in named:
            if isinstance(name, str) and not _is_unicode(name):
                yield "a name that is no Unicode", place
            # Most items are channels, and need no iterator of their own.
            if type(item) is not int or abs(item) >= _LARGEST_INTEGER:
                yield from _foreign(item, f"{place}.{name}" if isinstance(name, str) else f"{place}[{name}]", depth + 1)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
