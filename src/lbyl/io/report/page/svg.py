"""Converts a Matplotlib figure to an SVG inside a page, in the page's light or dark colors."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import matplotlib as mpl

from lbyl.io.report.colors import Palette
from lbyl.io.report.rows import ReportData

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIABLES = Palette(ink="#010203", line="#040506", before="#070809", after="#0a0b0c")
"""Placeholder colors, which are replaced by CSS variables, because Matplotlib can't use these."""

_DROPPED = ("metadata", "style")  # the style sheet would apply to the whole page


def inline_svg(draw: Callable[[ReportData, Palette], Figure], report: ReportData, name: str, title: str) -> str:
    """The ``svg`` element of a picture. Equal reports give equal text, regardless of the user's Matplotlib style.

    Args:
        draw: draws a report in the colors of a palette.
        report: the report to draw.
        name: a prefix for the picture's ids, which must be unique in the page.
        title: the text for screen readers.
    """
    file = io.StringIO()
    with warnings.catch_warnings(), mpl.rc_context():
        # The browser draws the text with its own font, so glyphs missing in Matplotlib's font do not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcdefaults()  # all but the backend
        mpl.rcParams["svg.fonttype"] = "none"  # the page's font, and text that can be searched
        mpl.rcParams["svg.hashsalt"] = "lbyl"  # otherwise ids differ each time
        draw(report, VARIABLES).savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in [child for child in parent if _local(child.tag) in _DROPPED]:
            parent.remove(child)
    colors = {getattr(VARIABLES, field): f"var(--{field})" for field in VARIABLES.__dataclass_fields__}
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        element.attrib = {key: _adapted(key, value, name, colors) for key, value in attributes.items()}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """The name without its namespace, as HTML requires."""
    return name.rpartition("}")[2]


def _adapted(key: str, value: str, name: str, colors: dict[str, str]) -> str:
    """An attribute's value, with the picture's prefix before ids and with the page's colors."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value.removeprefix('#')}"
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        for color, variable in colors.items():
            value = value.replace(color, variable)
    return value
