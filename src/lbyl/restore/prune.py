"""Plain pruning without restoration: S = 0."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from lbyl.restore.base import Restoration, RestorationProblem, Restored
from lbyl.restore.closed_form import ClosedFormRestorer, terms_of
from lbyl.runtime.copying import tensors_of
from lbyl.selection.filters import Filters, describe
from lbyl.surgery.masking import Delivery, masks_of, nothing_delivered, with_masks


@dataclass(frozen=True)
class Prune(ClosedFormRestorer):
    """Plain pruning: no weight is restored. This is the baseline."""

    def deliver(
        self,
        filters: Filters,
        keep: Int[Tensor, " kept"],
        drop: Int[Tensor, " dropped"],
        generator: torch.Generator,
    ) -> Delivery:
        """S = 0."""
        return nothing_delivered(len(keep), len(drop))

    def restore(self, problem: RestorationProblem) -> Restoration:
        """Return no new weights, only ``masks`` that set dropped columns to zero in the uncut network."""
        rows, selection, state = [], problem.selection, tensors_of(problem.model)
        for index, choice in enumerate(selection.choices):
            started = time.perf_counter()
            nothing = nothing_delivered(len(choice.keep), len(choice.drop))
            terms = terms_of(choice, choice.filters or describe(choice.group, state), nothing, problem.seed)
            rows.append(Restored(choice.group.name, terms, time.perf_counter() - started, ""))
            if problem.progress:
                problem.progress("restoring", index + 1, len(selection.choices))
        return Restoration(with_masks({}, selection, state), tuple(rows), masks=masks_of(selection))
