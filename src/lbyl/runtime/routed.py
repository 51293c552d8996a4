"""Calls of the experts of a mixture: what the router has chosen, and what a single expert computes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lbyl.runtime.experts import looped
from lbyl.runtime.intercept import FunctionInterceptor


@dataclass(frozen=True)
class Routed:
    """One call of experts: what a router has chosen for each token.

    Attributes:
        states: what the experts read.
        chosen: the experts of each token.
        weights: the factors of their outputs.
        order: the places of these three among the arguments.
    """

    states: Float[Tensor, "tokens channels"]
    chosen: Int[Tensor, "tokens places"]
    weights: Float[Tensor, "tokens places"]
    order: tuple[int, int, int] = (0, 1, 2)

    @staticmethod
    def of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Routed | None:
        """A call ``module(*args, **kwargs)`` of experts, or None if it does not look like one."""
        try:
            given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        except (TypeError, ValueError):
            return None
        matrices = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.dim() == 2}
        whole = [name for name, value in matrices.items() if not value.is_floating_point()]
        if len(whole) != 1 or len(matrices) != 3 or len(given) != 3:
            return None
        places = list(given)
        chosen = matrices.pop(whole[0])
        weights = [name for name, value in matrices.items() if value.shape == chosen.shape]
        if len(weights) != 1:
            return None
        factors = matrices.pop(weights[0])
        ((name, states),) = matrices.items()
        if len(states) != len(chosen):
            return None
        order = places.index(name), places.index(whole[0]), places.index(weights[0])
        return Routed(states, chosen, factors, order)

    def at(self, tokens: Tensor) -> Routed:
        """The same for some tokens."""
        return replace(self, states=self.states[tokens], chosen=self.chosen[tokens], weights=self.weights[tokens])

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The arguments of the call. They are given by position, as their names depend on how experts run."""
        ordered = sorted(
            zip(self.order, (self.states, self.chosen, self.weights), strict=True), key=lambda pair: pair[0]
        )
        return tuple(value for _, value in ordered)

    def of_expert(self, expert: int) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """The tokens that one expert gets, and the factors of its outputs."""
        tokens, places = torch.where(self.chosen == expert)
        return tokens, self.weights[tokens, places]


@dataclass(frozen=True)
class Single:
    """What one expert computes, without the router's factor.

    Attributes:
        output: its outputs.
        hidden: the inputs of its last product, or None if it has none with a slice of a stacked weight.
        weight: the name of the stacked weight of this product within the module.
    """

    output: Float[Tensor, "tokens channels"]
    hidden: Float[Tensor, "tokens neurons"] | None
    weight: str


class _LastProduct(FunctionInterceptor):
    """Remembers the last product of so many rows with a slice of one of a module's stacked weights, and its input."""

    def __init__(self, module: nn.Module, rows: int) -> None:
        super().__init__()
        self.rows = rows
        stacked = {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 3}
        self.stores = {p.untyped_storage().data_ptr(): name for name, p in stacked.items()}
        self.found: tuple[str, Tensor] | None = None

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor) and isinstance(out, Tensor):
            name = self.stores.get(args[1].untyped_storage().data_ptr())
            # A loop may also visit the experts without tokens.
            if name is not None and args[1].dim() == 2 and len(args[0]) == self.rows:
                self.found = name, args[0]
        return out


_PRODUCTS = (nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


def one_expert(module: nn.Module, routed: Routed, expert: int, states: Float[Tensor, "tokens channels"]) -> Single:
    """Run one expert on these states. The caller is within `lbyl.runtime.contexts.undisturbed`."""
    ones = routed.weights.new_ones(len(states), 1)
    alone = replace(
        routed, states=states, chosen=torch.full_like(ones, expert, dtype=routed.chosen.dtype), weights=ones
    )
    watch = _LastProduct(module, len(states))
    with looped(module), watch, torch.no_grad():
        output = module.forward(*alone.arguments)
    name, hidden = watch.found or ("", None)
    return Single(output, hidden, name)
