"""Inputs that the network is sure of: noise, moved until each is taken for the class that was drawn for it."""

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
from lbyl.runtime.progress import Progress


@dataclass(frozen=True)
class ClassDream:
    """Pink noise, half of it moved by Adam until the network takes each input for the class that was drawn for it.

    For classifiers that no batch norm tells what inputs do, and whose inputs are no color images: noise excites what a
    network looks for hardly at all. The loss is the cross-entropy of the answers, all classes alike often; inputs stay
    within the bounds that the example has. The other half stays noise, for what a deep network is sure of may be like
    no input either. Outputs that are no answers among classes (one row an input, two numbers or more) get
    :class:`lbyl.Noise`.

    Attributes:
        images: inputs that moments are collected on, one half and the other; a quarter more is held out. None takes as
            many as 1e11 multiply-accumulates allow, between 64 and 640.
        steps: Adam steps.
        lr: step size, in deviations of the inputs.
        memory: bytes that activations may take: fewer inputs are moved at a time where these would take more.
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
        """Not by their activations' sizes, which are those of inputs that the network is too sure of."""
        return False

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """Inputs of the example's shapes that the network is sure of."""
        count = self.images or affordable(macs_per_input(model, inputs), 1e11, 64, 640, ceiling=1e12)
        started = Noise(count).probes(model, inputs, generator, progress)
        classes = count_classes(model, inputs)
        if not classes:
            told = "noise in place of dreamed classes: no output is an answer among classes"
            return replace(started, note="; ".join(filter(None, [told, started.note])))

        def dreamed(noise: ExampleInputs) -> list[ExampleInputs]:
            sizes = alike(batch_size(noise), -(-batch_size(noise) // 2))
            first, *rest = split(noise, sizes)
            return [self._moved(model, first, inputs, classes, generator, progress), *rest]

        batches = [part for each in started.batches for part in dreamed(each)]
        return replace(started, batches=tuple(batches), held_out=join(dreamed(started.held_out)))

    def _moved(
        self,
        model: nn.Module,
        start: ExampleInputs,
        inputs: ExampleInputs,
        classes: int,
        generator: torch.Generator,
        progress: Progress | None,
    ) -> ExampleInputs:
        """A batch, as many inputs at a time as fit into memory."""
        moved = dream_classes(
            model, start, inputs, classes, generator, progress, steps=self.steps, lr=self.lr, memory=self.memory
        )
        return moved[-1].inputs


Scores = Callable[[object, ExampleInputs], Tensor | None]
"""Finds the answers among classes in what a network returns for a batch; None where there are none."""


@dataclass(frozen=True)
class Dreamed:
    """A batch on its way to the classes that were drawn for its inputs.

    Attributes:
        inputs: as far as they were moved.
        wanted: the class of each.
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
    """Move a batch by Adam until each input is taken for the class that is drawn for it.

    Args:
        model: the network in evaluation mode; nothing in it is changed.
        start: where inputs begin.
        inputs: the example, whose bounds inputs stay within.
        classes: how many there are.
        generator: draws the classes.
        progress: called as ``progress("dreaming", done, total)``.
        steps: Adam steps.
        lr: step size, in deviations of the inputs.
        memory: bytes that activations may take: fewer inputs are moved at a time where these would take more.
        scores: finds the answers in an output: a row of scores an input, at each position if there are several. None
            takes :func:`class_scores`.
        sureness: probabilities of the drawn class, the lowest first. Each gets a batch of its own: inputs as they were
            when they first had it, or at the end where they never had; and when all have the highest, no more steps
            are taken. Without any, there is one batch, after all steps.
    """
    scores = scores or class_scores
    most = max(FEWEST, held_at_once(memory, saved_bytes(model, inputs) // batch_size(inputs)))
    parts = split(start, alike(batch_size(start), most, FEWEST))
    scales = input_scales(model, inputs)
    moved: list[list[ExampleInputs]] = [[] for _ in sureness or (1.0,)]
    drawn: list[Tensor] = []
    for number, part in enumerate(parts):
        batch = part.map(lambda t: t.detach().clone())
        pairs = [(t, s) for t, s in zip(batch.tensors(), scales.scales, strict=True) if t.is_floating_point()]
        wanted = torch.randint(classes, (batch_size(batch),), generator=generator).to(pairs[0][0].device)
        optimizer = Adam([(t, lr * float(s.deviation.mean())) for t, s in pairs])
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
                losses.mean().backward()
                optimizer.step()
                scales.clamp_(batch.tensors())
                if progress:
                    progress("dreaming", number * steps + step + 1, steps * len(parts))
        drawn.append(wanted)
        for found, shot in zip(moved, shots or [None], strict=True):
            found.append(shot.finished(batch) if shot else batch.map(Tensor.detach))
        give_back()
    return [Dreamed(join(each), torch.cat(drawn)) for each in moved]


class _Shot:
    """The inputs of a batch as they were when the network was first so sure of each."""

    def __init__(self, batch: ExampleInputs, wanted: Tensor, sureness: float) -> None:
        self.most, self.size = -math.log(sureness), len(wanted)
        self.there = torch.zeros(self.size, dtype=torch.bool, device=wanted.device)
        self.taken = batch.map(lambda t: t.detach().clone())

    def take(self, batch: ExampleInputs, losses: Float[Tensor, " inputs"]) -> bool:
        """Keep those that get there now, given each one's cross-entropy. Returns whether all are there."""
        now = (losses.detach() <= self.most) & ~self.there
        self._keep(batch, now)
        self.there |= now
        return bool(self.there.all())

    def finished(self, batch: ExampleInputs) -> ExampleInputs:
        """The kept ones, and the others as they are at the end."""
        self._keep(batch, ~self.there)
        return self.taken

    def _keep(self, batch: ExampleInputs, rows: Tensor) -> None:
        for kept, tensor in zip(self.taken.tensors(), batch.tensors(), strict=True):
            if tensor.dim() and len(tensor) == self.size:
                kept[rows] = tensor.detach()[rows]


def answers_among_classes(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether a network gives each of its inputs, among which there are floats, an answer among classes."""
    return count_classes(model, inputs) > 0


def count_classes(model: nn.Module, inputs: ExampleInputs) -> int:
    """Among how many classes the network answers; 0 where it gives no such answers, or is given no floats."""
    if not any(t.is_floating_point() for t in inputs.tensors()):
        return 0
    with torch.no_grad():
        answers = class_scores(inputs.cloned().call(model), inputs)
    return 0 if answers is None else answers.shape[1]


def class_scores(output: object, inputs: ExampleInputs) -> Tensor | None:
    """The first output with a row of two numbers or more for each input."""
    found = (t for t in output_tensors(output) if t.is_floating_point() and t.dim() == 2)
    return next((t for t in found if len(t) == batch_size(inputs) and t.shape[1] > 1), None)
