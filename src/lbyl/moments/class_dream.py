"""Inputs that a classifier is confident about: noise, optimized until each input is assigned to a random class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lbyl.moments.adam import Adam
from lbyl.moments.base import Probes
from lbyl.moments.input_scales import input_scales
from lbyl.moments.noise import Noise
from lbyl.runtime.batches import FEWEST, affordable, alike, batch_size, join, macs_per_input, split
from lbyl.runtime.checks import check_number
from lbyl.runtime.forward import frozen
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.memory import ROOM, InputsForgotten, give_back, held_at_once, saved_bytes
from lbyl.runtime.probabilities import scores_of
from lbyl.runtime.progress import Progress


@dataclass(frozen=True)
class ClassDream:
    """Pink noise, half of which is optimized until the network assigns each input to a random class.

    This is for classifiers without batch norms whose inputs are not color images. Plain noise hardly activates the
    features that a network has learned. For each input a class is drawn at random, and Adam minimizes the cross-entropy
    of the network's scores with respect to the input, which stays within the range of the example inputs. The other
    half remains noise, because inputs that a deep network is very confident about need not resemble real ones either.
    A model that gives no class scores (a row of at least two numbers for each input) gets :class:`lbyl.Noise`.

    Attributes:
        images: number of inputs on which moments are collected, counting both halves; a quarter more is held out. None
            chooses as many as 1e11 multiply-accumulates allow, between 64 and 320.
        steps: number of Adam steps.
        lr: step size, in standard deviations of the inputs.
        memory: bytes that activations may take. Fewer inputs are optimized at a time if they would take more.
    """

    images: int | None = None
    steps: int = 30
    lr: float = 0.2
    memory: int = ROOM

    def __post_init__(self) -> None:
        check_number("ClassDream(images={})", self.images, whole=True, least=2, optional=True)
        check_number("ClassDream(steps={})", self.steps, whole=True, least=1)
        check_number("ClassDream(lr={})", self.lr, above=0)
        check_number("ClassDream(memory={})", self.memory, least=1)

    def lifelike(self, inputs: ExampleInputs) -> bool:
        """Whether its probes are like real inputs: no, because the network is too confident about them."""
        return False

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """Inputs of the example's shapes: half of them noise, half of them optimized."""
        count = self.images or affordable(macs_per_input(model, inputs), 1e11, 64, 320, ceiling=1e12)
        started = Noise(count).probes(model, inputs, generator, progress)
        classes = count_classes(model, inputs)
        if not classes:
            told = "noise in place of dreamed classes: the model returns no class scores"
            return replace(started, note="; ".join(filter(None, [told, started.note])))

        def dreamed(noise: ExampleInputs) -> list[ExampleInputs]:
            sizes = alike(batch_size(noise), -(-batch_size(noise) // 2))
            first, *rest = split(noise, sizes)
            return [self._moved(model, first, inputs, classes, generator, progress), *rest]

        batches = [part for each in started.batches for part in dreamed(each)]
        held_out = dreamed(started.held_out)
        return replace(started, batches=tuple(batches), held_out=join(held_out), kinds=tuple(map(batch_size, held_out)))

    def _moved(
        self,
        model: nn.Module,
        start: ExampleInputs,
        inputs: ExampleInputs,
        classes: int,
        generator: torch.Generator,
        progress: Progress | None,
    ) -> ExampleInputs:
        """The batch after optimization, as many inputs at a time as fit into memory."""
        moved = dream_classes(
            model, start, inputs, classes, generator, progress, steps=self.steps, lr=self.lr, memory=self.memory
        )
        return moved[-1].inputs


Scores = Callable[[object, ExampleInputs], Tensor | None]
"""Finds the class scores in a network's output for a batch; None where there are none."""


@dataclass(frozen=True)
class Dreamed:
    """A batch of optimized inputs.

    Attributes:
        inputs: the inputs.
        wanted: the class that was drawn for each input.
    """

    inputs: ExampleInputs
    wanted: Int[Tensor, " inputs"]


def dream_classes(
    model: nn.Module,
    start: ExampleInputs,
    inputs: ExampleInputs,
    classes: int,
    generator: torch.Generator,
    progress: Progress | None = None,
    *,
    steps: int = 30,
    lr: float = 0.2,
    memory: int = ROOM,
    scores: Scores | None = None,
    sureness: Sequence[float] = (),
) -> list[Dreamed]:
    """Optimize a batch of inputs by Adam until the network assigns each one to the class that is drawn for it.

    Args:
        model: the network in evaluation mode; nothing in it is changed.
        start: the inputs before optimization.
        inputs: the example inputs; optimized inputs stay within their range.
        classes: number of classes.
        generator: draws the classes.
        progress: called as ``progress("dreaming", done, total)``.
        steps: number of Adam steps.
        lr: step size, in standard deviations of the inputs.
        memory: bytes that activations may take. Fewer inputs are optimized at a time if they would take more.
        scores: finds the class scores ``[inputs, classes, *positions]`` in an output. None uses :func:`class_scores`.
        sureness: probabilities of the drawn class, in ascending order. Each gives one batch, with every input as it
            was when it first reached that probability, or as it is at the end if it never does. Optimization stops
            early when all inputs reach the highest one. If empty, there is one batch, taken after all steps.
    """
    scores = scores or class_scores
    most = max(FEWEST, held_at_once(memory, saved_bytes(model, inputs)))
    parts = split(start, alike(batch_size(start), most, FEWEST))
    scales = input_scales(model, inputs)
    moved: list[list[ExampleInputs]] = [[] for _ in sureness or (1.0,)]
    drawn: list[Tensor] = []
    for number, part in enumerate(parts):
        batch = part.map(lambda t: t.detach().clone())
        pairs = [(t, s) for t, s in zip(batch.tensors(), scales.scales, strict=True) if t.is_floating_point()]
        wanted = torch.randint(classes, (batch_size(batch),), generator=generator).to(pairs[0][0].device)
        optimizer = Adam([(t, s.step(t, lr)) for t, s in pairs])
        shots = [_Shot(batch, wanted, share) for share in sureness]
        with frozen(model), torch.enable_grad(), InputsForgotten():
            for step in range(steps):
                answers = scores(batch.call(model), batch)
                assert answers is not None
                everywhere = wanted.reshape(-1, *[1] * (answers.dim() - 2)).expand(len(answers), *answers.shape[2:])
                losses = functional.cross_entropy(answers.float(), everywhere, reduction="none")
                losses = losses.reshape(len(answers), -1).mean(1)
                if shots and all([shot.take(batch, losses) for shot in shots]):
                    break
                optimizer.descend(losses.mean())
                scales.clamp_(batch.tensors())
                if progress:
                    progress("dreaming", number * steps + step + 1, steps * len(parts))
        drawn.append(wanted)
        for found, shot in zip(moved, shots or [None], strict=True):
            found.append(shot.finished(batch) if shot else batch.map(Tensor.detach))
        give_back()
    return [Dreamed(join(each), torch.cat(drawn)) for each in moved]


class _Shot:
    """The inputs of a batch, each as it was when the network first reached a given confidence."""

    def __init__(self, batch: ExampleInputs, wanted: Tensor, sureness: float) -> None:
        self.most, self.size = -math.log(sureness), len(wanted)
        self.there = torch.zeros(self.size, dtype=torch.bool, device=wanted.device)
        self.taken = batch.map(lambda t: t.detach().clone())

    def take(self, batch: ExampleInputs, losses: Float[Tensor, " inputs"]) -> bool:
        """Store inputs that reach the confidence now, given their cross-entropies; return whether all have."""
        now = (losses.detach() <= self.most) & ~self.there
        self._keep(batch, now)
        self.there |= now
        return bool(self.there.all())

    def finished(self, batch: ExampleInputs) -> ExampleInputs:
        """The stored inputs, with the others as they are now."""
        self._keep(batch, ~self.there)
        return self.taken

    def _keep(self, batch: ExampleInputs, rows: Tensor) -> None:
        for kept, tensor in zip(self.taken.tensors(), batch.tensors(), strict=True):
            if tensor.dim() and len(tensor) == self.size:
                kept[rows] = tensor.detach()[rows]


def answers_among_classes(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether a network with floating-point inputs gives class scores for each input."""
    return count_classes(model, inputs) > 0


def count_classes(model: nn.Module, inputs: ExampleInputs) -> int:
    """The number of classes of a classifier; 0 if the network gives no class scores or has no floating-point input."""
    if not any(t.is_floating_point() for t in inputs.tensors()):
        return 0
    with torch.no_grad():
        answers = class_scores(inputs.cloned().call(model), inputs)
    return 0 if answers is None else answers.shape[1]


def class_scores(output: object, inputs: ExampleInputs) -> Tensor | None:
    """The class scores ``[inputs, classes]``: the first output with a row of at least two numbers for each input.

    If they are probabilities, these are the scores behind them.
    """
    found = (t for t in output_tensors(output) if t.is_floating_point() and t.dim() == 2)
    return next((scores_of(t) for t in found if len(t) == batch_size(inputs) and t.shape[1] > 1), None)
