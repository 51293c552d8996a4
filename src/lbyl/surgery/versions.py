"""Versions of the plan's format: plans of earlier versions are turned into the present form when they are read.

A field that a plan may lack, with a default that means what plans without it meant, needs no new version as long as
older releases may ignore it. Everything else does: raise `VERSION`, and add the step from the one before to `_STEPS`.

- Version 1 is that of 0.1: groups, cuts, settings, architecture, source and inputs, and later scales of cuts, numbers
  of modules and layers that were replaced.
- Version 2 is that of 0.2. Numbers may also be in an object of a module (``config.num_attention_heads``), which 0.1
  can't set. `trained`, `network` and `blocks` (dropped ones) are new. Many kept channels are text in documents
  (`lbyl.surgery.packed`). `experts` of a cut came later: releases without it load such plans rightly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lbyl.errors import ArtifactError

VERSION = 2
"""The version that plans are written in."""


def _from_1(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan of 0.1 in version 2. The first ones changed no numbers of modules and replaced no layers."""
    return {"attributes": [], "folds": [], "trained": False, "network": "", "blocks": [], **plan}


_STEPS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
"""For each earlier version the function that turns a plan of it into one of the next version."""


def upgraded(data: Any) -> dict[str, Any]:
    """The plain data of a plan of any known version, in the present version. The data given is not changed.

    Raises:
        ArtifactError: it is not a plan, or its version is unknown.
    """
    if not isinstance(data, dict) or "version" not in data:
        raise ArtifactError("this is not a plan of lbyl: it has no version")
    version = data["version"]
    if type(version) is not int or not min(_STEPS) <= version <= VERSION:
        raise ArtifactError(
            f"plan version {version!r} is unknown (this lbyl reads versions {min(_STEPS)} to {VERSION}); update lbyl"
        )
    while version < VERSION:
        data, version = _STEPS[version](data), version + 1
    return {**data, "version": VERSION}
