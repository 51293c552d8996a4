"""Adapts the command line to the terminal: widths, encodings, closed streams and signals."""

from __future__ import annotations

import codecs
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TextIO

_NARROWEST = 40
_WIDE = 160
"""Width of piped output, which has no terminal that would limit it."""

_ASCII = {"→": "->", "±": "+-", "–": "-", "µ": "u", "×": "x", "…": "...", "’": "'"}
INTERRUPTED = 130


def width() -> int | None:
    """The width of output; None if the terminal determines it."""
    asked = _columns()
    if asked is not None:
        return asked
    return None if is_terminal(sys.stdout) and not os.environ.get("COLUMNS") else _WIDE


def _columns() -> int | None:
    """The width that the environment asks for; None if it asks for none that can be used."""
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdigit() and int(columns) >= _NARROWEST else None


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; False for files, pipes and closed streams."""
    return stream is not None and not stream.closed and stream.isatty()


class _Ended(BaseException):
    """Raised by a signal that ends the process. It is not an Exception, so that only cleanup code handles it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number)
        self.number = number


def run(command: Callable[[], Any]) -> NoReturn:
    """Run a command and exit. Interruptions and streams that can't be written give one line and no traceback."""
    _prepare_streams()
    if width() == _WIDE != _columns():
        os.environ.pop("COLUMNS", None)  # Rich and Typer would take a width of 0 for one
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with suppress(ValueError):  # not in the main thread
                signal.signal(number, _end)
    code: Any = 0
    lost: list[Exception] = []
    try:
        command()
    except SystemExit as end:
        code = end.code
    except _Ended as end:
        code = 128 + end.number
        _say(f"ended by {end.number.name}")
    except KeyboardInterrupt:
        code = INTERRUPTED
        _say("interrupted")
    except OSError as error:
        lost.append(error)
    lost += _flushed(sys.stdout)
    code = 1 if lost else code
    lost += _flushed(sys.stderr)
    if lost and not isinstance(lost[0], BrokenPipeError):  # the reader has closed the pipe, which is not an error
        _say(f"error: can't write the output: {getattr(lost[0], 'strerror', None) or lost[0]}")
    sys.exit(code or bool(lost))


def _end(number: int, frame: Any) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    raise _Ended(signal.Signals(number))


def _flushed(stream: TextIO | None) -> list[Exception]:
    """Flush a stream. Returns the error if that fails, and then keeps Python from trying again when it exits."""
    if stream is None:
        return []
    try:
        stream.flush()
        return []
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return [error]


def _say(line: str) -> None:
    with suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)


def _prepare_streams() -> None:
    """Write characters that an encoding lacks in ASCII, so that output does not fail after the work is done."""

    def replaced(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        found = error.object[error.start : error.end]
        return "".join(_ASCII.get(c, c.encode("unicode_escape").decode()) for c in found), error.end

    codecs.register_error("lbyl", replaced)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="lbyl")
