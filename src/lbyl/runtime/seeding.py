"""Random generators that depend on a seed and a name, and samples drawn with them."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator for one name, such as a group's, so that no group's draws depend on another group."""
    return torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63)


def sample_positions(available: int, wanted: int, generator: torch.Generator) -> Tensor | None:
    """The indices of a random sample of positions, or None if all ``available`` ones are to be used."""
    return None if available <= wanted else torch.randperm(available, generator=generator)[:wanted]
