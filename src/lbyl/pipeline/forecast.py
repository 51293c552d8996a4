"""The forecast of a smaller network: both networks on probes that no solve saw, and what that means for real inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lbyl.errors import first_line
from lbyl.moments.base import Probes
from lbyl.moments.class_dream import class_scores
from lbyl.moments.forecast_probes import ForecastProbes, forecast_probes
from lbyl.moments.generated import Generated, text_losses, writes_text
from lbyl.restore.base import Restorer
from lbyl.runtime.batches import batch_size, first_rows, in_parts
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.forecast import (
    AGREEMENT,
    COSINE,
    ERROR,
    MAPS,
    PERPLEXITY,
    POSITIONS,
    UNKNOWN,
    Forecast,
    foretell_agreement,
    foretell_cosine,
    foretell_error,
    foretell_perplexity,
    same_answers,
    scores_error,
    with_real_answers,
)
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.memory import ROOM, give_back, held_at_once, held_bytes
from lbyl.runtime.output_error import outputs_error
from lbyl.runtime.progress import Progress
from lbyl.runtime.seeding import generator_for

_TEXTS, _TOKENS = 16, 128
"""So many texts of so many tokens are written where no restorer has written any."""


@dataclass(frozen=True)
class Forecaster:
    """Foretells what smaller networks keep of one original. Probes are made once, when they are first needed.

    Attributes:
        model: the original network.
        inputs: what it is called with.
        seed: for probes.
        progress: called as ``progress(stage, done, total)``.
    """

    model: nn.Module
    inputs: ExampleInputs
    seed: int
    progress: Progress | None = None

    def __call__(self, smaller: nn.Module, probes: Probes | None = None) -> Forecast:
        """What a smaller network is expected to keep.

        Args:
            smaller: it is not changed.
            probes: a restorer's, where what they hold out is like real inputs: the user's own, or the model's text.
        """
        try:
            with undisturbed(self.model), undisturbed(smaller), torch.no_grad():
                return self._foretold(smaller, _held_out(probes))
        except Exception as error:  # whatever somebody's code raises on inputs that it was not made for
            return Forecast(why=f"the networks could not be compared on probes: {first_line(error)}")

    def asks_for_probes(self, restorer: Restorer) -> bool:
        """Whether what a restorer's probes hold out is like real inputs: the user's own, or the model's own text."""
        return restorer.takes_probes and (restorer.keeps_inputs_private or self.measure == PERPLEXITY)

    @cached_property
    def measure(self) -> str:
        """What can be foretold of such a network."""
        with undisturbed(self.model), torch.no_grad():
            return _measure_of(self.model, self.inputs)

    def _foretold(self, smaller: nn.Module, held_out: ExampleInputs | None) -> Forecast:
        if self.measure == PERPLEXITY:
            texts = held_out or self._texts
            before, after = (text_losses(model, texts) for model in (self.model, smaller))
            return foretell_perplexity(before, after)
        if held_out is not None:
            return self._on_real(smaller, held_out)
        return self._on_probes(smaller)

    def _on_real(self, smaller: nn.Module, held_out: ExampleInputs) -> Forecast:
        """From the user's own inputs, and from probes where these are few."""
        before, after = (self._outputs(model, held_out) for model in (self.model, smaller))
        count = batch_size(held_out)
        if self.measure in (AGREEMENT, POSITIONS):
            same = same_answers(self._scores(before, held_out), self._scores(after, held_out))
            share = float(same.double().mean())
            prior = self._on_probes(smaller) if count < _MANY and self._has_floats else Forecast()
            return with_real_answers(prior, share, count, measure=self.measure)
        foretell = foretell_cosine if self.measure == COSINE else foretell_error
        return foretell([outputs_error(before, after)], count, real=True)

    def _on_probes(self, smaller: nn.Module) -> Forecast:
        if not self._has_floats:
            return Forecast(why="no probes are known that are like its tokens; give inputs of yours (lbyl.Data)")
        made = self._made
        if not made.batches:
            return Forecast(why=made.why)
        if self.measure not in (AGREEMENT, POSITIONS):
            pairs = [(self._original[index], self._outputs(smaller, each)) for index, each in enumerate(made.batches)]
            foretell = foretell_cosine if self.measure == COSINE else foretell_error
            return foretell([outputs_error(*pair) for pair in pairs], batch_size(made.batches[0]))
        (batch,) = made.batches
        before, after = self._scores(self._original[0], batch), self._scores(self._outputs(smaller, batch), batch)
        answers = before.argmax(1)
        if made.wanted is not None:
            reached = answers == made.wanted.reshape(-1, *[1] * (answers.dim() - 1))
            if float(reached.double().mean()) < _REACHED:
                return Forecast(why="no inputs could be found that the network is sure of")
        elif len(answers.unique()) < 2:
            return Forecast(why="the network gives all probes the same answer, so they tell nothing")
        same = float(same_answers(before, after).double().mean())
        error = scores_error(before, after)
        return foretell_agreement(same, error, len(before), MAPS[made.kind], measure=self.measure)

    def _scores(self, outputs: list[Tensor], inputs: ExampleInputs) -> Tensor:
        found = (class_scores if self.measure == AGREEMENT else _position_scores)(outputs, inputs)
        assert found is not None
        return found

    def _outputs(self, model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
        """What a model gives for a batch, in parts that memory allows."""
        most = held_at_once(ROOM, held_bytes(model, first_rows(inputs)))
        found = [
            [tensor.detach() for tensor in output_tensors(part.cloned().call(model))] for part in in_parts(inputs, most)
        ]
        give_back()
        return [torch.cat(same) if same[0].dim() else same[0] for same in zip(*found, strict=True)]

    @cached_property
    def _original(self) -> list[list[Tensor]]:
        """What the original gives for each batch of the probes."""
        return [self._outputs(self.model, batch) for batch in self._made.batches]

    @cached_property
    def _has_floats(self) -> bool:
        return any(tensor.is_floating_point() for tensor in self.inputs.tensors())

    @cached_property
    def _made(self) -> ForecastProbes:
        scores = class_scores if self.measure == AGREEMENT else _position_scores
        answers = scores(output_tensors(self.inputs.cloned().call(self.model)), self.inputs)
        classes = answers.shape[1] if answers is not None and self.measure in (AGREEMENT, POSITIONS) else 0
        generator = generator_for(self.seed, "forecast")
        return forecast_probes(self.model, self.inputs, generator, self.progress, classes, scores)

    @cached_property
    def _texts(self) -> ExampleInputs:
        source = Generated(sequences=_TEXTS, length=_TOKENS)
        made = source.probes(self.model, self.inputs, generator_for(self.seed, "forecast"), self.progress)
        return made.batches[0]


_REACHED = 0.5
"""Dreams tell something of a network's answers if at least this share of them reached the class drawn for it."""
_MANY = 200
"""So many real inputs speak for themselves."""


def _held_out(probes: Probes | None) -> ExampleInputs | None:
    """What no solve saw; None where that is a batch that solves saw as well."""
    return probes.held_out if probes and probes.holds_out else None


def _measure_of(model: nn.Module, inputs: ExampleInputs) -> str:
    if writes_text(model, inputs):
        return PERPLEXITY
    outputs = output_tensors(inputs.cloned().call(model))
    answers = class_scores(outputs, inputs)
    if answers is not None:
        lengths = answers.double().norm(dim=1)
        if bool(((lengths - 1).abs() < _ROUNDING).all()):
            return COSINE
        # What comes out of a ReLU is no score of a class.
        features = bool((answers >= 0).all()) and bool((answers == 0).any())
        return ERROR if features else AGREEMENT
    if _position_scores(outputs, inputs) is not None:
        return POSITIONS
    return ERROR if any(tensor.is_floating_point() and tensor.dim() for tensor in outputs) else UNKNOWN


_ROUNDING = 1e-3
"""Lengths that differ from 1 by less are those of unit vectors."""


def _position_scores(output: object, inputs: ExampleInputs) -> Tensor | None:
    """The first output with a vector of scores for each pixel of the input: of another depth, or it is an image."""
    images = [t.shape for t in inputs.tensors() if t.is_floating_point() and t.dim() == 4]
    for tensor in output_tensors(output):
        if not tensor.is_floating_point() or tensor.dim() != 4 or tensor.shape[1] < 2:
            continue
        if any(tensor.shape[2:] == shape[2:] and tensor.shape[1] != shape[1] for shape in images):
            return tensor
    return None
