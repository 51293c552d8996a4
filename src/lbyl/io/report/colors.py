"""The colors of reports and pictures.

The page and its style sheet refer to them as CSS variables: ``ink`` for text, ``muted`` for secondary text, ``line``
for rules, ``panel`` and ``ground`` for backgrounds, ``before`` and ``after`` for values before and after pruning, and
``good``, ``fair`` and ``bad`` for the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NOTEBOOK: Mapping[str, str] = {
    "ink": "currentColor",
    "muted": "#808890",
    "line": "#80889055",
    "panel": "#80889014",
    "before": "#9aa5b1",
    "after": "#2b7fb8",
    "good": "#2e9e5b",
    "fair": "#c58a12",
    "bad": "#d2483c",
}
"""Colors of medium lightness, because a notebook may be light or dark."""

LIGHT: Mapping[str, str] = {
    "ink": "#1c2126",
    "muted": "#5c6670",
    "line": "#d9dee3",
    "panel": "#f6f8f9",
    "before": "#c2cad2",
    "after": "#1b6e9e",
    "good": "#1f8a4c",
    "fair": "#b7791f",
    "bad": "#c0392b",
}
LIGHT_GROUND = "#ffffff"

DARK: Mapping[str, str] = {
    "ink": "#e4e8eb",
    "muted": "#98a3ad",
    "line": "#2f373f",
    "panel": "#1b2126",
    "before": "#55606b",
    "after": "#5db0e0",
    "good": "#4cb87a",
    "fair": "#d9a441",
    "bad": "#ee7b6e",
}
DARK_GROUND = "#14181c"


@dataclass(frozen=True)
class Palette:
    """The colors that a picture is drawn in."""

    ink: str
    line: str
    before: str
    after: str


PLAIN = Palette(ink="#808080", line="#80808066", before=NOTEBOOK["before"], after=NOTEBOOK["after"])
"""Colors for separate picture files, of medium lightness, visible on white and on black."""
