"""Probes for a forecast, made with other random seeds than the probes of restorers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lbyl.moments.class_dream import Scores, count_classes, dream_classes
from lbyl.moments.dream import Dream
from lbyl.moments.input_scales import input_scales
from lbyl.moments.photographs import photographs, takes_photographs
from lbyl.moments.scale import InputScales
from lbyl.moments.synthesis import dead_leaves, synthesize, varied_pink
from lbyl.runtime.batch_norms import norms_cover
from lbyl.runtime.batches import FEWEST, affordable, alike, batch_size, first_rows, join, macs_per_input, split
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.memory import ROOM, give_back, held_at_once, saved_bytes
from lbyl.runtime.progress import Progress

DREAMED, PHOTOGRAPHS, SURE, PLAIN = "dreamed", "photographs", "sure", "plain"

_STEPS, _STEP, _SURENESS = 20, 0.3, 0.99
_FEWEST, _MOST = 32, 256
_FEWEST_DREAMED, _MOST_DREAMED = 8, 96
_MACS, _CEILING = 6e11, 5e12
"""Multiply-accumulates that dreaming should take, and the largest number that it may take."""
_FEWEST_PLAIN, _MOST_PLAIN = 48, 256
_PLAIN_MACS, _PLAIN_CEILING = 6e10, 4e11


@dataclass(frozen=True)
class ForecastProbes:
    """The inputs on which both networks are compared.

    Attributes:
        kind: "dreamed" (photographs or noise, optimized to match the running statistics of batch norms), "photographs"
            (crops of photographs, for color images), "sure" (noise, optimized until the network is confident that it
            belongs to a random class), "plain" (scenes and noise), or "" if there are none.
        batches: the probes; for "plain" one batch of scenes and one of noise, otherwise one batch.
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
    """Make probes for a forecast.

    Args:
        model: the original network in evaluation mode; nothing in it is changed.
        inputs: the example inputs, at least one of them floating-point.
        generator: a generator that is used for no other probes.
        progress: called as ``progress("dreaming", done, total)``.
        classes: the number of classes, or 0 for a network that is not a classifier; None finds out.
        scores: finds the class scores in an output, as for :func:`~lbyl.moments.class_dream.dream_classes`.
    """
    each, scales = macs_per_input(model, inputs), input_scales(model, inputs)
    # A step is a forward and a backward pass, and dreaming of classes usually ends after half of the steps.
    half = 3 * (_STEPS // 2) * each
    color = takes_photographs(inputs)
    if norms_cover(model):
        count = affordable(2 * half, _MACS, _FEWEST_DREAMED, _MOST_DREAMED, ceiling=_CEILING)
        if 2 * half * count <= _CEILING:
            start = synthesize(model, inputs, count, photographs if color else varied_pink, generator, scales)
            return ForecastProbes(DREAMED, (_matched(model, start, scales, progress),))
    count = affordable(each, _PLAIN_MACS, _FEWEST_PLAIN, _MOST_PLAIN, ceiling=_PLAIN_CEILING)
    if color:
        return ForecastProbes(PHOTOGRAPHS, (synthesize(model, inputs, count, photographs, generator, scales),))
    classes = count_classes(model, inputs) if classes is None else classes
    if not classes:
        makers = (dead_leaves, varied_pink)
        return ForecastProbes(
            PLAIN, tuple(synthesize(model, inputs, count, make, generator, scales) for make in makers)
        )
    count = affordable(half, _MACS, _FEWEST, _MOST, ceiling=_CEILING)
    if count < _FEWEST:
        return ForecastProbes(why=f"an input takes {each:.1e} multiply-accumulates, too many to make probes")
    start = synthesize(model, inputs, count, varied_pink, generator, scales)
    settings = {"steps": _STEPS, "lr": _STEP, "sureness": (_SURENESS,)}
    (sure,) = dream_classes(model, start, inputs, classes, generator, progress, scores=scores, **settings)
    return ForecastProbes(SURE, (sure.inputs,), sure.wanted)


def _matched(model: nn.Module, start: ExampleInputs, scales: InputScales, progress: Progress | None) -> ExampleInputs:
    """The batch, optimized until batch norms see their running statistics, in parts that fit into memory."""
    most = max(FEWEST, held_at_once(ROOM, saved_bytes(model, first_rows(start))))
    parts = split(start, alike(batch_size(start), most, FEWEST))
    moved: list[ExampleInputs] = []
    for number, part in enumerate(parts):

        def report(step: int, done: int = number * _STEPS) -> None:
            if progress:
                progress("dreaming", done + step, _STEPS * len(parts))

        # With running statistics, because both networks are compared with these.
        moved.append(Dream().match(model, part, _STEPS, scales, report, batch_statistics=False))
        give_back()
    return join(moved)
