"""Files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from lbyl.errors import InputError

TEMPORARY = ".tmp-"
"""How names of unfinished files begin."""


def write_whole(file: Path, content: str | bytes) -> None:
    """Write beside the file, then rename.

    Raises:
        InputError: it can't be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"can't write {file}: {error.strerror or error}") from error


def write_tensors(file: Path, tensors: Mapping[str, Tensor], note: str) -> None:
    """Tensors as safetensors, with a note of text (JSON, say) in the same file.

    Raises:
        InputError: it can't be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(file, save(plain, {"lbyl": note}))
