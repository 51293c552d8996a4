"""A Matplotlib figure as SVG that stands inside a page and takes the page's colors, light or dark."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import matplotlib as mpl

from lbyl.io.report.page.pictures import Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lbyl.io.report.report import Report

VARIABLES = Palette(ink="#010203", line="#040506", before="#070809", after="#0a0b0c")
"""Colors that stand for CSS variables of the same names: Matplotlib can't be given these."""

_DROPPED = ("metadata", "style")  # the style sheet would rule the whole page


def inline_svg(draw: Callable[[Report, Palette], Figure], report: Report, name: str, title: str) -> str:
    """The ``svg`` element of a picture. Equal reports give equal text, whatever style the user has chosen.

    Args:
        draw: makes the figure of a report in the colors of a palette.
        report: what to draw.
        name: tells the ids of this picture from those of the page's others.
        title: what a screen reader says.
    """
    file = io.StringIO()
    with warnings.catch_warnings(), mpl.rc_context():
        # The browser draws the text, in a font that may know the letters which Matplotlib's does not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcdefaults()  # all but the backend
        mpl.rcParams["svg.fonttype"] = "none"  # the page's own font, and text that can be searched
        mpl.rcParams["svg.hashsalt"] = "lbyl"  # or equal figures would have other ids every time
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
    """HTML knows SVG without namespaces."""
    return name.rpartition("}")[2]


def _adapted(key: str, value: str, name: str, colors: dict[str, str]) -> str:
    """An attribute with ids of this picture's own and the page's colors."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value.removeprefix('#')}"
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        for color, variable in colors.items():
            value = value.replace(color, variable)
    return value
