"""Settings objects as plain data, for plans, and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def described(setting: Any) -> dict[str, Any]:
    """A settings object as plain data: its class under "name", and its fields.

    Fields with ``repr=False``, such as the user's data, are left out.
    """
    fields = dataclasses.fields(setting) if dataclasses.is_dataclass(setting) else ()
    values = {field.name: getattr(setting, field.name) for field in fields if field.repr}
    plain = {key: described(v) if dataclasses.is_dataclass(v) else v for key, v in values.items()}
    return {"name": type(setting).__name__, **plain}


def as_call(name: str, fields: Sequence[str]) -> str:
    """Python code of the call that makes a settings object, from its name and its fields as ``key=value``."""
    return f"{name}({', '.join(fields)})"


def printed(
    setting: Any, value: Callable[[Any], str] = repr, call: Callable[[str, Sequence[str]], str] = as_call
) -> str:
    """The result of :func:`described` as Python code.

    Args:
        setting: a description, or a plain value.
        value: turns a plain value into text.
        call: turns a name and the fields' texts into the text of a call.

    >>> printed({"name": "LBYL", "ridge": 0.5, "prior": {"name": "Noise", "images": None}})
    'LBYL(ridge=0.5, prior=Noise(images=None))'
    """
    if not isinstance(setting, Mapping) or not isinstance(setting.get("name"), str):
        return value(setting)
    fields = [f"{key}={printed(item, value, call)}" for key, item in setting.items() if key != "name"]
    return call(setting["name"], fields)
