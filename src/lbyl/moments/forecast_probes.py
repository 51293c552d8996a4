"""Probes for a forecast: of other seeds than any that a restorer solves on, and some that the network is sure of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lbyl.moments.class_dream import Scores, count_classes, dream_classes
from lbyl.moments.input_scales import input_scales
from lbyl.moments.photographs import photographs, takes_photographs
from lbyl.moments.synthesis import dead_leaves, synthesize, varied_pink
from lbyl.runtime.batches import affordable, macs_per_input
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress

PHOTOGRAPHS, SURE, PLAIN = "photographs", "sure", "plain"

_STEPS, _STEP, _SURENESS = 20, 0.3, 0.99
_FEWEST, _MOST = 32, 256
_MACS, _CEILING = 6e11, 5e12
"""Multiply-accumulates that dreaming should take, and those that it may take."""
_FEWEST_PLAIN, _MOST_PLAIN = 48, 256
_PLAIN_MACS, _PLAIN_CEILING = 6e10, 4e11


@dataclass(frozen=True)
class ForecastProbes:
    """What both networks are run on.

    Attributes:
        kind: "photographs" (crops, where inputs are color images), "sure" (noise that was moved until the network was
            sure of a class drawn for it), "plain" (scenes and noise), or "" where there are none.
        batches: one of each kind.
        wanted: the classes that were drawn, where there are any.
        why: why there are none.
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
    """Make them.

    Args:
        model: the original network in evaluation mode; nothing in it is changed.
        inputs: what it is called with: some floats are among them.
        generator: a generator that no other probes come from.
        progress: called as ``progress("dreaming", done, total)``.
        classes: among how many the network answers; 0 where it does not; None finds out.
        scores: finds the answers in an output, as for :func:`~lbyl.moments.class_dream.dream_classes`.
    """
    each, scales = macs_per_input(model, inputs), input_scales(model, inputs)
    count = affordable(each, _PLAIN_MACS, _FEWEST_PLAIN, _MOST_PLAIN, ceiling=_PLAIN_CEILING)
    if takes_photographs(inputs):
        return ForecastProbes(PHOTOGRAPHS, (synthesize(model, inputs, count, photographs, generator, scales),))
    classes = count_classes(model, inputs) if classes is None else classes
    if not classes:
        makers = (dead_leaves, varied_pink)
        return ForecastProbes(
            PLAIN, tuple(synthesize(model, inputs, count, make, generator, scales) for make in makers)
        )
    # Forward, and backward to the inputs; half of the steps are enough for most.
    count = affordable(3 * (_STEPS // 2) * each, _MACS, _FEWEST, _MOST, ceiling=_CEILING)
    if count < _FEWEST:
        return ForecastProbes(why=f"an input takes {each:.1e} multiply-accumulates, too many to dream of classes")
    start = synthesize(model, inputs, count, varied_pink, generator, scales)
    settings = {"steps": _STEPS, "lr": _STEP, "sureness": (_SURENESS,)}
    (sure,) = dream_classes(model, start, inputs, classes, generator, progress, scores=scores, **settings)
    return ForecastProbes(SURE, (sure.inputs,), sure.wanted)
