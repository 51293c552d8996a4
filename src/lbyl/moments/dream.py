"""Dreamed probes: inputs that are optimized until every batch norm sees its stored statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lbyl.errors import InputError
from lbyl.moments.adam import Adam
from lbyl.moments.attached_norms import measure_statistics, with_norms
from lbyl.moments.base import Probes
from lbyl.moments.input_scales import input_scales
from lbyl.moments.photographs import Photographs, pictures_for, takes_photographs
from lbyl.moments.scale import InputScales
from lbyl.moments.synthesis import dead_leaves, pink, synthesize
from lbyl.runtime.batch_norms import norms_cover
from lbyl.runtime.batches import FEWEST, affordable, alike, first_rows, held_out_size, join, macs_per_input, split
from lbyl.runtime.checks import check_number, check_switch
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.forward import frozen, run_intercepted
from lbyl.runtime.inputs import ExampleInputs, outputs
from lbyl.runtime.memory import ROOM, InputsForgotten, give_back, held_at_once, saved_bytes
from lbyl.runtime.progress import Progress

_TINY = 1e-6
"""Added to variances, so that a channel that never varied in training does not dominate the loss."""
_STEPS, _FEWEST, _MANY = 10, 5, 128
"""The number of steps by default, the smallest one that is of use, and the number of dreams for which that suffices."""
_MOST = 1e13
"""Multiply-accumulates that all steps together may take: a few minutes."""


@dataclass(frozen=True)
class Dream:
    """Images optimized to match batch-norm statistics (DeepInversion, Yin et al., CVPR 2020, arXiv 1912.08795).

    Starting from pink noise, Adam changes the pixels (never a weight) until the mean and deviation of the batch at
    every batch norm match the stored running statistics. Dreams have the right statistics of each channel, but little
    structure. So moments are also collected on as many images with structure: crops of 32 photographs of unrelated
    things, which come with the package, if the inputs look like color images, and synthetic scenes (dead leaves)
    otherwise. Batch norms are recalibrated on these images, because the effect of a cut on dreams says less about real
    inputs.

    Attributes:
        images: number of dreams on which moments are collected, and of scenes or crops of photographs. As many other
            crops are held out, or a quarter more dreams, at least 4. None chooses as many as 2.4e10
            multiply-accumulates (MACs) allow, between 24 dreams (48 other images) and 128. For networks with more than
            4e9 MACs for each image, it chooses as many dreams as 1e11 MACs and as many other images as 4e11 MACs
            allow, at least 4 of each. A batch of dreams has as many as 1.6e10 MACs allow, between 24 and 96, and fewer
            if ``memory`` requires it. Held-out images have batches of their own.
        steps: number of Adam steps, with a cosine schedule. None makes 5 for 128 dreams or more and 10 for fewer, and
            fewer if those would take more than 1e13 MACs; if fewer than 5 are possible, none.
        lr: step size, in units of the inputs (which start with unit variance).
        photographs: whether to use photographs for inputs that look like color images. With False, all probes are made
            from the network and a random seed: dreams and scenes, with dreams held out.
        memory: bytes that the activations of dreams may take. If needed, fewer dreams are made at a time, but at least
            4. If 4 still take more, all probes are smaller than the example inputs, if the network runs on such images.
    """

    images: int | None = None
    steps: int | None = None
    lr: float = 0.1
    photographs: bool = True
    memory: int = ROOM

    def __post_init__(self) -> None:
        check_number("Dream(images={})", self.images, whole=True, least=2, optional=True)
        check_number("Dream(steps={})", self.steps, whole=True, least=0, optional=True)
        check_number("Dream(lr={})", self.lr, above=0)
        check_switch("Dream(photographs={})", self.photographs)
        check_number("Dream(memory={})", self.memory, least=1, unit="byte")

    def lifelike(self, inputs: ExampleInputs) -> bool:
        """Whether its probes are like real inputs."""
        return takes_photographs(inputs)

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """Dreams and other images of the example's shapes.

        If the network has no batch norms, dreams match the statistics of its layers' outputs on photographs.

        Raises:
            InputError: there are no statistics to match.
        """
        if norms_cover(model):
            return self._made(model, inputs, generator, progress)
        seen = Photographs().probes(model, inputs, generator, progress)
        statistics = measure_statistics(model, seen.batches, seen.batch_statistics)
        if not statistics:
            raise InputError("Dream: no layer has statistics to match; use lbyl.Photographs or lbyl.Noise")
        return replace(self._made(with_norms(model, statistics), inputs, generator, progress), statistics=statistics)

    def _made(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        each = macs_per_input(model, inputs)
        count = self.images or affordable(each, 2.4e10, 24, 128, ceiling=1e11)
        others = self.images or affordable(each, 2.4e10, 48, 128, ceiling=4e11)
        shown = self.photographs and takes_photographs(inputs)
        # Crops cost nothing, and many held-out images are needed to compare solutions that are almost equally good.
        held = others if shown else max(FEWEST, held_out_size(count))
        dreams = count if shown else count + held
        steps, notes = self.steps, list[str]()
        if steps is None:
            # A step is a forward pass and a backward pass to the inputs, which takes about twice as long.
            step = 3 * each * dreams
            enough = _FEWEST if count >= _MANY else _STEPS
            steps = min(enough, int(_MOST / step))
            steps = steps if steps >= _FEWEST else 0
            if steps < enough:
                what = f"only {steps} steps of dreaming" if steps else "pink noise in place of dreams"
                notes.append(f"{what}: an input takes {each:.1e} multiply-accumulates; Dream(steps=...) makes more")
        # The memory that dreaming takes grows with the batch, so there are several batches.
        most = affordable(each, 1.6e10, 24, 96, ceiling=1e11)
        if steps:
            inputs, fitting, why = self._fitting(model, inputs)
            most, notes = min(most, fitting), [*notes, *why]
        train, test = alike(count, most, FEWEST), [] if shown else alike(held, most, FEWEST)
        scales = input_scales(model, inputs)
        starts = split(synthesize(model, inputs, dreams, pink, generator, scales), train + test)
        dreamed = []
        for number, start in enumerate(starts):

            def report(step: int, done: int = number * steps) -> None:
                if progress:
                    progress("dreaming", done + step, steps * len(starts))

            dreamed.append(self.match(model, start, steps, scales, report))
            give_back()
        if shown:
            # In two batches, because a single one would be the largest tensor in memory.
            half = others // 2 if others > 3 else 0
            parts = [size for size in (half, others - half, held) if size]
            make, told = pictures_for(model, inputs, scales)
            notes.append(told)
            made = synthesize(model, inputs, others + held, make, generator, scales)
            *seen, held_out = split(made, parts)
        else:
            dreamed, held_out = dreamed[: len(train)], join(dreamed[len(train) :])
            seen = [synthesize(model, inputs, others, dead_leaves, generator, scales)]
        batches = *dreamed, *seen
        recalibration_batches = tuple(range(len(dreamed), len(batches)))
        return Probes(
            batches,
            held_out,
            batch_statistics=True,
            note="; ".join(filter(None, [scales.note, *notes])),
            recalibration_batches=recalibration_batches,
            matches_training_statistics=steps > 0,
            evaluation_batches=recalibration_batches if shown else (),
        )

    def _fitting(self, model: nn.Module, inputs: ExampleInputs) -> tuple[ExampleInputs, int, list[str]]:
        """The example inputs, how many dreams of their size fit into memory at a time, and notes for the user.

        If not even 4 dreams fit, the example is returned with fewer pixels, if the network runs on such images.
        """
        each = saved_bytes(model, first_rows(inputs))
        most = held_at_once(self.memory, each)
        if most >= FEWEST:
            return inputs, most, []
        why = f"{FEWEST} dreams at a time take {FEWEST * each / 2**20:.0f} MiB, more than Dream(memory=...) allows"
        fewer = inputs.thinned((held_at_once(self.memory, 1) / (FEWEST * each)) ** 0.5)
        if fewer is not None:
            try:
                outputs(model, fewer)
            except InputError:  # the network requires this size of images
                return inputs, FEWEST, [why]
            now, before = ("x".join(map(str, example.tensors()[0].shape[2:])) for example in (fewer, inputs))
            return fewer, FEWEST, [f"probes of {now} pixels in place of {before}: {why}"]
        return inputs, FEWEST, [why]

    def match(
        self,
        model: nn.Module,
        start: ExampleInputs,
        steps: int,
        scales: InputScales,
        report: Callable[[int], None],
        batch_statistics: bool = True,
    ) -> ExampleInputs:
        """Optimize one batch until batch norms see their running statistics.

        Args:
            model: the network in evaluation mode; nothing in it is changed.
            start: the inputs before optimization.
            steps: number of Adam steps.
            scales: the scales of the inputs.
            report: called with the number of completed steps.
            batch_statistics: whether batch norms normalize with the batch's own statistics in place of running ones.

        Raises:
            InputError: there is no batch norm.
        """
        batch = start.map(lambda t: t.detach().clone())
        optimizer = Adam(
            [
                (t, scale.step(t, self.lr))
                for t, scale in zip(batch.tensors(), scales.scales, strict=True)
                if t.is_floating_point()
            ]
        )
        state = tensors_of(model)
        terms: list[Tensor] = []

        def on_norm(mean_name: str, var_name: str, mean: Tensor, var: Tensor) -> None:
            stored = state[var_name] + _TINY
            offset = (mean - state[mean_name]).square() / stored
            spread = ((var + _TINY) / stored).sqrt() - 1
            terms.append(offset.mean() + spread.square().mean())

        with frozen(model), torch.enable_grad(), InputsForgotten():
            for step in range(steps):
                terms.clear()
                run_intercepted(model, batch, on_norm=on_norm, batch_statistics=batch_statistics)
                if not terms:
                    raise InputError("Dream: no batch norm with running statistics; use lbyl.Photographs or lbyl.Noise")
                optimizer.descend(torch.stack(terms).sum(), (1 + math.cos(math.pi * step / steps)) / 2)
                scales.clamp_(batch.tensors())
                report(step + 1)
        return batch.map(lambda t: t.detach())
