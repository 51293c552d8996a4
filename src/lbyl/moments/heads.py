"""Moments inside heads: of queries, of keys, and of the values that attention has mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lbyl.graph.heads import Call, HeadActivations, Heads
from lbyl.runtime.attended import Attended, attended_positions
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.intercept import module_hooks
from lbyl.runtime.memory import give_back


@dataclass
class Sums:
    """Sums over positions of one quantity inside the heads of a layer, in float64."""

    count: int
    first: Float[Tensor, "heads channels"]
    second: Float[Tensor, "heads channels channels"]

    @staticmethod
    def zeros(heads: Heads) -> Sums:
        """Sums over no positions."""
        size = heads.size
        return Sums(0, torch.zeros(heads.count, size).double(), torch.zeros(heads.count, size, size).double())

    def add(
        self, x: Float[Tensor, "batch heads tokens channels"], counts: Bool[Tensor, " positions"] | None = None
    ) -> None:
        """Add positions: all, or those that count, which padding does not."""
        rows = x.detach().double().cpu().transpose(0, 1).flatten(1, 2)
        rows = rows if counts is None else rows[:, counts.cpu()]
        self.count += rows.shape[1]
        self.first += rows.sum(1)
        self.second += rows.transpose(1, 2) @ rows

    @property
    def mean(self) -> Float[Tensor, "heads channels"]:
        """The means."""
        return self.first / max(self.count, 1)

    def moments(self, centered: bool) -> Float[Tensor, "heads channels channels"]:
        """The second moments, about the means if ``centered``."""
        found = self.second / max(self.count, 1)
        return found - self.mean[:, :, None] * self.mean[:, None] if centered else found


@dataclass(frozen=True)
class HeadMoments:
    """The sums for one layer."""

    queries: Sums
    keys: Sums
    mixed: Sums


def head_moments(model: nn.Module, layers: Sequence[Heads], batches: Sequence[ExampleInputs]) -> dict[str, HeadMoments]:
    """Moments inside the heads of these layers on probes, by the path of the layer; the model is not changed."""
    found = {each.path: HeadMoments(Sums.zeros(each), Sums.zeros(each), Sums.zeros(each)) for each in layers}

    def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call = Call.of(module, args, kwargs)
        assert call is not None
        made = HeadActivations.of(described[path], module, call)
        counts = attended.get((call.x.shape[0], call.x.shape[1]))
        found[path].queries.add(made.queries, counts)
        found[path].keys.add(made.keys, counts)
        found[path].mixed.add(made.mixed, counts)

    attended: Attended = {}
    described = {each.path: each for each in layers}
    modules = {each.path: model.get_submodule(each.path) for each in layers}
    with undisturbed(model), torch.no_grad(), module_hooks(modules, enter):
        for batch in batches:
            attended = attended_positions(model, batch)
            batch.cloned().call(model)
            give_back()
    return found
