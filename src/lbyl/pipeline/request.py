"""The arguments of a compression."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lbyl.budget.budget import Budget
from lbyl.errors import InputError
from lbyl.moments.token_inputs import token_ids
from lbyl.restore.base import Restorer
from lbyl.restore.closed_form import Delivers
from lbyl.restore.registry import DEFAULT, check_effort, choose_restorer, resolve_restorer
from lbyl.runtime.checks import check_seed, check_switch, named_kind
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.latency import check_runtime
from lbyl.runtime.progress import Progress
from lbyl.selection.criteria.auto import choose_criterion
from lbyl.selection.criteria.base import Criterion, SeeingCriterion, resolve_criterion
from lbyl.selection.select import Ratio, check_scope

Restore = str | Restorer | Delivers
"""A user's choice of restorer: "auto", a short name, a restorer, or an object with a ``deliver`` method."""


def named_restorer(restore: Restore) -> Restorer | None:
    """The requested restorer; None for "auto".

    Raises:
        InputError: the name is unknown, or the object is not a restorer.
    """
    return None if isinstance(restore, str) and restore == "auto" else resolve_restorer(restore)


def named_criterion(criterion: str | Criterion | SeeingCriterion) -> Criterion | SeeingCriterion | None:
    """The requested criterion; None for "auto".

    Raises:
        InputError: the name is unknown, or the object is not a criterion.
    """
    return None if isinstance(criterion, str) and criterion == "auto" else resolve_criterion(criterion)


@dataclass(frozen=True)
class CompressionRequest:
    """The arguments of `lbyl.compress`; ``criterion`` and ``restore`` are None for "auto"."""

    ratio: Ratio
    budget: Budget | None
    scope: str
    criterion: Criterion | SeeingCriterion | None
    restore: Restorer | None
    seed: int
    verify: bool
    strict: bool
    source: str | None
    progress: Progress | None
    forecast: bool = True
    effort: str = DEFAULT

    def __post_init__(self) -> None:
        if isinstance(self.budget, float):
            raise InputError(
                f"budget={self.budget} does not say of what: pass lbyl.Budget(macs={self.budget}), a share of the "
                f"multiply-accumulates, or of something else; ratio={self.budget} is the share of channels that go"
            )
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise InputError(f"budget is {named_kind(self.budget)}; pass lbyl.Budget(macs=0.5)")
        if self.budget is not None:
            check_runtime(self.budget.runtime)
        check_scope(self.scope)
        check_seed(self.seed)
        object.__setattr__(self, "seed", int(self.seed))  # a NumPy integer can't be written to a plan
        check_switch("verify={}", self.verify)
        check_switch("strict={}", self.strict)
        check_switch("forecast={}", self.forecast)
        check_effort(self.effort)
        if self.effort != DEFAULT and self.restore is not None:
            raise InputError(f"effort={self.effort!r} is for restore='auto'; leave out either of them")
        if self.source is not None and not isinstance(self.source, str):
            raise InputError(f"source is {named_kind(self.source)}; write a text such as timm:resnet18, or None")
        if self.progress is not None and not callable(self.progress):
            raise InputError(f"progress is {named_kind(self.progress)}; pass a function of stage, done and total")

    def restorer(self, model: nn.Module, inputs: ExampleInputs) -> tuple[Restorer, str]:
        """The restorer for a model, and a note that says why "auto" chose it."""
        return choose_restorer(model, inputs, self.effort) if self.restore is None else (self.restore, "")

    def scoring(
        self, model: nn.Module, inputs: ExampleInputs, restorer: Restorer
    ) -> tuple[Criterion | SeeingCriterion, str]:
        """The criterion for a model and a restorer, and a note that says why "auto" chose it."""
        named = self.criterion
        if named is not None:
            return named, ""
        lifelike, texts = restorer.takes_lifelike_probes(inputs), token_ids(inputs) is not None
        criterion, why = choose_criterion(model, restorer.takes_probes, lifelike, texts)
        return criterion, "" if restorer.chooses else why
