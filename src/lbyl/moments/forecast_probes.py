"""Probes for a forecast, made with other random seeds than the probes of restorers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lbyl.errors import first_line
from lbyl.moments.class_dream import Scores, count_classes, dream_classes
from lbyl.moments.dream import Dream
from lbyl.moments.input_scales import input_scales
from lbyl.moments.photographs import pictures_for, takes_photographs
from lbyl.moments.scale import InputScales
from lbyl.moments.synthesis import Maker, dead_leaves, synthesize, varied_pink
from lbyl.runtime.batch_norms import norms_cover
from lbyl.runtime.batches import FEWEST, affordable, alike, batch_size, first_rows, join, macs_per_input, split
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.memory import ROOM, give_back, held_at_once, saved_bytes
from lbyl.runtime.progress import Progress

DREAMED, PHOTOGRAPHS, SURE, PLAIN, SENTENCES = "dreamed", "photographs", "sure", "plain", "sentences"

_STEPS, _STEP, _SURENESS = 20, 0.3, 0.99
_FEWEST, _MOST = 32, 256
_FEWEST_DREAMED, _MOST_DREAMED = 8, 96
_MACS, _CEILING = 6e11, 2e12
"""Multiply-accumulates that dreaming should take, and the largest number that it may take."""
_FEWEST_PLAIN, _MOST_PLAIN = 48, 256
_PLAIN_MACS, _PLAIN_CEILING = 6e10, 4e11


@dataclass(frozen=True)
class ForecastProbes:
    """The inputs on which both networks are compared.

    Attributes:
        kind: "dreamed" (photographs or noise, optimized to match the running statistics of batch norms), "photographs"
            (crops of photographs, for color images), "sure" (noise, optimized until the network is confident that it
            belongs to a random class), "plain" (scenes and noise), "sentences" (English sentences, as tokens), or "" if
            there are none.
        batches: the probes; for "plain" one batch of scenes and one of noise, for "sure" also the noise before it was
            optimized, otherwise one batch. Optimized noise alone makes networks look better than they are, for they
            are surer of it than of real inputs.
        wanted: the random class of each input, for "sure"; otherwise None.
        why: the reason if there are no probes, else "".
    """

    kind: str = ""
    batches: tuple[ExampleInputs, ...] = ()
    wanted: Int[Tensor, " inputs"] | None = None
    why: str = ""


def forecast_probes(
    model: nn.Module,
    inputs: ExampleInputs,
    generator: torch.Generator,
    progress: Progress | None = None,
    classes: int | None = None,
    scores: Scores | None = None,
) -> ForecastProbes:
    """Make probes for a forecast: the best kind that the network runs on.

    Args:
        model: the original network in evaluation mode; nothing in it is changed.
        inputs: the example inputs, at least one of them floating-point.
        generator: a generator that is used for no other probes.
        progress: called as ``progress("dreaming", done, total)``.
        classes: the number of classes, or 0 for a network that is not a classifier; None finds out.
        scores: finds the class scores in an output, as for :func:`~lbyl.moments.class_dream.dream_classes`.
    """
    classes = count_classes(model, inputs) if classes is None else classes
    task = _Task(
        model, inputs, generator, progress, macs_per_input(model, inputs), input_scales(model, inputs), classes, scores
    )
    color = takes_photographs(inputs)
    kinds = [task.dreamed] if norms_cover(model) else []
    kinds += [task.photographs] if color else []
    kinds += [task.sure] if classes else []
    why = ""
    for kind in [*kinds, task.plain]:
        try:
            made = kind()
        except Exception as error:  # whatever somebody's code raises on inputs that it was not made for
            made = ForecastProbes(why=f"the network does not run on probes: {first_line(error)}")
        if made.batches:
            return made
        why = why or made.why
    return ForecastProbes(why=why)


@dataclass(frozen=True)
class _Task:
    """The arguments of :func:`forecast_probes`, and one method for each kind of probes.

    Attributes:
        each: multiply-accumulates of one input.
        scales: of the inputs.
    """

    model: nn.Module
    inputs: ExampleInputs
    generator: torch.Generator
    progress: Progress | None
    each: float
    scales: InputScales
    classes: int
    scores: Scores | None

    def dreamed(self) -> ForecastProbes:
        per_dream = 3 * _STEPS * self.each  # forward, and backward to the inputs
        count = affordable(per_dream, _MACS, _FEWEST_DREAMED, _MOST_DREAMED, ceiling=_CEILING)
        if per_dream * count > _CEILING:
            return self._too_many("for dreams")
        start = self._synthesized(count, self._pictures() if takes_photographs(self.inputs) else varied_pink)
        return ForecastProbes(DREAMED, (self._matched(start),))

    def photographs(self) -> ForecastProbes:
        return ForecastProbes(PHOTOGRAPHS, (self._run(self._synthesized(self._plainly(), self._pictures())),))

    def plain(self) -> ForecastProbes:
        count = self._plainly()
        made = (self._run(self._synthesized(count, make)) for make in (dead_leaves, varied_pink))
        return ForecastProbes(PLAIN, tuple(made))

    def sure(self) -> ForecastProbes:
        per_dream = 3 * (_STEPS // 2) * self.each  # half of the steps are enough, for there is an end to them
        count = affordable(per_dream, _MACS, _FEWEST, _MOST, ceiling=_CEILING)
        if count < _FEWEST:
            return self._too_many("to dream of classes")
        start = self._synthesized(count, varied_pink)
        settings = {"steps": _STEPS, "lr": _STEP, "sureness": (_SURENESS,)}
        (sure,) = dream_classes(
            self.model, start, self.inputs, self.classes, self.generator, self.progress, scores=self.scores, **settings
        )
        return ForecastProbes(SURE, (sure.inputs, start), sure.wanted)

    def _pictures(self) -> Maker:
        return pictures_for(self.model, self.inputs, self.scales)[0]

    def _plainly(self) -> int:
        return affordable(self.each, _PLAIN_MACS, _FEWEST_PLAIN, _MOST_PLAIN, ceiling=_PLAIN_CEILING)

    def _synthesized(self, count: int, make: Maker) -> ExampleInputs:
        return synthesize(self.model, self.inputs, count, make, self.generator, self.scales)

    def _run(self, batch: ExampleInputs) -> ExampleInputs:
        """The batch, after the network ran on one of its inputs."""
        first_rows(batch).call(self.model)
        return batch

    def _too_many(self, what: str) -> ForecastProbes:
        return ForecastProbes(why=f"an input takes {self.each:.1e} multiply-accumulates, too many {what}")

    def _matched(self, start: ExampleInputs) -> ExampleInputs:
        """The batch moved until batch norms see their running statistics, in parts that memory allows."""
        most = max(FEWEST, held_at_once(ROOM, saved_bytes(self.model, first_rows(start))))
        parts = split(start, alike(batch_size(start), most, FEWEST))
        moved: list[ExampleInputs] = []
        for number, part in enumerate(parts):

            def report(step: int, done: int = number * _STEPS) -> None:
                if self.progress:
                    self.progress("dreaming", done + step, _STEPS * len(parts))

            # As both networks are run on them: with running statistics.
            moved.append(Dream().match(self.model, part, _STEPS, self.scales, report, batch_statistics=False))
            give_back()
        return join(moved)
