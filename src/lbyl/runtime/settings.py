"""Settings objects as plain data, for plans, and as text."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def described(setting: Any) -> dict[str, Any]:
    """A settings object as plain data: its class under "name", and its fields.

    Fields with ``repr=False``, such as the user's data, are left out. Arrays are known by a digest, and other objects
    that are no plain data by their class.
    """
    fields = dataclasses.fields(setting) if dataclasses.is_dataclass(setting) else ()
    values = {field.name: getattr(setting, field.name) for field in fields if field.repr}
    return {"name": type(setting).__name__, **{key: _plain(value) for key, value in values.items()}}


def _plain(value: Any) -> Any:
    """A value of a field as data that JSON can hold."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [*map(_plain, value)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        whole = value.detach().cpu().contiguous().float().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if not whole.ndim:
            return whole.item()
        digest = hashlib.sha256(np.ascontiguousarray(whole).tobytes()).hexdigest()
        return {"name": type(value).__name__, "shape": list(whole.shape), "sha256": digest[:16]}
    return described(value)


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
