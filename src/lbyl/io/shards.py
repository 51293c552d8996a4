"""Reads the weights of a folder of transformers tensor by tensor, and writes them in several files with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lbyl.errors import InputError
from lbyl.io.files import TEMPORARY, write_whole, writing
from lbyl.runtime.documents import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATING = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""Types of weights that are not quantized, by their names in safetensors files."""


@dataclass(frozen=True)
class Shards:
    """The weights of a folder, in one safetensors file or several; nothing is read until it is asked for.

    Attributes:
        folder: the folder.
        files: the file of each tensor, by the tensor's name.
    """

    folder: Path
    files: Mapping[str, str]

    @staticmethod
    def of(folder: Path) -> Shards:
        """The weights of a folder.

        Raises:
            InputError: it has no weights as safetensors, or a file is missing or damaged.
        """
        if (folder / WEIGHTS).is_file():
            return Shards(folder, dict.fromkeys(_names(folder / WEIGHTS), WEIGHTS))
        if not (folder / INDEX).is_file():
            raise InputError(
                f"{folder} has neither {WEIGHTS} nor {INDEX}; save the model there with save_pretrained, which writes "
                "its weights as safetensors"
            )
        index: Any = read_json(folder / INDEX)
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise InputError(f"{folder / INDEX} is damaged: it has no weight_map")
        for file in sorted(set(files.values())):
            if Path(file).name != file or not (folder / file).is_file():
                raise InputError(f"{folder / INDEX} names {file}, but there is no such file in the folder")
        return Shards(folder, files)

    def paths(self) -> list[Path]:
        """The files, sorted by name."""
        return [self.folder / file for file in sorted(set(self.files.values()))]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors. Their memory is that of the file, of which the system reads the parts that are used.

        Raises:
            InputError: a tensor is missing, or a file is damaged.
        """
        found: dict[str, Tensor] = {}
        for file, wanted in self._by_file(names).items():
            with _opened(self.folder / file) as content:
                for name in wanted:
                    found[name] = content.get_tensor(name)
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, from the files' headers."""
        return {name: shape for name, (shape, _) in self.headers(self.files).items()}

    def headers(self, names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of some tensors, such as "F32", from the files' headers.

        Raises:
            InputError: a tensor is missing, or a file is damaged.
        """
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for file, wanted in self._by_file(names).items():
            with _opened(self.folder / file) as content:
                for name in wanted:
                    part = content.get_slice(name)
                    found[name] = tuple(part.get_shape()), part.get_dtype()
        return found

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Names by the file that holds the tensor."""
        found: dict[str, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise InputError(f"{self.folder}: the weights hold no {name}, which its config.json asks for")
            found.setdefault(self.files[name], []).append(name)
        return found


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file, completely or not at all.

    The bytes are written from where they are: ``safetensors.torch.save_file`` would copy all of them, and an embedding
    may be most of what memory holds. (Format: 8 bytes with the length of a header in JSON, the header, the content.)

    Raises:
        InputError: it can't be written, or a tensor's type is not one of the format's.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _TYPES:
            raise InputError(f"{name} is of type {tensor.dtype}, which is not written layer by layer")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    made = file.with_name(f"{TEMPORARY}{file.name}")
    with writing(file):
        try:
            with made.open("wb") as stream:
                stream.write(len(text).to_bytes(8, "little") + text)
                for _, tensor in ordered:
                    stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                stream.flush()
                os.fsync(stream.fileno())
            made.replace(file)
        finally:
            made.unlink(missing_ok=True)


_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_index(folder: Path, files: Iterable[str]) -> Shards:
    """Write the index of some files in a folder, from which ``from_pretrained`` loads them, and return them.

    Raises:
        InputError: a file is damaged, or the index can't be written.
    """
    found = {name: file for file in files for name in _names(folder / file)}
    size = sum((folder / file).stat().st_size for file in set(found.values()))
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(found.items()))}
    write_whole(folder / INDEX, json.dumps(content, indent=2) + "\n")
    return Shards(folder, found)


def _names(file: Path) -> list[str]:
    """The names of the tensors in a file."""
    with _opened(file) as content:
        return list(content.keys())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; errors name it."""
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} can't be read as safetensors: {error}") from error
