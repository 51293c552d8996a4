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
from lbyl.moments.generated import writes_text
from lbyl.moments.photographs import takes_photographs
from lbyl.moments.sentences import takes_sentences
from lbyl.restore.base import Restorer
from lbyl.restore.closed_form import Delivering, Delivers
from lbyl.restore.least_squares.restorer import LeastSquares
from lbyl.restore.prune import Prune
from lbyl.runtime.batch_norms import batch_norms, norms_cover
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


def choose_restorer(model: nn.Module, inputs: ExampleInputs) -> tuple[LeastSquares, str]:
    """The restorer for ``restore="auto"``, which is the best one without the user's data, and a note that says why."""
    norms = batch_norms(model)
    if norms_cover(model):
        why = f"auto: dreamed probes, because batch norms ({len(norms)}) describe the training data"
        return LeastSquares(moments=Dream()), f"{why}; also lbyl's own photographs, if inputs are color images"
    if writes_text(model, inputs):
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
