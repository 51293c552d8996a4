"""Sizes of a model: parameters and multiply-accumulate operations."""

from __future__ import annotations

from torch import nn

from lbyl.inputs import ExampleInputs, outputs
from lbyl.macs import MacCounter
from lbyl.modes import plain_attention


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: ExampleInputs) -> int:
    """Multiply-accumulates of convolutions, linear layers and matrix products in one forward pass."""
    with plain_attention(), MacCounter() as counter:
        outputs(model, inputs)
    return counter.total
