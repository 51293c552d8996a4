"""Sizes of a model: parameters and multiply-accumulate operations."""

from __future__ import annotations

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lbyl.inputs import ExampleInputs
from lbyl.verification import outputs


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: ExampleInputs) -> int:
    """Multiply-accumulates of convolutions, linear layers and matrix products in one forward pass."""
    with FlopCounterMode(display=False) as counter:
        outputs(model, inputs)
    return counter.get_total_flops() // 2
