"""Finds restorers by name, and chooses the default one."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lbyl.errors import InputError
from lbyl.moments import (
    ClassDream,
    ClosedFormSource,
    Dream,
    Generated,
    Noise,
    Photographs,
    ProbeSource,
    Sentences,
    Weights,
)
from lbyl.moments.class_dream import answers_among_classes
from lbyl.moments.generated import continues_text
from lbyl.moments.photographs import takes_photographs
from lbyl.moments.sentences import takes_sentences
from lbyl.restore.base import Restorer
from lbyl.restore.closed_form import Delivering, Delivers
from lbyl.restore.least_squares.restorer import LeastSquares
from lbyl.restore.prune import Prune
from lbyl.runtime.batch_norms import batch_norms, norms_cover
from lbyl.runtime.batches import macs_per_input
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.registry import make


def resolve_restorer(restore: str | Restorer | Delivers) -> Restorer:
    """The restorer with a short name, or the object itself.

    Raises:
        InputError: the name is unknown, or the object has neither ``restore`` nor ``deliver``.
    """
    if isinstance(restore, str):
        restore = make("restorer", restore)
    if isinstance(restore, Restorer):
        return restore
    if isinstance(restore, type):
        raise InputError(f"restore={restore.__name__} is a class; pass an object, {restore.__name__}()")
    if isinstance(restore, ProbeSource | ClosedFormSource):
        name = type(restore).__name__
        raise InputError(f"restore={name}(...) is a source of moments; pass lbyl.LeastSquares({name}(...))")
    if not isinstance(restore, Delivers):
        raise InputError(f"restore={restore!r} has no deliver(filters, keep, drop, generator) method")
    return Delivering(restore)


LOW, DEFAULT, HIGH = "low", "default", "high"
EFFORTS = (LOW, DEFAULT, HIGH)
"""How much time ``restore="auto"`` may take."""

_LARGE = 1e9
"""Networks with more multiply-accumulates for each image make no more dreams with high effort, only more steps."""


def check_effort(effort: object) -> None:
    """Raise InputError for an unknown effort."""
    if effort not in EFFORTS:
        raise InputError(f"effort={effort!r}: choose {', '.join(map(repr, EFFORTS))}")


def choose_restorer(model: nn.Module, inputs: ExampleInputs, effort: str = DEFAULT) -> tuple[LeastSquares, str]:
    """The restorer for ``restore="auto"`` and an effort, without the user's data, and a note that says why."""
    with undisturbed(model):
        restorer, why = _best(model, inputs)
        if effort == LOW:
            return _quick(restorer, inputs, why)
        if effort == HIGH:
            return _thorough(restorer, model, inputs), f"{why}; high effort: more probes and steps"
    return restorer, why


def _quick(restorer: LeastSquares, inputs: ExampleInputs, why: str) -> tuple[LeastSquares, str]:
    """The same for a few seconds: few probes, none of which is dreamed, and consumers solved all at once."""
    source = restorer.moments
    if isinstance(source, Dream) and takes_photographs(inputs):
        source, why = Photographs(images=48), "auto: lbyl's own photographs, and nothing dreamed"
    elif isinstance(source, Dream):
        source, why = replace(source, images=64, steps=0), "auto: noise and scenes, and nothing dreamed"
    elif isinstance(source, Photographs):
        source = replace(source, images=48)
    elif isinstance(source, ClassDream):
        source, why = Noise(images=256), "auto: noise, and nothing dreamed"
    elif isinstance(source, Generated):
        source = replace(source, sequences=16)
    elif isinstance(source, Sentences):
        source = replace(source, sequences=64)
    quick = replace(restorer, moments=source, sequential=False, positions=8192)
    return quick, f"{why}; low effort: fewer probes, one pass"


def _thorough(restorer: LeastSquares, model: nn.Module, inputs: ExampleInputs) -> LeastSquares:
    """The same with more probes, and dreams with more steps."""
    source = restorer.moments
    if isinstance(source, Dream):
        source = replace(source, steps=20, images=192 if macs_per_input(model, inputs) < _LARGE else None)
    elif isinstance(source, Photographs):
        source = replace(source, images=384)
    elif isinstance(source, ClassDream):
        source = replace(source, images=640)
    elif isinstance(source, Generated | Sentences):
        source = replace(source, sequences=512)
    return replace(restorer, moments=source)


def _best(model: nn.Module, inputs: ExampleInputs) -> tuple[LeastSquares, str]:
    norms = batch_norms(model)
    if norms_cover(model):
        why = f"auto: dreamed probes, because batch norms ({len(norms)}) describe the training data"
        return LeastSquares(moments=Dream()), f"{why}; also lbyl's own photographs, if inputs are color images"
    if continues_text(model, inputs):
        return LeastSquares(moments=Generated()), "auto: text that the model writes itself"
    if takes_sentences(model, inputs):
        why = "auto: English sentences that come with lbyl, tokenized with the model's tokenizer"
        return LeastSquares(moments=Sentences()), why
    little = f"too few batch norms ({len(norms)}) describe" if norms else "no batch norms describe"
    if not takes_photographs(inputs) and answers_among_classes(model, inputs):
        why = f"auto: inputs dreamed for random classes, and noise, because {little} the training data"
        return LeastSquares(moments=ClassDream()), why
    why = f"auto: {little} the training data, so lbyl's own photographs, or noise if inputs are not color images"
    return LeastSquares(moments=Photographs()), why


def fallbacks(restorer: Restorer) -> tuple[Restorer, ...]:
    """The restorers to try in turn if the default one fails.

    First probes that are not dreamed, then moments from the weights alone, then plain pruning, which works for every
    network that can be cut.
    """
    less: list[Restorer] = []
    if isinstance(restorer, LeastSquares):
        if isinstance(restorer.moments, Dream):
            less.append(replace(restorer, moments=replace(restorer.moments, steps=0)))
        elif isinstance(restorer.moments, Photographs | ClassDream | Generated | Sentences):
            less.append(replace(restorer, moments=Noise()))
        less.append(LeastSquares(moments=Weights()))
    return (*less, Prune())
