"""The format pt2, the files of ``torch.export``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lbyl.io.export.base import Run, TracedProgram
from lbyl.io.programs import save_program
from lbyl.runtime.inputs import ExampleInputs, output_tensors


class Pt2Format:
    """Files for ``torch.export.load``."""

    name = "pt2"
    runtime = "torch.export.load"

    def check_available(self) -> None:
        """Do nothing, because only PyTorch is needed."""

    def write(self, traced: TracedProgram, file: Path) -> None:
        """Write the program."""
        save_program(traced.program, file)

    def open(self, file: Path) -> Run:
        """Load the program."""
        module = torch.export.load(file).module()

        def run(inputs: ExampleInputs) -> list[Tensor]:
            with torch.no_grad():
                return output_tensors(inputs.cloned().call(module))

        return run
