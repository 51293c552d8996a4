"""The two kinds of moment sources: probes that are run through the network, and closed forms of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lbyl.moments.attached_norms import LayerStatistics
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress
from lbyl.selection.filters import Filters


@dataclass(frozen=True)
class Beyond:
    """Batches that only sums are taken over, on the machines of a cluster; they are never all in memory.

    Attributes:
        batches: the user's batches, or references to them in Ray's object store. They can be read once.
        cluster: the address of the cluster.
        inputs: the example inputs, which each batch must be like.
        first: the number of the first of these batches in the user's data.
    """

    batches: Iterator[Any]
    cluster: str
    inputs: ExampleInputs
    first: int


@dataclass(frozen=True)
class Probes:
    """Inputs on which moments and errors are measured.

    Attributes:
        batches: the batches on which moments are collected.
        held_out: a batch that is not used for solving; reconstruction errors are measured on it. See ``holds_out``.
        batch_statistics: whether batch norms normalize with the probes' own statistics while moments are collected.
            Every channel then has its trained mean and deviation, whatever the probes look like.
        recalibration_batches: indices of the batches on which batch norms are recalibrated, those with a structure
            like that of real inputs; empty for all.
        evaluation_batches: indices of the batches that resemble the held-out batch. Outputs are compared with the
            statistics that batch norms have on these batches; empty for all.
        matches_training_statistics: whether batch norms see about the same statistics on ``batches`` as in training.
            Real inputs and dreams do.
        note: what the user should know; usually "".
        statistics: mean and variance of the outputs of layers without a batch norm, by layer name, as measured on
            the probes.
        holds_out: False if there were too few inputs, so that ``held_out`` is used for solving as well.
        beyond: more batches for sums over the inputs of consumers; None for none.
        kinds: how many of the held-out inputs are of each kind, in their order, if there are several that are unlike
            real inputs in different ways. Restoration that hurts on one of them is not trusted.
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
    beyond: Beyond | None = None
    kinds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(batch is self.held_out for batch in self.batches):
            object.__setattr__(self, "holds_out", False)


@runtime_checkable
class ProbeSource(Protocol):
    """A source that makes inputs. Moments are then measured while the network runs on them."""

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """Make probes.

        Args:
            model: the network in evaluation mode; nothing in it may be changed.
            inputs: the example inputs; probes have their structure.
            generator: the source of all random numbers.
            progress: called as ``progress(stage, done, total)``; may be None.
        """
        ...


def is_lifelike(source: object, inputs: ExampleInputs) -> bool:
    """Whether the probes of a source are like real inputs, which is assumed for a user's own source."""
    asked = getattr(source, "lifelike", None)
    return bool(asked(inputs)) if callable(asked) else True


@dataclass(frozen=True)
class ChannelMoments:
    """Mean and covariance of a group's channels at the input of its consumers."""

    mean: Float[Tensor, " channels"]
    covariance: Float[Tensor, "channels channels"]


@runtime_checkable
class ClosedFormSource(Protocol):
    """A source that computes moments from the weights alone, without running the network."""

    def moments(self, filters: Filters, kernel: tuple[int, ...], activation: str | None) -> ChannelMoments:
        """Moments of a group's channels after ``activation``; ``kernel`` is the producers' spatial shape."""
        ...
