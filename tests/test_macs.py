"""The count of multiply-accumulates is PyTorch's own where PyTorch has one; whatever else multiplies is counted too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import Depthwise, images, mlp, residual, settle
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import lbyl
from lbyl.errors import InputError
from lbyl.runtime.contexts import plain_attention
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.latency import measure_latencies
from lbyl.runtime.macs import count_macs, macs_by_parameter, macs_by_shapes


def attention_flops(q, k, v, *rest, out_shape, **named) -> int:
    return sdpa_flop_count(q, k, v)


ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
"""PyTorch has the formula, but counts by it on other devices only."""


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
    with torch.no_grad(), plain_attention(), FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
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
        (lambda: nn.ConvTranspose2d(3, 4, 4, 2), (2, 3, 6, 6)),
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


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_weights_of_recurrent_layers_have_their_share(layer: Any) -> None:
    model, inputs = settle(layer(6, 8, batch_first=True)), ExampleInputs.of(torch.randn(2, 5, 6))
    found = macs_by_parameter(model, inputs, count_macs(model, inputs))
    expected = {name: 2 * 5 * p.numel() for name, p in model.named_parameters() if p.dim() == 2}
    assert {name: macs for name, macs in found.items() if macs} == pytest.approx(expected)


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


class Made(nn.Module):
    """A layer between two linear ones, as a function of what it is fed."""

    def __init__(self, layer: nn.Module | None, function) -> None:
        super().__init__()
        self.before, self.layer, self.function = nn.Linear(8, 16), layer, function

    def forward(self, x):
        return self.function(self.layer, self.before(x))


X = 10 * 8 * 16
OTHERS = {
    "lstm": (nn.LSTM(16, 32, batch_first=True), lambda m, x: m(x)[0], 10 * 4 * 32 * (16 + 32)),
    "two directions": (
        nn.LSTM(16, 32, bidirectional=True, batch_first=True),
        lambda m, x: m(x)[0],
        2 * 10 * 4 * 32 * (16 + 32),
    ),
    "gru": (nn.GRU(16, 32, batch_first=True), lambda m, x: m(x)[0], 10 * 3 * 32 * (16 + 32)),
    "rnn": (nn.RNN(16, 32, batch_first=True), lambda m, x: m(x)[0], 10 * 32 * (16 + 32)),
    "cell": (nn.LSTMCell(16, 32), lambda m, x: m(x[:, 0])[0], 4 * 32 * (16 + 32)),
    "bilinear": (nn.Bilinear(16, 16, 5), lambda m, x: m(x, x), 10 * 5 * 16 * 16),
    "attention": (
        None,
        lambda m, x: nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
        2 * 10 * 10 * 16,
    ),
    "einsum": (nn.Linear(16, 7), lambda m, x: torch.einsum("btc,dc->btd", x, m.weight), 10 * 16 * 7),
    "vector": (nn.Linear(16, 1), lambda m, x: x[0] @ m.weight[0], 10 * 16),
    "dot": (None, lambda m, x: x[0, 0] @ x[0, 1], 16),
    "baddbmm": (None, lambda m, x: torch.baddbmm(x @ x.mT, x, x.mT), 2 * 10 * 10 * 16),
    "addbmm": (None, lambda m, x: torch.addbmm(x[0] @ x[0].T, x, x.mT), 2 * 10 * 10 * 16),
    "distances": (None, lambda m, x: torch.cdist(x, x), 10 * 10 * 16),
    "transposed": (nn.ConvTranspose1d(16, 6, 3), lambda m, x: m(x.mT), 10 * 16 * 6 * 3),
    "grouped": (nn.Conv1d(16, 8, 3, groups=4), lambda m, x: m(x.mT), 8 * 8 * 4 * 3),
    "bilinear function": (nn.Bilinear(16, 16, 5), lambda m, x: nn.functional.bilinear(x, x, m.weight), 10 * 5 * 256),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whatever_multiplies_is_counted(name: str, dtype: torch.dtype) -> None:
    layer, function, expected = OTHERS[name]
    model, inputs = Made(layer, function).eval().to(dtype), ExampleInputs.of(images(1, 10, 8).to(dtype))
    assert count_macs(model, inputs) == macs_by_shapes(model, inputs) == X + expected


def test_deformable_convolutions_are_counted() -> None:
    from torchvision.ops import deform_conv2d

    class Deformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset, self.layer = nn.Conv2d(4, 18, 3, 1, 1), nn.Conv2d(4, 6, 3)

        def forward(self, x):
            return deform_conv2d(x, self.offset(x), self.layer.weight, padding=1)

    inputs = ExampleInputs.of(images(1, 4, 8, 8))
    assert count_macs(Deformed(), inputs) == 64 * 36 * 18 + 64 * 36 * 6


def test_what_is_not_counted_is_named() -> None:
    model = Made(nn.Linear(16, 16), lambda m, x: m(x) + torch.linalg.inv(torch.eye(16)).sum()).eval()
    notes = lbyl.compress(model, images(1, 10, 8), ratio=0.5, restore="prune", forecast=False).report.notes
    assert any("the MACs do not include" in note and "linalg_inv" in note for note in notes)
