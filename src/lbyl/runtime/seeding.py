"""Random generators that depend on a seed and a name, and what is drawn with them."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator of its own for every group, so that no group's draws depend on another group."""
    return torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63)


def sample_positions(available: int, wanted: int, generator: torch.Generator) -> Tensor | None:
    """A random sample of positions, or None for all of them."""
    return None if available <= wanted else torch.randperm(available, generator=generator)[:wanted]
