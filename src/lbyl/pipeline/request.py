"""What a compression was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from lbyl.budget.budget import Budget
from lbyl.restore.base import Restorer
from lbyl.restore.least_squares.settings import LeastSquares
from lbyl.restore.registry import choose_restorer, resolve_restorer
from lbyl.runtime.progress import Progress
from lbyl.selection.criteria.base import Criterion
from lbyl.selection.select import ByCriterion, Choose, Ratio


@dataclass(frozen=True)
class CompressionRequest:
    """The arguments of `lbyl.compress`, which explains them."""

    ratio: Ratio
    budget: Budget | None
    scope: str
    criterion: Criterion
    restore: str | Restorer | LeastSquares
    seed: int
    verify: bool
    strict: bool
    source: str | None
    progress: Progress | None

    def restorer(self, model: nn.Module) -> tuple[Restorer | LeastSquares, str]:
        """The restorer for a model, and why, where it was not named."""
        return choose_restorer(model) if self.restore == "auto" else (resolve_restorer(self.restore), "")

    def choose(self, restorer: Restorer | LeastSquares) -> Choose:
        """How kept channels are chosen: by the restorer where it does, else by the criterion."""
        own = getattr(restorer, "choose", None) if getattr(restorer, "chooses", False) else None
        return cast(Choose, own) or ByCriterion(self.criterion)
