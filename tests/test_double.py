"""Layers in double precision that are computed in another way give what PyTorch gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lbyl.runtime.float64 import LARGE, Float64Mode, depthwise_conv2d
from lbyl.runtime.macs import MacCounter


@pytest.mark.parametrize(
    ("kernel", "settings"),
    [
        (3, {}),
        (3, {"padding": 1, "stride": 2}),
        ((5, 3), {"padding": (2, 0), "stride": (1, 3)}),
        (3, {"dilation": (2, 3), "padding": 4}),
        (1, {"stride": 2, "bias": False}),
        (7, {"padding": 3, "bias": False}),
        (3, {"padding": "same"}),
        (3, {"padding": 1, "padding_mode": "reflect"}),
    ],
)
@pytest.mark.parametrize("each", [1, 3])
def test_every_setting(kernel, settings, each):
    layer = nn.Conv2d(6, 6 * each, kernel, groups=6, **settings).double()
    x = torch.randn(2, 6, 11, 9, dtype=torch.float64)
    expected = layer(x)
    with Float64Mode():
        assert torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-14)


def test_it_is_used_where_it_should_be():
    def convolutions(layer: nn.Module, x: torch.Tensor) -> int:
        with torch.no_grad(), Float64Mode(), MacCounter() as counter:
            layer(x)
        return counter.total  # multiplications tap by tap don't count

    x = torch.randn(1, 6, 8, 8)
    depthwise, grouped, whole = (nn.Conv2d(6, 6, 3, groups=groups) for groups in (6, 3, 1))
    assert convolutions(depthwise.double(), x.double()) == 0
    assert all(convolutions(layer, x) for layer in (depthwise.float(), grouped, whole))
    assert all(convolutions(layer.double(), x.double()) for layer in (grouped, whole))


def test_a_channel_too_many_is_still_an_error():
    layer = nn.Conv2d(6, 6, 3, groups=6).double()
    with Float64Mode(), pytest.raises(RuntimeError, match="channels"):
        layer(torch.randn(1, 5, 8, 8, dtype=torch.float64))


def test_gradients_are_not_in_the_way():
    x, weight = torch.randn(1, 4, 5, 5, dtype=torch.float64), torch.randn(4, 1, 3, 3, dtype=torch.float64)
    layer = nn.Conv2d(4, 4, 3, groups=4, bias=False).double()
    layer.weight.data = weight
    found = depthwise_conv2d(x, layer.weight, None, (1, 1), (0, 0), (1, 1))
    assert torch.allclose(found, layer(x))
    assert found.requires_grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("outputs", [7, LARGE // 5 + 3], ids=["at once", "some at a time"])
def test_narrow_weights_of_linear_layers_meet_wide_inputs(shape, bias, outputs):
    layer = nn.Linear(5, outputs, bias=bias)
    x = torch.randn(*shape, dtype=torch.float64)
    with torch.no_grad(), Float64Mode():
        narrow = torch.nn.functional.linear(x, layer.weight, None if layer.bias is None else layer.bias.double())
        assert torch.allclose(narrow, layer.double()(x), rtol=1e-12, atol=1e-14)


def test_other_precisions_that_do_not_fit_are_still_an_error():
    x = torch.randn(2, 5)
    with Float64Mode(), pytest.raises(RuntimeError, match="dtype"):
        torch.nn.functional.linear(x, torch.randn(3, 5, dtype=torch.float64))
    with Float64Mode(), pytest.raises(RuntimeError, match="dtype"):
        torch.nn.functional.linear(x.half(), torch.randn(3, 5))
