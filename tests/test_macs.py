"""The count of multiply-accumulates is PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from nets import Depthwise, images, mlp, residual, settle
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lbyl.inputs import ExampleInputs
from lbyl.measure import count_macs
from lbyl.modes import plain_attention


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (mlp, (2, 6)),
        (residual, (2, 3, 6, 6)),
        (Depthwise, (2, 3, 6, 6)),
        (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), (2, 5, 8)),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_the_count_is_pytorchs_own(build, shape, inference: bool) -> None:
    model, x = settle(build()), images(*shape)
    with torch.no_grad(), plain_attention(), FlopCounterMode(display=False) as counter:
        model(x)
    with torch.inference_mode(inference):
        assert count_macs(model, ExampleInputs.of(x)) == counter.get_total_flops() // 2 > 0
