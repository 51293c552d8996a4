"""Compresses the decoder layers of a language model one after the other, wherever their weights are."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol

from torch import Tensor, nn

from lbyl.budget.budget import Budget
from lbyl.errors import InputError
from lbyl.moments.data import Data
from lbyl.pipeline.compress import compress
from lbyl.pipeline.layerwise.layers import LayerNetwork, Skeleton, pattern_names
from lbyl.pipeline.layerwise.probes import Streams
from lbyl.pipeline.layerwise.whole import ratio_for_budget, within
from lbyl.pipeline.layerwise.work import Done
from lbyl.restore.least_squares.restorer import LeastSquares
from lbyl.runtime.checks import check_seed, check_switch, named_kind
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.memory import give_back
from lbyl.runtime.progress import Progress
from lbyl.selection.criteria.base import Criterion, SeeingCriterion
from lbyl.selection.select import Ratio, checked_ratio


@dataclass(frozen=True)
class LayerSettings:
    """The settings of all layers; a ratio may have patterns."""

    ratio: Ratio
    criterion: str | Criterion | SeeingCriterion
    restore: LeastSquares
    seed: int
    verify: bool


class Weights(Protocol):
    """Where the weights of the model are read, and where those of the smaller one go."""

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors by their names in the whole model, in the type that all of them get."""
        ...

    def rest(self) -> list[str]:
        """The names of last norm and output layer."""
        ...

    def finished(self, index: int, original: LayerNetwork) -> tuple[nn.Module, Done] | None:
        """The smaller network of a layer that an earlier run finished."""
        ...

    def keep(self, index: int, cut: nn.Module, done: Done) -> None:
        """Take the weights of a smaller layer."""
        ...

    def keep_whole(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Take weights that stay as they are: before the first layer (index -1), or after the last one."""
        ...


@dataclass(frozen=True)
class LayerwiseRun:
    """One run over all layers.

    Attributes:
        skeleton: the model without weights.
        weights: where its weights are.
        settings: what is done to each layer.
        progress: called as ``progress(stage, done, total)`` for each layer.
    """

    skeleton: Skeleton
    weights: Weights
    settings: LayerSettings
    progress: Progress | None

    def all_layers(self, batches: Sequence[ExampleInputs]) -> tuple[list[Done], str]:
        """Compress what is not finished yet.

        Returns:
            What was done to each layer, and a note about the held-out batch.
        """
        embedding = self.weights.read(self.skeleton.embedding)
        streams = Streams.start(self.skeleton.embedded(list(batches), embedding))
        self.weights.keep_whole(-1, embedding)
        del embedding
        give_back()
        found, started, solved = list[Done](), time.perf_counter(), 0
        for index in range(self.skeleton.count):
            self._report(index, time.perf_counter() - started, solved)
            streams, done, known = self._layer(index, streams)
            solved += not known
            found.append(done)
            gc.collect()  # a traced layer refers to itself, and would keep its weights in memory
            give_back()
        rest = self.weights.read(self.weights.rest())
        self.weights.keep_whole(self.skeleton.count, rest)
        head = rest if "lm_head.weight" in rest else {**rest, **self.weights.read(self.skeleton.embedding)}
        error, same = streams.compared(self.skeleton.head(head))
        return found, (
            f"on the held-out batch, {same:.1%} of the most likely next tokens are the original's; relative error "
            f"{error:.3g} after the last norm"
        )

    def _report(self, index: int, seconds: float, solved: int) -> None:
        """Say which layer is next, and how long the rest takes if each layer takes as long as those before."""
        if self.progress:
            count = self.skeleton.count
            left = f", {_spoken(seconds / solved * (count - index))} left" if solved else ""
            self.progress(f"layer {index + 1} of {count}{left}", index, count)

    def _layer(self, index: int, streams: Streams) -> tuple[Streams, Done, bool]:
        """Compress a layer, unless it is finished, and run both versions of it; whether it was finished comes last."""
        original = self.skeleton.layer(index, self.weights.read(self.skeleton.names(index)))
        known = self.weights.finished(index, original)
        cut, done = known or self._compressed(index, original, streams)
        streams = streams.after(original, cut)  # before the weights of the original may be changed
        if known is None:
            self.weights.keep(index, cut, done)
        return streams, done, known is not None

    def _compressed(self, index: int, original: LayerNetwork, streams: Streams) -> tuple[nn.Module, Done]:
        """The smaller network of a layer."""
        ratio = within(self.settings.ratio, self.skeleton.layer_names(index))
        if not ratio:
            return original, Done(None, None)
        batches = streams.original
        result = compress(
            original,
            batches[0].map(lambda tensor: tensor[:1]),
            ratio=ratio,
            criterion=self.settings.criterion,
            restore=replace(self.settings.restore, moments=Data(batches, len(batches))),
            seed=self.settings.seed,
            verify=self.settings.verify,
            forecast=False,
        )
        return result.model, Done(result.plan, result.report)


def check_settings(restore: LeastSquares | None, seed: int, verify: bool, progress: Progress | None) -> None:
    """Raise InputError for settings that can't be used."""
    if restore is not None and not isinstance(restore, LeastSquares):
        raise InputError(f"restore is {named_kind(restore)}; pass lbyl.LeastSquares(...), or None for the defaults")
    check_seed(seed)
    check_switch("verify={}", verify)
    if progress is not None and not callable(progress):
        raise InputError(f"progress is {named_kind(progress)}; pass a function of stage, done and total")


def shares(skeleton: Skeleton, ratio: Ratio | None, budget: Budget | None) -> tuple[Ratio, tuple[str, ...]]:
    """The ratio of every layer, and a note on how it follows from a budget.

    Raises:
        InputError: neither or both are given, or nothing would be dropped.
        BudgetError: the budget can't be kept.
    """
    if (ratio is None) == (budget is None):
        raise InputError("give either a ratio or a budget")
    if budget is not None:
        return ratio_for_budget(skeleton, budget)
    assert ratio is not None
    ratio = checked_ratio(ratio)
    known = pattern_names(skeleton.model)
    for pattern in ratio if isinstance(ratio, Mapping) else ():
        if not any(fnmatchcase(name, pattern) for name in known):
            raise InputError(f"ratio: {pattern!r} matches no layer of the model")
    if not any(ratio.values() if isinstance(ratio, Mapping) else [ratio]):
        raise InputError("ratio: nothing is dropped at ratio 0")
    if not any(within(ratio, skeleton.layer_names(index)) for index in range(skeleton.count)):
        raise InputError("ratio: its patterns drop nothing in the decoder layers, and only these lose channels")
    return ratio, ()


def _spoken(seconds: float) -> str:
    """An estimated time."""
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
