"""Noise probes: synthetic images of pink noise, with batch norms in batch statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lbyl.moments.base import Probes
from lbyl.moments.input_scales import input_scales
from lbyl.moments.synthesis import synthesize, varied_pink
from lbyl.runtime.batches import affordable, held_out_size, macs_per_input, split
from lbyl.runtime.checks import check_number
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress


@dataclass(frozen=True)
class Noise:
    """Pink (1 / f) noise of varied contrast; batch norms normalize with the probes' own statistics.

    So every channel has its trained mean beta and deviation gamma, whatever the images are, and the noise determines
    only correlations. Token ids are drawn at random.

    Attributes:
        images: number of probes on which moments are collected; a quarter more is held out. None chooses as many as
            1e10 multiply-accumulates allow, between 64 and 4096; fewer than 64 only if one takes more than 6e9.
        spectrum: the mean exponent of 1 / f; natural images have about 1.
    """

    images: int | None = None
    spectrum: float = 1.0

    def __post_init__(self) -> None:
        check_number("Noise(images={})", self.images, whole=True, least=2, optional=True)
        check_number("Noise(spectrum={})", self.spectrum)

    def lifelike(self, inputs: ExampleInputs) -> bool:
        """Whether its probes are like real inputs."""
        return False

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """Synthetic inputs of the example's shapes."""
        count = self.images or affordable(macs_per_input(model, inputs), 1e10, 64, 4096, ceiling=4e11)
        held = held_out_size(count)
        scales = input_scales(model, inputs)

        def make(shape: Sequence[int], generator: torch.Generator) -> Tensor:
            made = varied_pink(shape, generator, self.spectrum)
            # Clipped to bounds, strong contrasts have edges and flat regions, as real inputs do. Features of scales of
            # their own have no bounds.
            return made if all(scale.usual or len(scale.deviation) > 1 for scale in scales.scales) else 2 * made

        made = synthesize(model, inputs, count + held, make, generator, scales)
        train, test = split(made, [count, held])
        return Probes((train,), test, batch_statistics=True, note=scales.note)
