"""The user's own function that evaluates a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import ReferenceType, ref

import torch
from torch import nn

from lbyl.errors import InputError, LbylError
from lbyl.runtime.checks import named_kind
from lbyl.runtime.cluster import OWN_FILES
from lbyl.runtime.copying import copy_model

Evaluate = Callable[[nn.Module], float]
"""A user's function that returns a number for a network, larger for better networks."""


@dataclass(frozen=True)
class Judge:
    """The user's function, and its name. It may take long, so no network is evaluated twice."""

    evaluate: Evaluate | None
    _said: list[tuple[ReferenceType[nn.Module], float]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.evaluate is not None and not callable(self.evaluate):
            raise InputError(
                f"evaluate is {named_kind(self.evaluate)}; pass a function of a network that returns a number"
            )

    @property
    def name(self) -> str | None:
        """Module and name of the function; None without one."""
        if self.evaluate is None:
            return None
        named = self.evaluate if hasattr(self.evaluate, "__qualname__") else type(self.evaluate)
        return f"{str(named.__module__).removeprefix(OWN_FILES)}:{named.__qualname__}"

    def __call__(self, model: nn.Module, what: str) -> float | None:
        """Evaluate a copy of a model, in evaluation mode and without gradients; None without a function.

        Whatever the function does to its network, the model stays as it is.

        Raises:
            InputError: the function failed, or did not return a finite number; ``what`` names the model in the error.
        """
        if self.evaluate is None:
            return None
        for known, said in self._said:
            if known() is model:
                return said
        try:
            with torch.no_grad():
                said = float(self.evaluate(copy_model(model).eval()))
        except LbylError:
            raise
        except (Exception, SystemExit) as error:
            raise InputError(f"{self.name} failed on {what}: {type(error).__name__}: {error}") from error
        if not math.isfinite(said):
            raise InputError(f"{self.name} returned {said} for {what}; it must return a finite number")
        self._said.append((ref(model), said))
        return said
