"""The errors that lbyl raises on purpose. Each message names the layer, the sizes and the way out."""

from __future__ import annotations


class LbylError(Exception):
    """Base class: catch this one to catch whatever lbyl raises on purpose."""


class InputError(LbylError, ValueError):
    """A setting, an input or a file that can't be used."""


class RestorationError(InputError):
    """A restorer can't do its work on this network: its probes do not run, or its moments can't be solved with."""


class TraceError(LbylError):
    """``torch.export`` can't trace the model on the example inputs."""


class SurgeryError(LbylError):
    """A cut does not fit the model it is applied to."""


class VerificationError(LbylError):
    """The cut network does not compute what the masked one computes (see `lbyl.verification`)."""


class ArtifactError(LbylError):
    """A saved folder is damaged, foreign, or of an unknown version."""


class ExportError(LbylError):
    """A network can't be exported, or the exported file computes something else."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's class where it has none.

    >>> first_line(ValueError("no such width\\nand much more"))
    'no such width'
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
