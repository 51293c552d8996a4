"""Finds layers that see several rows for each input, such as windows or tokens that were flattened into the batch."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from lbyl.runtime.forward import ConsumerCall, run_intercepted
from lbyl.runtime.inputs import ExampleInputs


def rows_per_input(model: nn.Module, inputs: ExampleInputs) -> frozenset[int]:
    """How many rows convolutions and linear layers see for each input, where rows of one input are neighbors.

    The network is run on two inputs, and then with the second one replaced by a third. If the batch is split off last
    (``[inputs, tokens, channels]`` to ``[inputs * tokens, channels]``), only the second half of the rows changes. If
    another axis comes first, rows of the inputs are mixed, and the number is left out; so it is if any layer with as
    many rows mixes them.

    Args:
        model: the network in evaluation mode; nothing in it is changed.
        inputs: at least three inputs; with fewer, or if the network takes a fixed number, the result is ``{1}``.
    """
    if inputs.size < 3 or inputs.rows is not None:
        return frozenset([1])
    first, second = (_seen(model, inputs.taking(index)) for index in ([0, 1], [0, 2]))
    fits: dict[int, list[bool]] = defaultdict(list)
    for name, before in first.items():
        after = second.get(name)
        if len(before) % 2 or after is None or after.shape != before.shape:
            continue
        half = len(before) // 2
        same = torch.equal(before[:half], after[:half])
        fits[half].append(same and not torch.equal(before[half:], after[half:]))
    return frozenset([1, *(rows for rows, found in fits.items() if all(found))])


def _seen(model: nn.Module, inputs: ExampleInputs) -> dict[str, Tensor]:
    """The first input of each layer, by the name of its weight."""
    found: dict[str, Tensor] = {}

    def on_consumer(call: ConsumerCall) -> None:
        found.setdefault(call.weight, call.x.clone())

    with torch.no_grad():
        run_intercepted(model, inputs.cloned(), on_consumer=on_consumer, everywhere=True)
    return found
