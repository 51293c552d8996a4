"""A Matplotlib figure as SVG inside a page. It takes the page's colors, light or dark."""

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
"""Placeholders for the CSS variables of these names, which Matplotlib can't take."""

_DROPPED = ("metadata", "style")  # this style sheet would apply to the whole page


def inline_svg(draw: Callable[[ReportData, Palette], Figure], report: ReportData, name: str, title: str) -> str:
    """The ``svg`` element of a picture. Equal reports give equal text, whatever Matplotlib style the user has set.

    Args:
        draw: draws a report in the colors of a palette.
        report: what to draw.
        name: a prefix for this picture's ids, which must be unique in the page.
        title: the text for screen readers.
    """
    file = io.StringIO()
    with warnings.catch_warnings(), mpl.rc_context():
        # The browser draws the text, and its font may have letters that Matplotlib's font lacks.
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
    """The name without its namespace, as HTML takes it."""
    return name.rpartition("}")[2]


def _adapted(key: str, value: str, name: str, colors: dict[str, str]) -> str:
    """An attribute in which ids have this picture's prefix and colors are the page's."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value.removeprefix('#')}"
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        for color, variable in colors.items():
            value = value.replace(color, variable)
    return value
