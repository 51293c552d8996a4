"""What the command line makes of the terminal that it finds: widths, encodings, closed streams and signals."""

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
"""Output that is piped must not be cut at the width of a terminal that nobody sees."""

_ASCII = {"→": "->", "±": "+-", "–": "-", "µ": "u", "×": "x", "…": "...", "’": "'"}
INTERRUPTED = 130


def width() -> int | None:
    """How wide output may be; None where the terminal says so itself."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) >= _NARROWEST:
        return int(columns)
    return None if is_terminal(sys.stdout) and not columns else _WIDE


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody sees what is written: False for files, pipes and closed streams."""
    return stream is not None and not stream.closed and stream.isatty()


class _Ended(BaseException):
    """The process was told to end. Nobody's code catches this, and unfinished files are removed on the way out."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number)
        self.number = number


def run(command: Callable[[], Any]) -> NoReturn:
    """Run a command line to its end: an interruption or a stream that can't be written is one line, no traceback."""
    _prepare_streams()
    if width() == _WIDE:
        os.environ.pop("COLUMNS", None)  # Rich and Typer would take a width of 0 for one
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with suppress(ValueError):  # not in the main thread
                signal.signal(number, _end)
    code: Any = 0
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
        code = _unwritable(error)
    code = _flushed(sys.stdout) or code
    code = code or _flushed(sys.stderr)
    sys.exit(code)


def _end(number: int, frame: Any) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    raise _Ended(signal.Signals(number))


def _flushed(stream: TextIO | None) -> int:
    """Write what is still waiting. Gives 1 where that can't be done, after which Python won't try again at its end."""
    if stream is None:
        return 0
    try:
        stream.flush()
        return 0
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return _unwritable(error)


def _unwritable(error: Exception) -> int:
    if not isinstance(error, BrokenPipeError):  # whoever reads has seen enough
        _say(f"error: can't write the output: {getattr(error, 'strerror', None) or error}")
    return 1


def _say(line: str) -> None:
    with suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)


def _prepare_streams() -> None:
    """What an encoding lacks is written in ASCII instead of failing after the work is done."""

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
