"""Text as tokens, by the tokenizer that stands beside a model's weights."""

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
    """The tokenizer in a folder, or of a name that transformers has in its cache; nothing is downloaded.

    Raises:
        InputError: there is none, or it can't be read.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
        return transformers.AutoTokenizer.from_pretrained(os.fspath(place), local_files_only=True)
    except Exception as error:  # whatever its files make it raise
        raise InputError(f"no tokenizer can be read from {place}: {first_line(error)}") from error


def tokenizer_of(model: nn.Module) -> Any | None:
    """The tokenizer beside the weights that ``from_pretrained`` loaded a model from; None where there is none."""
    place = getattr(model, "name_or_path", "")
    # Whoever has a model of transformers has imported it.
    if not place or not isinstance(place, str) or "transformers" not in sys.modules:
        return None
    try:
        return tokenizer_at(place)
    except InputError:
        return None


def packed_tokens(tokenizer: Any, texts: Iterable[str], count: int, length: int) -> Int[Tensor, "sequences tokens"]:
    """Texts one after the other, in sequences of one length; each has the special tokens around it that texts have.

    There may be fewer than ``count`` sequences: as many as the texts fill.
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
    """The special tokens before and after a text."""
    inside = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(inside) + 1):
        if whole[start : start + len(inside)] == inside:
            return whole[:start], whole[start + len(inside) :]
    return [], []
