"""Sizes of a model: parameters and multiply-accumulate operations."""

from __future__ import annotations

import torch
from torch import nn

from lbyl.errors import InputError
from lbyl.inputs import ExampleInputs, outputs
from lbyl.macs import MacCounter, undivided
from lbyl.modes import plain_attention


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: ExampleInputs) -> int:
    """Multiply-accumulates of convolutions, linear layers and matrix products in one forward pass."""
    with plain_attention(), MacCounter() as counter:
        outputs(model, inputs)
    return counter.total


def macs_by_shapes(model: nn.Module, inputs: ExampleInputs) -> int:
    """The same where the model can be traced, so that shapes tell it all: layers are computed only if they have to be.

    Raises:
        InputError: the model does not run on inputs of these shapes.
    """
    try:
        with torch.no_grad(), plain_attention(), undivided(), MacCounter(spare=True) as counter:
            outputs(model, inputs)
        return counter.total
    except InputError:
        return count_macs(model, inputs)
