"""Escapes untrusted text for Markdown."""

from __future__ import annotations

import re

from lbyl.io.report.format import line


def plain_words(text: str) -> str:
    """One line of text in which all Markdown is escaped.

    >>> plain_words("layer1.0 [see](https://evil.example) <img>")
    'layer1.0 \\\\[see\\\\](https://evil.example) \\\\<img\\\\>'
    """
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", line(text))


def code_span(text: str, cell: bool = False) -> str:
    """One line of text as a code span, even if it contains backticks; in a table's cell, bars are escaped."""
    shown = line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    shown = f"{fence}{space}{shown}{space}{fence}"
    return shown.replace("|", r"\|") if cell else shown
