"""Formats numbers and lines of text for people."""

from __future__ import annotations

from rich.text import Text

from lbyl.errors import visible

FLOAT32 = 4
"""Bytes of a parameter, for sizes in reports."""


def share(before: float, after: float) -> str:
    """The ratio ``after / before`` in percent.

    >>> share(200, 150)
    '75.0%'
    """
    return f"{after / before:.1%}" if before else "–"


def size(count: int) -> str:
    """A number of bytes as text.

    >>> size(25_600_000), size(1234)
    ('25.6 MB', '1.2 kB')
    """
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def percent(value: float | None) -> str:
    """A share in percent, or a dash for None.

    >>> percent(0.123), percent(None)
    ('12.3%', '–')
    """
    return "–" if value is None else f"{value:.1%}"


def number(value: float | None) -> str:
    """Three digits, or a dash for None.

    >>> number(0.012345), number(None)
    ('0.0123', '–')
    """
    return "–" if value is None else f"{value:.3g}"


def line(text: str) -> str:
    """The text without line breaks, and with other control characters escaped.

    >>> line("two\\n lines"), line("gone\\x1b[2K")
    ('two lines', 'gone\\\\x1b[2K')
    """
    return visible(" ".join(text.split()))


def shown(text: str) -> Text:
    """One line of untrusted text for Rich, without markup and control characters.

    >>> shown("[red]gone\\x1b[2K").plain
    '[red]gone\\\\x1b[2K'
    """
    return Text(line(text))
