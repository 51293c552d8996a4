"""Probes that are there already."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lbyl.moments import Probes
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress


@dataclass(frozen=True)
class Given:
    """Probes that are there already."""

    made: Probes

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """The same ones again."""
        return self.made
