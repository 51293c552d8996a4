"""Programs of ``torch.export`` as files."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import torch


def save_program(program: Any, file: Path) -> None:
    """Write a program without example inputs and stack traces: both would give away what is on this machine."""
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    # In memory first: when the disk is full, PyTorch's own writer of files crashes the process.
    buffer = BytesIO()
    torch.export.save(program, buffer)
    file.write_bytes(buffer.getbuffer())
