"""Writes programs of ``torch.export`` to files."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import torch


def save_program(program: Any, file: Path) -> None:
    """Write a program without example inputs and stack traces, which would reveal the user's data and paths."""
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    # In memory first, because PyTorch's own file writer crashes the process when the disk is full.
    buffer = BytesIO()
    torch.export.save(program, buffer)
    file.write_bytes(buffer.getbuffer())
