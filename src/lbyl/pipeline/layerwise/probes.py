"""The text on which a folder is compressed, as tokens, and the residual streams that it leads to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbyl.errors import InputError
from lbyl.io.texts import example_tokens, read_texts
from lbyl.moments.base import Probes
from lbyl.moments.generated import Generated
from lbyl.moments.sentences import LENGTH, Sentences, affordable_sequences
from lbyl.moments.token_inputs import longest_text, token_ids
from lbyl.runtime.checks import named_kind
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.macs import count_parameters
from lbyl.runtime.output_error import error_of_parts
from lbyl.runtime.progress import Progress
from lbyl.runtime.seeding import generator_for

Batches = str | os.PathLike[str] | Sequence[Any] | None
"""A folder of texts, or batches of tokens, or None for the sentences that come with lbyl."""


@dataclass(frozen=True)
class Text:
    """Batches of tokens; the last one is held out.

    Attributes:
        batches: the batches, each with ``input_ids`` and an ``attention_mask``.
        note: what they are, for the report.
    """

    batches: tuple[ExampleInputs, ...]
    note: str

    @staticmethod
    def of(data: Batches, model: nn.Module, folder: Path, seed: int) -> Text:
        """The batches of a folder of texts, the given batches, or sentences that come with the package.

        Raises:
            InputError: there are fewer than two batches, they hold no tokens, or there is no tokenizer in the folder.
        """
        _check_kind(data)
        if isinstance(data, Sequence) and not isinstance(data, str):
            return _given(data, model)
        tokens = example_tokens(model)
        if tokens is None:
            raise InputError(f"{folder} has no tokenizer that can be read; put it there, or pass batches of tokens")
        inputs = ExampleInputs.of(tokens)
        if data is None:
            # A model without weights does not run, but nearly every parameter is used once for each token.
            length = longest_text(model, LENGTH)
            source = Sentences(affordable_sequences(count_parameters(model) * length), length, folder)
            return _made(source.probes(model, inputs, generator_for(seed, "probes"), None))
        return _read(Path(data), model, inputs, seed)

    @staticmethod
    def in_memory(data: Batches, model: nn.Module, seed: int, progress: Progress | None) -> Text:
        """The batches of a folder of texts, the given batches, or text that a model with weights writes itself.

        Raises:
            InputError: there are fewer than two batches, they hold no tokens, or there is no tokenizer for texts.
        """
        _check_kind(data)
        if isinstance(data, Sequence) and not isinstance(data, str):
            return _given(data, model)
        place = next(model.parameters()).device
        first = torch.zeros(1, 8, dtype=torch.int64)
        inputs = ExampleInputs.of(
            example_tokens(model) or {"input_ids": first, "attention_mask": torch.ones_like(first)}
        )
        if data is None:
            return _made(Generated().probes(model, inputs.to(place), generator_for(seed, "probes"), progress))
        return _read(Path(data), model, inputs, seed)


def _check_kind(data: Batches) -> None:
    if data is not None and (isinstance(data, bytes) or not isinstance(data, (str, os.PathLike, Sequence))):
        raise InputError(f"data is {named_kind(data)}; pass a folder of texts, or a list of batches of tokens")


def _given(data: Sequence[Any], model: nn.Module) -> Text:
    """The user's own batches."""
    batches = [_named(batch, number, model) for number, batch in enumerate(data)]
    return _checked(batches, f"{len(batches)} batches of yours")


def _made(probes: Probes) -> Text:
    """What a source of moments made."""
    return _checked([*probes.batches, probes.held_out], probes.note)


def _read(folder: Path, model: nn.Module, inputs: ExampleInputs, seed: int) -> Text:
    """The texts of a folder."""
    read, left = read_texts(folder, model, inputs, seed)
    rows = sum(batch.size for batch in read)
    note = f"{rows} sequences of the texts in {folder.name}" + (f"; left out: {'; '.join(left)}" if left else "")
    return _checked(read, note)


def _named(batch: Any, number: int, model: nn.Module) -> ExampleInputs:
    """A batch of the user with its tokens by name."""
    if not isinstance(batch, (Tensor, tuple, Mapping, ExampleInputs)):
        raise InputError(f"data: batch {number} is {named_kind(batch)}; pass a tensor of tokens or a dict with them")
    try:
        inputs = ExampleInputs.of(batch)
    except InputError as error:
        raise InputError(f"data: batch {number}: {error}") from error
    ids = token_ids(inputs)
    if ids is None:
        raise InputError(f"data: batch {number} holds {inputs.describe()}, and no input_ids")
    size = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise InputError(f"data: batch {number} holds token {int(ids.max())}, but the model knows {size} tokens")
    mask = inputs.kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape or not bool(mask.any())):
        raise InputError(f"data: the attention_mask of batch {number} must be not all zero, of the shape of input_ids")
    return ExampleInputs((), {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask})


def _checked(batches: list[ExampleInputs], note: str) -> Text:
    if len(batches) < 2:
        raise InputError("data: give at least two batches of tokens; the last one is held out")
    return Text(tuple(batches), note)


@dataclass(frozen=True)
class Streams:
    """The residual streams of all sequences between two layers.

    Attributes:
        original: the stream of the original model, batch by batch; the last batch is held out.
        cut: the stream of the smaller model for the held-out batch.
    """

    original: tuple[ExampleInputs, ...]
    cut: ExampleInputs

    @staticmethod
    def start(batches: Sequence[ExampleInputs]) -> Streams:
        """The streams before the first layer, which are equal in both models."""
        return Streams(tuple(batches), batches[-1])

    def after(self, original: nn.Module, cut: nn.Module) -> Streams:
        """The streams after a layer, of which the networks before and after compression are given."""
        return Streams(tuple(_after(original, batch) for batch in self.original), _after(cut, self.cut))

    def compared(self, head: nn.Module) -> tuple[float, float]:
        """How the smaller model differs on the held-out batch.

        Returns:
            The relative error of the stream after the last norm, as :func:`lbyl.runtime.output_error.outputs_error`
            defines it, and the share of positions with the same most likely next token.
        """
        norm, output = head.children()
        same = count = 0
        parts: list[list[Tensor]] = [[], []]
        with torch.no_grad():
            pairs = zip(_stream(self.original[-1]).split(1), _stream(self.cut).split(1), strict=True)
            for before, after in pairs:  # one sequence at a time, because of the size of the vocabulary
                normed = [norm(before), norm(after)]
                first, second = (output(each).argmax(-1) for each in normed)
                same, count = same + int((first == second).sum()), count + first.numel()
                for part, each in zip(parts, normed, strict=True):
                    part.append(each)
        return error_of_parts([[t] for t in parts[0]], [[t] for t in parts[1]]), same / count


def _stream(inputs: ExampleInputs) -> Tensor:
    return inputs.kwargs["inputs_embeds"]


def _after(network: nn.Module, inputs: ExampleInputs) -> ExampleInputs:
    with torch.no_grad():
        return replace(inputs, kwargs={**inputs.kwargs, "inputs_embeds": inputs.call(network)})
