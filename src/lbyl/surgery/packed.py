"""Kept channels as short text, for the documents of networks with millions of them.

The channels of a language model with 70 billion parameters take 50 MiB as a list of numbers, and 2 MiB as bits.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

SHORT = 64
"""Lists of at most so many channels stay lists, which people can read."""
_MOST = 2**24
"""Channels that the texts of one document may stand for: twice those of a model with 405 billion parameters."""


def packed(keep: Sequence[int]) -> list[int] | str:
    """Rising channels as a list, or if there are many, as text: base64 of bits, the lowest bit of each byte first.

    >>> packed([0, 2, 3])
    [0, 2, 3]
    >>> packed(range(66))
    '//////////8D'
    """
    if len(keep) <= SHORT or any(a >= b for a, b in pairwise(keep)):
        return list(keep)
    bits = np.zeros(keep[-1] + 1, dtype=bool)
    bits[np.asarray(keep)] = True
    return base64.b64encode(np.packbits(bits, bitorder="little").tobytes()).decode("ascii")


class Unpacking:
    """Reads the texts of one document, which may come from an untrusted source.

    Equal texts are read once, and give the same list: all weights that read one group keep the same channels.
    """

    def __init__(self) -> None:
        self._known: dict[str, list[int]] = {}
        self._count = 0

    def channels(self, text: str) -> list[int]:
        """The channels that a text stands for.

        Raises:
            ValueError: it is no such text, or the document stands for more channels than any network has.
        """
        if text in self._known:
            return self._known[text]
        content = np.frombuffer(base64.b64decode(text.encode("ascii"), validate=True), dtype=np.uint8)
        bits = np.unpackbits(content, bitorder="little")
        self._count += int(np.count_nonzero(bits))
        if self._count > _MOST:
            raise ValueError(f"more than {_MOST:,} channels")
        return self._known.setdefault(text, np.flatnonzero(bits).tolist())
