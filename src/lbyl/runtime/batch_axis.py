"""Finds layers that see several rows for each input, such as windows or tokens that were flattened into the batch."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lbyl.runtime.forward import CONVOLUTIONS
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.intercept import FunctionInterceptor, leading_arguments


def rows_per_input(model: nn.Module, inputs: ExampleInputs) -> frozenset[int]:
    """How many rows layers see for each input, where rows of one input are neighbors.

    The network is run on two inputs, and then with the second one replaced by a third. If tokens were flattened into
    the batch (``[inputs, tokens, channels]`` to ``[inputs * tokens, channels]``), only the second half of the rows
    changes. If another axis came first, rows of the inputs are mixed, and the number is left out; so it is if any of
    the convolutions, linear layers and batch norms with as many rows mixes them.

    Args:
        model: the network in evaluation mode; nothing in it is changed.
        inputs: at least three inputs; with fewer, or if the network takes a fixed number, the result is ``{1}``.
    """
    if inputs.size < 3 or inputs.rows is not None:
        return frozenset([1])
    first, second = (_seen(model, inputs.taking(index)) for index in ([0, 1], [0, 2]))
    fits: dict[int, list[bool]] = defaultdict(list)
    for before, after in zip(first, second, strict=False):
        if len(before) % 2 or after.shape != before.shape:
            continue
        half = len(before) // 2
        same = torch.equal(before[:half], after[:half])
        fits[half].append(same and not torch.equal(before[half:], after[half:]))
    return frozenset([1, *(rows for rows, found in fits.items() if all(found))])


class _Inputs(FunctionInterceptor):
    """Copies what convolutions, linear layers and batch norms are given, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _LAYERS:
            (x,) = leading_arguments(args, kwargs, "input")
            self.found.append(x.clone())
        return func(*args, **kwargs)


_LAYERS = (functional.linear, functional.batch_norm, *CONVOLUTIONS)


def _seen(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    with torch.no_grad(), _Inputs() as watched:
        inputs.cloned().call(model)
    return watched.found
