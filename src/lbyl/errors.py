"""The errors that lbyl raises on purpose. Each message names the layer, the sizes and the way out."""

from __future__ import annotations

import sys
from pathlib import Path

_LONGEST, _END = 1500, 400


class LbylError(Exception):
    """The base class of all errors that lbyl raises on purpose.

    A message may quote an untrusted file, so control characters are escaped and its length is limited.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(visible(str(message))))


class InputError(LbylError, ValueError):
    """A setting, an input or a file that can't be used."""


class BudgetError(InputError):
    """A budget that can't be met.

    Attributes:
        reached: the share of the cost that was reached and comes nearest, or the smallest share that there is; None
            where neither is known.
    """

    def __init__(self, message: object = "", reached: float | None = None) -> None:
        super().__init__(message)
        self.reached = reached


class RestorationError(InputError):
    """A restorer does not work for this network: its probes do not run, or its moments can't be solved."""


class TraceError(LbylError):
    """``torch.export`` can't trace the model on the example inputs."""


class SurgeryError(LbylError):
    """A cut does not fit the model it is applied to."""


class VerificationError(LbylError):
    """The cut network does not compute what the masked one computes (see `lbyl.verification`)."""


class ArtifactError(LbylError):
    """A saved folder is damaged, not from lbyl, or of an unknown version."""


class ExportError(LbylError):
    """A network can't be exported, or the exported file computes something else."""


class ClusterError(LbylError):
    """Other machines can't do the work: Ray is not installed or not reached, or they lack what they need."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's class where it has none, and before a missing key.

    >>> first_line(ValueError("no such width\\nand much more")), first_line(KeyError("width"))
    ('no such width', "KeyError: 'width'")
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{type(error).__name__}: {line}" if isinstance(error, KeyError) else line


def line_of(error: BaseException | None) -> str:
    """Where in somebody's own code an exception came from, as "net.py:12"; "" if that is not known.

    It is the innermost line outside of lbyl and PyTorch.
    """
    found, trace = "", error.__traceback__ if error else None
    torch = getattr(sys.modules.get("torch"), "__file__", None)  # not imported here, which takes seconds
    homes = [Path(file).parent for file in (__file__, torch) if file]
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_file() and not any(file.is_relative_to(home) for home in homes):
            found = f"{file.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def visible(text: str) -> str:
    """The text with control characters and invisible characters escaped, except for line breaks and tabs.

    >>> visible("conv1\\x1b[2J"), visible("a\\u202eb"), visible("Größe →\\n")
    ('conv1\\\\x1b[2J', 'a\\\\u202eb', 'Größe →\\n')
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


def shortened(text: str, longest: int = _LONGEST) -> str:
    """The text, or its beginning and its end where it is longer than that.

    >>> shortened("a" * 5 + "b" * 90 + "c" * 5, 25)
    'aaaaabbbbbbbb ... bbccccc'
    """
    if len(text) <= longest:
        return text
    end = min(_END, (longest - 5) * 2 // 5 - 1)
    return f"{text[: longest - 5 - end]} ... {text[-end:]}"
