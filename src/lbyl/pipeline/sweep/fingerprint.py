"""The fingerprint of a sweep's network and settings: runs with equal fingerprints may share their work."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lbyl.errors import InputError
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.sweep.cache import digest
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.settings import described, printed
from lbyl.runtime.version import library_version

_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+")
"""Addresses in memory, which differ between processes."""


def fingerprint(
    model: nn.Module, inputs: ExampleInputs, request: CompressionRequest, submodule: str | None
) -> dict[str, str | int | bool | None]:
    """Everything that results depend on, except the budgets, as plain data.

    Of the network's code this is what its modules print: what else ``forward`` does is taken to be the same.
    """
    restorer = request.restorer(model, inputs)[0]
    state, others = tensors_of(model), pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
    return {
        "lbyl": library_version(),
        "modules": hashlib.sha256(_ADDRESS.sub("", repr(model)).encode()).hexdigest(),
        "weights": digest(state[name] for name in sorted(state)),
        "inputs": digest(inputs.tensors()),
        "other inputs": json.dumps([repr(leaf) for leaf in others if not isinstance(leaf, Tensor)]),
        "scope": request.scope,
        "criterion": _printed(request.scoring(model, inputs, restorer)[0]),
        "restore": _printed(restorer.settings),
        "seed": request.seed,
        "verify": request.verify,
        "strict": request.strict,
        "submodule": submodule,
    }


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], place: str, what: str = "another sweep") -> None:
    """Raise InputError, saying what differs, unless the fingerprints are equal."""
    differing = [name for name in now if then.get(name) != now[name]]
    if not differing:
        return
    told = "; ".join(
        f"{name} differ" if len(str(now[name])) == 64 else f"{name} was {then.get(name)}, now it is {now[name]}"
        for name in differing
    )
    raise InputError(f"{place} holds {what}: {told}. Use the same network and settings, or write to another folder")


def _printed(setting: Any) -> str:
    """A settings object as Python code, without parts that differ between processes."""

    def plain(value: Any) -> str:
        same = value is None or isinstance(value, (str, int, float, tuple, list))
        return repr(value) if same else type(value).__name__

    return printed(described(setting), plain)
