"""Chooses the blocks that are dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

Effects = Callable[[tuple[str, ...]], float]
"""The effect on the network's output when these blocks are dropped."""


def influence(x: Float[Tensor, "positions channels"], y: Float[Tensor, "positions channels"]) -> float:
    """ShortGPT's block influence (arXiv 2403.03853, eq. 1): one minus the mean cosine between input and output.

    >>> round(influence(torch.eye(2), 2 * torch.eye(2)), 6)
    0.0
    """
    return 1 - float(torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).mean())


@dataclass(frozen=True)
class Chosen:
    """The dropped blocks, in the order in which they were chosen.

    Attributes:
        blocks: their paths.
        alone: the effect of each block of the network when it alone is dropped.
        together: the effect of the first one, of the first two, and so on.
    """

    blocks: tuple[str, ...] = ()
    alone: Mapping[str, float] = field(default_factory=dict)
    together: tuple[float, ...] = ()

    def first(self, count: int) -> Chosen:
        """The first ``count`` of them."""
        return Chosen(self.blocks[:count], self.alone, self.together[:count])


_NEXT = 4
"""So many of the blocks with the least effect are tried at each step."""


def choose_blocks(
    candidates: Sequence[str],
    allowed: Callable[[tuple[str, ...]], bool],
    enough: Callable[[tuple[str, ...]], bool],
    effect: Effects,
) -> Chosen:
    """Choose blocks one by one, until they are enough.

    Each block is scored alone. Then, at each step, those with the least scores are scored once more together with the
    blocks that were chosen already, and the one with the least effect is chosen.

    Args:
        candidates: the paths of the blocks.
        allowed: whether some blocks may be dropped together.
        enough: whether some blocks are enough.
        effect: measures the effect of dropping blocks.
    """
    alone = {name: effect((name,)) for name in candidates}
    chosen: tuple[str, ...] = ()
    together: list[float] = []
    while not enough(chosen):
        left = [name for name in candidates if name not in chosen and allowed((*chosen, name))]
        if not left:
            break
        tried = sorted(left, key=lambda name: alone[name])[:_NEXT]
        found = {name: effect((*chosen, name)) if chosen else alone[name] for name in tried}
        best = min(found, key=lambda name: found[name])
        chosen, together = (*chosen, best), [*together, found[best]]
    return Chosen(chosen, alone, tuple(together))


def choose_run(
    chosen: Chosen,
    candidates: Sequence[str],
    allowed: Callable[[tuple[str, ...]], bool],
    enough: Callable[[tuple[str, ...]], bool],
    effect: Effects,
) -> Chosen:
    """Choose one run of neighbors, the shortest from each first block that is enough, with the least effect.

    A single least-squares problem replaces a run (ReplaceMe, arXiv 2505.02819), so a run may be restored better than
    blocks that have less effect before restoration. There is no such run if ``blocks`` of the result is empty.

    Args:
        chosen: the result of :func:`choose_blocks`, whose effects of single blocks are taken over.
        candidates: the paths of the blocks in execution order.
        allowed: whether some blocks may be dropped together.
        enough: whether some blocks are enough.
        effect: measures the effect of dropping blocks.
    """
    found: dict[tuple[str, ...], float] = {}
    for start in range(len(candidates)):
        run = candidates[start : start + 1]
        for name in candidates[start + 1 :]:
            if enough(tuple(run)) or not _follows(run[-1], name):
                break
            run = [*run, name]
        if len(run) > 1 and enough(tuple(run)) and allowed(tuple(run)):
            found[tuple(run)] = effect(tuple(run))
    if not found:
        return Chosen((), chosen.alone)
    best = min(found, key=lambda run: found[run])
    together = [effect(best[:count]) for count in range(1, len(best))]
    return Chosen(best, chosen.alone, (*together, found[best]))


def _follows(first: str, second: str) -> bool:
    """Whether a block is the next one in the same list."""
    (stack, _, one), (other, _, two) = first.rpartition("."), second.rpartition(".")
    return stack == other and one.isdecimal() and two.isdecimal() and int(two) == int(one) + 1
