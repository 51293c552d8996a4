"""Restorers by name, and the one that is best where none is named."""

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
    """A restorer by its lower-case name, or the object itself.

    Raises:
        InputError: an unknown name, or an object without ``restore`` and ``deliver``.
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
    """The best restorer that needs no data of the user's, and why: what ``restore="auto"`` stands for."""
    norms = batch_norms(model)
    if norms_cover(model):
        why = f"auto: dreamed probes, for {len(norms)} batch norms say what inputs do"
        return LeastSquares(moments=Dream()), f"{why}; with lbyl's own photographs, if inputs are color images"
    if writes_text(model, inputs):
        return LeastSquares(moments=Generated()), "auto: text that the model writes itself"
    if takes_sentences(model, inputs):
        why = "auto: English sentences that come with lbyl, through the model's own tokenizer"
        return LeastSquares(moments=Sentences()), why
    little = f"so few batch norms ({len(norms)}) say too little of" if norms else "no batch norm says"
    if not takes_photographs(inputs) and answers_among_classes(model, inputs):
        why = f"auto: {little} what inputs do: inputs dreamed for each class, and noise"
        return LeastSquares(moments=ClassDream()), why
    why = f"auto: {little} what inputs do: lbyl's own photographs, or noise if inputs are no color images"
    return LeastSquares(moments=Photographs()), why


def fallbacks(restorer: Restorer) -> tuple[Restorer, ...]:
    """What stands in for a chosen restorer that can't do its work, the best first: it asks less of the network.

    Inputs that are not dreamed, then the moments that the weights alone suggest, then plain pruning, which works
    wherever the network can be cut.
    """
    less: list[Restorer] = []
    if isinstance(restorer, LeastSquares):
        if isinstance(restorer.moments, Dream):
            less.append(replace(restorer, moments=replace(restorer.moments, steps=0)))
        elif isinstance(restorer.moments, Photographs | ClassDream | Generated | Sentences):
            less.append(replace(restorer, moments=Noise()))
        less.append(LeastSquares(moments=Weights()))
    return (*less, Prune())
