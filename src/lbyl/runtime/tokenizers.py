"""Finds the tokenizer beside a model's weights, and turns text into tokens."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lbyl.errors import InputError, first_line


def tokenizer_at(place: str | os.PathLike[str]) -> Any:
    """Load the tokenizer from a folder, or by a name that transformers has in its cache; nothing is downloaded.

    Raises:
        InputError: there is no tokenizer, or it can't be read.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
        return transformers.AutoTokenizer.from_pretrained(os.fspath(place), local_files_only=True)
    except Exception as error:  # its files may raise anything
        raise InputError(f"no tokenizer can be read from {place}: {first_line(error)}") from error


def tokenizer_of(model: nn.Module) -> Any | None:
    """The tokenizer beside the weights that ``from_pretrained`` loaded a model from; None where there is none."""
    place = getattr(model, "name_or_path", "")
    # A model from transformers can only exist after transformers was imported.
    if not place or not isinstance(place, str) or "transformers" not in sys.modules:
        return None
    try:
        return tokenizer_at(place)
    except InputError:
        return None


def packed_tokens(tokenizer: Any, texts: Iterable[str], count: int, length: int) -> Int[Tensor, "sequences tokens"]:
    """Concatenate the tokens of texts and split them into sequences of one length, each with its special tokens.

    There are ``count`` sequences, or fewer if the texts do not fill them.
    """
    before, after = frame(tokenizer)
    room = length - len(before) - len(after)
    found: list[list[int]] = []
    rest: list[int] = []
    for text in texts:
        rest += tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        while len(rest) >= room and len(found) < count:
            found.append([*before, *rest[:room], *after])
            rest = rest[room:]
        if len(found) == count:
            break
    return torch.tensor(found, dtype=torch.long).reshape(-1, length)


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    inside = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(inside) + 1):
        if whole[start : start + len(inside)] == inside:
            return whole[:start], whole[start + len(inside) :]
    return [], []
