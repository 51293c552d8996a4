"""The vocabulary of a tokenizer.json in the form of GGUF: tokens, their types, merges, and how text is split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from lbyl.errors import ArtifactError, ExportError, InputError, first_line
from lbyl.runtime.documents import read_as, read_json

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    ("Split", _CONTRACTIONS + r"\p{N}{1,3}" + _OTHERS, "ByteLevel"): "llama-bpe",
    ("Split", _CONTRACTIONS + r"\p{N}" + _OTHERS, "ByteLevel"): "qwen2",
    ("Digits", "ByteLevel+"): "smollm",
    ("ByteLevel+",): "gpt-2",
}
"""The names that llama.cpp has for ways to split text before merges; "+" marks the regular expression of GPT-2."""

Number = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


@dataclass(frozen=True)
class _Step:
    """A step of a normalizer or of a splitter, or several."""

    type: str | None = None
    pattern: dict[str, Any] | None = None
    normalizers: list[_Step] | None = None
    pretokenizers: list[_Step] | None = None


@dataclass(frozen=True)
class _Added:
    """A token beside the vocabulary."""

    id: Number
    content: str
    special: bool = False


@dataclass(frozen=True)
class _Tokenizer:
    """The fields of a ``tokenizer.json`` that are read."""

    model: dict[str, Any]
    added_tokens: list[_Added] | None = None
    normalizer: _Step | None = None
    pre_tokenizer: _Step | None = None


@dataclass(frozen=True)
class _Bpe:
    """The fields of byte pair encoding that are read."""

    vocab: dict[str, Number]
    merges: list[str | list[str]]
    byte_fallback: bool | None = None
    unk_token: str | None = None


_TIMES = 8
"""Tokenizers are larger than documents of lbyl: that of Llama 3 has 9 MB and over a million values."""


def add_vocabulary(writer: Any, gguf: Any, folder: Path, size: int) -> None:
    """Write the tokenizer of a folder.

    Args:
        writer: a ``gguf.GGUFWriter``.
        gguf: the package.
        folder: the folder with ``tokenizer.json``.
        size: the number of rows of the embedding; tokens without text fill up the vocabulary.

    Raises:
        InputError: there is no ``tokenizer.json``.
        ExportError: llama.cpp does not know such a tokenizer.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{folder} has no tokenizer.json, from which the vocabulary is read; save the tokenizer there")
    tokenizer = read_json(file, _TIMES)
    read_as(_Tokenizer, tokenizer, str(file))
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"gguf: a tokenizer of type {model.get('type')} is not supported; BPE is")
    read_as(_Bpe, model, f"the model in {file}")
    numbers = (*model["vocab"].values(), *(item["id"] for item in tokenizer.get("added_tokens") or ()))
    if max(numbers, default=0) >= size:
        raise ExportError(f"{file} has a token with the number {max(numbers)}, but the model knows {size} tokens")
    pieces = bool(model.get("byte_fallback"))
    tokens, kinds = _tokens(tokenizer, gguf.TokenType, size, pieces)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _split(tokenizer.get("pre_tokenizer") or {}))
    writer.add_token_list(tokens)
    if pieces:
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(_prefixes_space(tokenizer))
    writer.add_token_types(kinds)
    try:
        special = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=size)
        special.add_to_gguf(writer, quiet=True)
    except Exception as error:  # it reads the other files of the tokenizer as they are
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ArtifactError(f"{folder}: the files of the tokenizer can't be read ({why}); save it again") from error


def _tokens(tokenizer: Mapping[str, Any], types: Any, size: int, pieces: bool) -> tuple[list[str | bytes], list[int]]:
    """The text and the type of each token."""
    texts = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    added = {item["id"]: item for item in tokenizer.get("added_tokens") or ()}
    unknown = tokenizer["model"].get("unk_token")
    tokens: list[str | bytes] = []
    kinds: list[int] = []
    for number in range(size):
        text = added[number]["content"] if number in added else texts.get(number)
        kind = types.NORMAL
        if text is None:
            text, kind = f"[PAD{number}]", types.UNUSED
        elif pieces and text == unknown:
            kind = types.UNKNOWN
        elif number in added:
            kind = types.CONTROL if added[number].get("special") else types.USER_DEFINED
        elif pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = types.BYTE
        tokens.append(text)
        kinds.append(int(kind))
    return tokens, kinds


def _split(pre: Mapping[str, Any]) -> str:
    """The name of the way in which text is split before merges."""
    parts: list[str] = []
    for part in pre.get("pretokenizers", [pre]):
        kind = str(part.get("type"))
        if kind == "Split":
            parts += [kind, str(part.get("pattern", {}).get("Regex"))]
        else:
            parts.append(kind + "+" * bool(kind == "ByteLevel" and part.get("use_regex", True)))
        if part.get("add_prefix_space") or (kind == "Digits" and not part.get("individual_digits")):
            parts.append("otherwise")
    if tuple(parts) not in _SPLITS:
        raise ExportError(
            f"gguf: llama.cpp's name for how this tokenizer splits text ({', '.join(parts)}) is not known; the known "
            f"ones are {', '.join(_SPLITS.values())}"
        )
    return _SPLITS[tuple(parts)]


def _scores(tokens: Sequence[str | bytes], merges: Sequence[Any]) -> list[float]:
    """Scores that make llama.cpp merge in the order of the merges: the earlier a token is made, the higher."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(str(token), len(merges))) for token in tokens]


def _prefixes_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    normalizer, pre = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = [part.get("type") for part in normalizer.get("normalizers", [normalizer])]
    return "Prepend" in steps or (pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never")
