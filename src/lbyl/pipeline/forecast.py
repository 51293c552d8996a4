"""Forecasts the agreement of a smaller network with the original on real inputs, by running both on held-out probes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lbyl.errors import first_line
from lbyl.moments.base import Probes
from lbyl.moments.class_dream import class_scores
from lbyl.moments.forecast_probes import SENTENCES, ForecastProbes, forecast_probes
from lbyl.moments.generated import Generated, text_losses, writes_text
from lbyl.moments.sentences import Sentences, takes_sentences
from lbyl.restore.base import Restorer
from lbyl.runtime.batches import batch_size, in_parts, join
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.forecast import (
    AGREEMENT,
    COSINE,
    ERROR,
    MAPS,
    PERPLEXITY,
    POSITIONS,
    UNKNOWN,
    UNSURE,
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
from lbyl.runtime.memory import ROOM, give_back, held_at_once, held_by_each, reused_memory
from lbyl.runtime.output_error import holds_amounts, outputs_error
from lbyl.runtime.probabilities import scores_of
from lbyl.runtime.progress import Progress
from lbyl.runtime.seeding import generator_for

_SENTENCES = 96
"""So many sequences of English sentences are read where tokens come in."""
_TEXTS, _TOKENS = 16, 128
"""Number of texts, and of tokens in each, to generate if no restorer has generated any."""


@dataclass(frozen=True)
class Forecaster:
    """Makes forecasts for smaller networks of one original. Probes are made once, at their first use.

    Attributes:
        model: the original network.
        inputs: the example inputs.
        seed: seed for probes.
        progress: called as ``progress(stage, done, total)``.
    """

    model: nn.Module
    inputs: ExampleInputs
    seed: int
    progress: Progress | None = None

    def __call__(self, smaller: nn.Module, probes: Probes | None = None) -> Forecast:
        """Forecast the agreement of a smaller network with the original.

        Args:
            smaller: the smaller network; it is not changed.
            probes: the probes of a restorer, if the held-out ones are real inputs or text that the model generated.
        """
        try:
            with undisturbed(self.model), undisturbed(smaller), torch.no_grad(), reused_memory(self.model):
                return self._foretold(smaller, _held_out(probes))
        except Exception as error:  # a user's model may raise anything on inputs that it was not made for
            return Forecast(why=f"the networks could not be compared on probes: {first_line(error)}")

    def make_probes(self, restorers: Sequence[Restorer]) -> None:
        """Make now what all forecasts share, so that other processes need not, which get this forecaster.

        Args:
            restorers: the restorer whose probes :meth:`__call__` will get; none if it gets no probes.
        """
        if any(map(self.asks_for_probes, restorers)):
            return
        # Whatever fails here fails in each forecast, too, which says why.
        with suppress(Exception), undisturbed(self.model), torch.no_grad(), reused_memory(self.model):
            if self.measure != UNKNOWN:  # of which probes tell nothing
                self._texts if self.measure == PERPLEXITY else self._original  # noqa: B018

    def asks_for_probes(self, restorer: Restorer) -> bool:
        """Whether held-out probes of a restorer can be used: the user's inputs, or text that the model generated."""
        return restorer.takes_probes and (restorer.keeps_inputs_private or self.measure == PERPLEXITY)

    @cached_property
    def measure(self) -> str:
        """The measure that can be forecast for this network."""
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
        """The forecast from the user's own inputs, and also from probes if these inputs are few."""
        before, after = (self._outputs(model, held_out) for model in (self.model, smaller))
        count = batch_size(held_out)
        if self.measure in (AGREEMENT, POSITIONS):
            same = same_answers(self._scores(before, held_out), self._scores(after, held_out))
            share = float(same.double().mean())
            prior = self._on_probes(smaller) if count < _MANY and self._has_floats else Forecast()
            return with_real_answers(prior, share, count, measure=self.measure)
        if self.measure == UNKNOWN:  # whole numbers
            share, single = 1 - outputs_error(before, after), all(tensor.dim() < 2 for tensor in before)
            return with_real_answers(Forecast(), share, count, measure=AGREEMENT if single else POSITIONS)
        foretell = foretell_cosine if self.measure == COSINE else foretell_error
        return foretell([outputs_error(before, after)], count, real=True)

    def _on_probes(self, smaller: nn.Module) -> Forecast:
        if self.measure == UNKNOWN:
            return Forecast(why=_ONLY_ANSWERS)
        made = self._made
        if not made.batches:
            return Forecast(why=made.why)
        if self.measure not in (AGREEMENT, POSITIONS):
            pairs = [(self._original[index], self._outputs(smaller, each)) for index, each in enumerate(made.batches)]
            foretell = foretell_cosine if self.measure == COSINE else foretell_error
            return foretell([outputs_error(*pair) for pair in pairs], batch_size(made.batches[0]))
        pairs = [
            (self._scores(original, batch), self._scores(self._outputs(smaller, batch), batch))
            for original, batch in zip(self._original, made.batches, strict=True)
        ]
        before, after = pairs[0]
        answers = before.argmax(1)
        telling, share = MAPS.get(made.kind), float(same_answers(before, after).double().mean())
        if made.wanted is not None:
            reached = answers == made.wanted.reshape(-1, *[1] * (answers.dim() - 1))
            if float(reached.double().mean()) < _REACHED:
                telling = None
        elif len(answers.unique()) < 2:
            telling = None
        # Of answers that are all the same, or none that the network is sure of, only the scores tell something.
        return foretell_agreement(
            share if telling else None,
            [scores_error(*pair) for pair in pairs],
            len(before),
            telling or UNSURE,
            measure=self.measure,
        )

    def _scores(self, outputs: list[Tensor], inputs: ExampleInputs) -> Tensor:
        found = (class_scores if self.measure == AGREEMENT else _position_scores)(outputs, inputs)
        assert found is not None
        return found

    def _outputs(self, model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
        """A model's outputs for a batch, computed in parts that fit into memory."""
        most = held_at_once(ROOM, held_by_each(model, inputs))
        found = [
            [tensor.detach() for tensor in output_tensors(part.cloned().call(model))] for part in in_parts(inputs, most)
        ]
        give_back()
        return [torch.cat(same) if same[0].dim() else same[0] for same in zip(*found, strict=True)]

    @cached_property
    def _original(self) -> list[list[Tensor]]:
        """The original's outputs for each batch of probes."""
        return [self._outputs(self.model, batch) for batch in self._made.batches]

    @cached_property
    def _has_floats(self) -> bool:
        return any(tensor.is_floating_point() for tensor in self.inputs.tensors())

    @cached_property
    def _made(self) -> ForecastProbes:
        if not self._has_floats:
            return self._sentences()
        scores = class_scores if self.measure == AGREEMENT else _position_scores
        answers = scores(output_tensors(self.inputs.cloned().call(self.model)), self.inputs)
        classes = answers.shape[1] if answers is not None and self.measure in (AGREEMENT, POSITIONS) else 0
        generator = generator_for(self.seed, "forecast")
        return forecast_probes(self.model, self.inputs, generator, self.progress, classes, scores)

    def _sentences(self) -> ForecastProbes:
        """English sentences as tokens, for models that have a tokenizer."""
        if not takes_sentences(self.model, self.inputs):
            return ForecastProbes(why="no probes are known that are like its tokens; give inputs of yours (lbyl.Data)")
        source, generator = Sentences(sequences=_SENTENCES), generator_for(self.seed, "forecast")
        made = source.probes(self.model, self.inputs, generator, self.progress)
        return ForecastProbes(SENTENCES, (join(made.batches),))

    @cached_property
    def _texts(self) -> ExampleInputs:
        source = Generated(sequences=_TEXTS, length=_TOKENS)
        made = source.probes(self.model, self.inputs, generator_for(self.seed, "forecast"), self.progress)
        return made.batches[0]


_REACHED = 0.5
"""Smallest share of dreams that must reach their class, so that dreams can be used."""
_MANY = 200
"""With this many real inputs, no probes are needed."""


def _held_out(probes: Probes | None) -> ExampleInputs | None:
    """The held-out probes; None if they were also used for restoration."""
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
        # Outputs of a ReLU are features and not class scores.
        features = bool((answers >= 0).all()) and bool((answers == 0).any())
        return ERROR if features else AGREEMENT
    if _position_scores(outputs, inputs) is not None:
        return POSITIONS
    return ERROR if any(holds_amounts(tensor) and tensor.dim() for tensor in outputs) else UNKNOWN


_ONLY_ANSWERS = (
    "its outputs are answers in whole numbers, of which only inputs of yours tell something (lbyl.Data, where the "
    "network is traced as a whole); or compress the network that returns the scores behind them"
)


_ROUNDING = 1e-3
"""Vectors whose length differs from 1 by less than this count as unit vectors."""


def _position_scores(output: object, inputs: ExampleInputs) -> Tensor | None:
    """The first output with scores for each pixel, or the scores behind probabilities.

    Outputs with as many channels as the input are taken for images.
    """
    images = [t.shape for t in inputs.tensors() if t.is_floating_point() and t.dim() == 4]
    for tensor in output_tensors(output):
        if not tensor.is_floating_point() or tensor.dim() != 4 or tensor.shape[1] < 2:
            continue
        if any(tensor.shape[2:] == shape[2:] and tensor.shape[1] != shape[1] for shape in images):
            return scores_of(tensor)
    return None
