"""Where second moments come from: two small protocols, one a way of looking, one a closed form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lbyl.moments.attached_norms import LayerStatistics
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress
from lbyl.selection.filters import Filters


@dataclass(frozen=True)
class Probes:
    """Inputs to look at the network with.

    Attributes:
        batches: what moments are collected on.
        held_out: a batch that no solve sees; reconstruction errors are measured on it. See ``holds_out``.
        batch_statistics: batch norms normalize with the probes' own statistics while moments are collected, so
            that every channel has its trained mean and spread whatever the probes look like.
        recalibration_batches: indices of the batches that batch norms are recalibrated on, those with a structure
            like real inputs'; empty for all.
        evaluation_batches: indices of the batches that the held-out ones are like: outputs are compared in the
            statistics that batch norms see there; empty for all.
        matches_training_statistics: whether batch norms see in the other batches what they saw in training. Real
            inputs and dreams do.
        note: what the user should know ("" as a rule).
        statistics: mean and variance of the outputs of layers that no batch norm follows, by the layers' names, as
            they were measured on the probes.
        holds_out: False where there were too few inputs, and ``held_out`` was solved on as well.
    """

    batches: tuple[ExampleInputs, ...]
    held_out: ExampleInputs
    batch_statistics: bool
    note: str = ""
    recalibration_batches: tuple[int, ...] = ()
    matches_training_statistics: bool = False
    evaluation_batches: tuple[int, ...] = ()
    statistics: LayerStatistics = field(default_factory=dict)
    holds_out: bool = True

    def __post_init__(self) -> None:
        if any(batch is self.held_out for batch in self.batches):
            object.__setattr__(self, "holds_out", False)


@runtime_checkable
class ProbeSource(Protocol):
    """Makes inputs; moments are then read off the running network."""

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """Probes for a model that is called like ``inputs``."""
        ...


def is_lifelike(source: object, inputs: ExampleInputs) -> bool:
    """Whether the probes of a source are like real inputs; those of a user's own source are taken to be."""
    asked = getattr(source, "lifelike", None)
    return bool(asked(inputs)) if callable(asked) else True


@dataclass(frozen=True)
class ChannelMoments:
    """Mean and covariance of the channels that a group's consumers see."""

    mean: Float[Tensor, " channels"]
    covariance: Float[Tensor, "channels channels"]


@runtime_checkable
class ClosedFormSource(Protocol):
    """Gives moments from the weights alone, without running the network."""

    def moments(self, filters: Filters, kernel: tuple[int, ...], activation: str | None) -> ChannelMoments:
        """Moments of a group's channels after ``activation``; ``kernel`` is the producers' spatial shape."""
        ...
