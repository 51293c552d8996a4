"""Reads JSON documents into dataclasses and writes them; errors name the place inside the document."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lbyl.errors import ArtifactError, InputError

Kind = TypeVar("Kind")

LARGEST = 8 * 2**20
"""Bytes that a document may have."""
_MOST_VALUES = 1_000_000
"""Larger than the plan of any real network, and small enough to fit into memory."""
_DEEPEST = 32
_LARGEST_INTEGER = 2**63


def read_json(file: Path, times: int = 1) -> Any:
    """Read a JSON document from an untrusted source as plain data.

    Size, number of values and depth are limited. Text must be valid Unicode, and whole numbers must fit into 64 bits.

    Args:
        file: the document.
        times: how many times as large as a document of lbyl it may be; for documents of other programs.

    Raises:
        ArtifactError: it can't be read, is not JSON, or exceeds a limit.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(times * LARGEST + 1)
    except OSError as error:
        raise ArtifactError(f"{file} can't be read: {error.strerror or error}") from error
    return parse_json(content, str(file), times)


def parse_json(content: bytes, what: str, times: int = 1) -> Any:
    """Parse the content of a JSON document, as :func:`read_json` does; ``what`` names the document in errors."""
    if fault := _beyond(content, times):
        raise ArtifactError(
            f"{what} {fault}; " + ("lbyl did not write it" if times == 1 else "lbyl reads no such file")
        )
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{what} is damaged: {error}") from error
    check_no_faults(_foreign(data), what)
    return data


def to_json(data: Any, *, indent: int | None = None) -> str:
    """Plain data as JSON that every program can read; NaN and infinity become null."""
    try:
        return json.dumps(data, allow_nan=False, indent=indent)
    except ValueError:
        return json.dumps(_finite(data), allow_nan=False, indent=indent)


def document_text(data: Any, what: str, *, indent: int | None = None) -> str:
    """Plain data as the text of a document that :func:`read_json` reads back, NaN and infinity included.

    Raises:
        InputError: the document would be too large to be read back.
    """
    text = json.dumps(data, indent=indent)
    if fault := _beyond(text.encode()):
        raise InputError(f"{what} {fault} and could not be read back; prune fewer groups")
    return text


def read_as(kind: type[Kind], data: Any, what: str) -> Kind:
    """Convert data to a dataclass and check its fields against their types. Unknown fields are ignored.

    Args:
        kind: the dataclass.
        data: the result of :func:`read_json`, which uses the standard library because reports may hold NaN.
        what: name of the document, for errors.

    Raises:
        ArtifactError: a field is missing or has another type.
    """
    try:
        return msgspec.convert(data, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{what} is damaged: {error}") from error


def check_no_faults(faults: Iterable[tuple[str, str]], what: str) -> None:
    """Raise ArtifactError for the first of these (fault, place in the document), if there is one."""
    for fault, place in faults:
        raise ArtifactError(f"{what} is damaged: {fault} - at `{place}`")


def _beyond(content: bytes, times: int = 1) -> str:
    """The limit that a document exceeds, as text; "" for none."""
    if len(content) > times * LARGEST:
        return f"is larger than {times * LARGEST // 2**20} MiB"
    values, most = sum(map(content.count, (b",", b":", b"[", b"{"))), times * _MOST_VALUES
    return f"holds more than {most:,} values" if values > most else ""


def _foreign(value: Any, place: str = "$", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Values that no document may hold, each with its place."""
    if isinstance(value, str):
        if not _is_unicode(value):
            yield "text that is not valid Unicode", place
    elif isinstance(value, int):
        if abs(value) >= _LARGEST_INTEGER:
            yield "a whole number of more than 64 bits", place
    elif isinstance(value, (list, dict)):
        if depth == _DEEPEST:
            yield f"more than {_DEEPEST} nested levels", place
            return
        named = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in named:
            if isinstance(name, str) and not _is_unicode(name):
                yield "a name that is not valid Unicode", place
            # Most items are small integers (channels); checking them here is faster than a generator for each.
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
