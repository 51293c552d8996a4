"""English sentences that come with the package: probes for language models that can't generate text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lbyl.errors import InputError
from lbyl.moments.base import Probes
from lbyl.moments.token_inputs import like_example, longest_text, token_ids
from lbyl.runtime.batches import affordable, held_out_size, macs_per_input
from lbyl.runtime.checks import check_number
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress
from lbyl.runtime.tokenizers import packed_tokens, tokenizer_at, tokenizer_of


@dataclass(frozen=True)
class Sentences:
    """English sentences and definitions from WordNet, tokenized with the model's own tokenizer.

    ``texts/SOURCES.md`` names authors and licenses.

    Attributes:
        sequences: number of sequences on which moments are collected; a quarter more is held out. None chooses as many
            as 4e12 multiply-accumulates allow, between 64 and 384. There are fewer if the sentences do not fill them.
        length: number of tokens in each sequence, including special ones. None chooses 64, or the model's number of
            positions if smaller.
        tokenizer: the folder of the tokenizer. None uses the tokenizer in the folder that the model was loaded from.
    """

    sequences: int | None = None
    length: int | None = None
    tokenizer: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_number("Sentences(sequences={})", self.sequences, whole=True, least=2, optional=True)
        check_number("Sentences(length={})", self.length, whole=True, least=4, optional=True)
        if self.tokenizer is not None:  # settings are saved in the plan as JSON
            object.__setattr__(self, "tokenizer", os.fspath(self.tokenizer))

    def lifelike(self, inputs: ExampleInputs) -> bool:
        """Whether its probes are like real inputs."""
        return True

    def probes(
        self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Progress | None
    ) -> Probes:
        """Sequences of equal length, in batches of at most 32; the last ones are held out.

        Raises:
            InputError: the model takes no tokens, there is no tokenizer, or it belongs to another model.
        """
        ids = token_ids(inputs)
        if ids is None:
            raise InputError("Sentences: no example input holds tokens; use lbyl.Noise or lbyl.Data")
        tokenizer = self._tokenizer(model)
        length = self.length or longest_text(model, LENGTH)
        count = self.sequences
        if count is None:
            count = affordable_sequences(macs_per_input(model, inputs) * length / ids.shape[1])
        lines = sentences()
        order = torch.randperm(len(lines), generator=generator).tolist()
        found = packed_tokens(tokenizer, (lines[index] for index in order), count + held_out_size(count), length)
        if len(found) < 4 or int(found.max()) >= _vocabulary(model):
            raise InputError("Sentences: the tokenizer does not fit the model; pass Sentences(tokenizer=FOLDER)")
        held = held_out_size(len(found) * 4 // 5)
        train, test = found[:-held].to(ids), found[-held:].to(ids)
        batches = tuple(like_example(inputs, part) for part in train.split(32))
        note = f"{len(train)} sequences of {length} tokens from English sentences that come with lbyl"
        held_out = like_example(inputs, test)
        return Probes(batches, held_out, batch_statistics=False, note=note, matches_training_statistics=True)

    def _tokenizer(self, model: nn.Module) -> Any:
        tokenizer = tokenizer_at(self.tokenizer) if self.tokenizer is not None else tokenizer_of(model)
        if tokenizer is None:
            raise InputError("Sentences: no tokenizer was found beside the model; pass Sentences(tokenizer=FOLDER)")
        return tokenizer


LENGTH = 64
"""The number of tokens of a sequence by default."""


def affordable_sequences(macs: float) -> int:
    """The number of sequences by default, if one takes so many multiply-accumulates."""
    return affordable(macs, 4e12, 64, 384, ceiling=4e13)


def takes_sentences(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether a model takes tokens and there is a tokenizer in the folder that it was loaded from."""
    return token_ids(inputs) is not None and tokenizer_of(model) is not None


def beginnings(tokenizer: Any, count: int, length: int, generator: torch.Generator) -> Int[Tensor, "sentences tokens"]:
    """The first ``length`` tokens of ``count`` random sentences, without special tokens; empty if all are shorter."""
    lines = sentences()
    read = (tokenizer(line, add_special_tokens=False)["input_ids"][:length] for line in lines)
    rows = [row for row in read if len(row) == length]
    if not rows:
        return torch.zeros(0, length, dtype=torch.long)
    order = torch.randperm(len(rows), generator=generator).tolist()
    return torch.tensor([rows[order[number % len(order)]] for number in range(count)])


@cache
def sentences() -> tuple[str, ...]:
    """All sentences and definitions, each with a capital letter and a period."""
    text = (files("lbyl.moments") / "texts" / "sentences.txt").read_text(encoding="utf-8")
    return tuple(f"{line[0].upper()}{line[1:].rstrip('.')}." for line in text.splitlines())


def _vocabulary(model: nn.Module) -> float:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else float("inf")
