"""Reads a folder of texts as batches of tokens, for ``lbyl compress --data``."""

from __future__ import annotations

import json
import random
from pathlib import Path

from torch import Tensor, nn

from lbyl.errors import InputError
from lbyl.io.files import files_in
from lbyl.moments.token_inputs import like_example, longest_text, token_ids
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.tokenizers import packed_tokens, tokenizer_of

SUFFIXES = (".txt", ".jsonl")
BATCH, BATCHES = 16, 5
"""Number of sequences in a batch, and number of batches; the last batch is held out."""
LENGTH = 256
FIELD = "text"
"""The field of a line of JSON that holds the text."""


def find_texts(folder: Path) -> list[Path]:
    """All text files in a folder and its subfolders, sorted by name, or the file itself if ``folder`` is one.

    Raises:
        InputError: there is no such folder, or no text in it.
    """
    if folder.is_file() and folder.suffix.lower() in SUFFIXES:
        return [folder]
    return files_in(folder, SUFFIXES, "text")


def has_texts(folder: Path) -> bool:
    """Whether a folder holds text files, or is one itself."""
    try:
        return bool(find_texts(folder))
    except InputError:
        return False


def example_tokens(model: nn.Module) -> dict[str, Tensor] | None:
    """Example inputs of a language model, one sentence; None if there is no tokenizer beside its weights."""
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        return None
    given = tokenizer(_SENTENCE, return_tensors="pt")
    return {name: given[name] for name in ("input_ids", "attention_mask") if name in given}


_SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all."


def read_texts(
    folder: Path, model: nn.Module, inputs: ExampleInputs, seed: int = 0
) -> tuple[list[ExampleInputs], tuple[str, ...]]:
    """Up to ``BATCHES`` batches of sequences from the texts in a folder, and the files that were left out, and why.

    The texts are tokenized with the model's tokenizer.

    A ``.txt`` file is one text, and so is the field "text" of each line of a ``.jsonl`` file. Texts are used in random
    order.

    Raises:
        InputError: there is no text that can be read, there is no tokenizer beside the model's weights, or the texts
            are too short for two sequences.
    """
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise InputError(
            f"--data {folder}: there is no tokenizer beside this model's weights, so texts can't be tokenized; "
            "load the model from a folder with a tokenizer (hf:DIR)"
        )
    files = find_texts(folder)
    random.Random(seed).shuffle(files)
    texts, left = list[str](), list[str]()
    for file in files:
        found, why = _readable_texts(file)
        texts += found
        left += why
    if not texts:
        raise InputError(left[0] if left else f"there is no text in {folder}")
    if len(files) == 1 and len(texts) > 1:
        random.Random(seed).shuffle(texts)
    length = longest_text(model, LENGTH)
    rows = packed_tokens(tokenizer, texts, BATCH * BATCHES, length)
    if len(rows) < 2:
        others = f"; some were left out ({'; '.join(left[:_TOLD])})" if left else ""
        raise InputError(
            f"the texts in {folder} fill only {len(rows)} sequences of {length} tokens; add more texts{others}"
        )
    example = token_ids(inputs)
    assert example is not None
    size = min(BATCH, max(1, len(rows) // 2))
    made = [like_example(inputs, part.to(example)) for part in rows.split(size) if len(part) == size]
    return made, tuple(left)


_TOLD = 3


def _readable_texts(file: Path) -> tuple[list[str], list[str]]:
    """The texts of a file, and what of it was left out, and why: the file, or its first such line and how many."""
    try:
        whole = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{file} can't be read as a text in UTF-8: {error}"]
    if file.suffix.lower() != ".jsonl":
        return [whole], []
    texts, faults = list[str](), list[str]()
    for number, line in enumerate(whole.split("\n"), 1):
        try:
            item = json.loads(line) if line.strip() else {FIELD: ""}
        except ValueError as error:
            faults.append(f"{file}, line {number} is not JSON: {error}")
            continue
        if isinstance(item, dict) and isinstance(item.get(FIELD), str):
            texts.append(item[FIELD])
        else:
            faults.append(f'{file}, line {number} has no "{FIELD}"; each line must be an object with this field')
    if not faults:
        return texts, []
    more = f", and so are {len(faults) - 1} other lines" if len(faults) > 1 else ""
    return texts, [f"{faults[0]}{more}"]
