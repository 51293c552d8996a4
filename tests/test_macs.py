"""The count of multiply-accumulates is PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from nets import Depthwise, images, mlp, residual, settle
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lbyl.errors import InputError
from lbyl.runtime.contexts import plain_attention
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.latency import measure_latencies
from lbyl.runtime.macs import count_macs, macs_by_parameter, macs_by_shapes


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
        inputs = ExampleInputs.of(x)
        assert count_macs(model, inputs) == macs_by_shapes(model, inputs) == counter.get_total_flops() // 2 > 0


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (mlp, (2, 6)),
        (residual, (2, 3, 6, 6)),
        (lambda: nn.Conv2d(3, 4, 3, padding="same"), (3, 6, 8)),  # one image, without a batch axis
        (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), (2, 5, 8)),
    ],
)
def test_layers_parameters_and_the_whole_agree(build, shape) -> None:
    model, inputs = settle(nn.Sequential(build())), ExampleInputs.of(images(*shape))
    total = count_macs(model, inputs)
    by_parameter = macs_by_parameter(model, inputs, total)
    assert sum(by_parameter.values()) == total > 0
    (found,) = measure_latencies([model], inputs, runs=3, warm_up=0)
    assert found.macs == total
    for layer in found.layers:
        if layer.kind in ("Conv2d", "Linear"):
            assert layer.macs == by_parameter[f"{layer.name}.weight"]


class Picky(nn.Module):
    """Takes no zeros where its layer should have computed something."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.runs = nn.Conv2d(3, 4, 3), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        y = self.layer(x)
        if not bool(y.any()):
            raise ValueError("nothing there")
        return y


def test_layers_are_computed_only_where_they_have_to_be() -> None:
    model, inputs = Picky(), ExampleInputs.of(images(1, 3, 6, 6))
    assert macs_by_shapes(model, inputs) == count_macs(model, inputs) == 4 * 16 * 27
    assert model.runs == 3  # once with zeros, in vain


def test_what_does_not_run_is_an_error() -> None:
    with pytest.raises(InputError, match="does not run"):
        macs_by_shapes(residual(), ExampleInputs.of(images(1, 5, 6, 6)))
