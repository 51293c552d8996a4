"""Probes at the network's own scale."""

from __future__ import annotations

import pytest
import torch
from nets import settle
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import lbyl
from lbyl.moments.base import ProbeSource
from lbyl.moments.feature_scales import feature_scales
from lbyl.moments.input_scales import input_scales
from lbyl.moments.preprocessing import standardization
from lbyl.runtime.inputs import ExampleInputs


def images(*span: float, count: int = 1, size: int = 16) -> Tensor:
    low, high = span
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 3, size, size, generator=generator) * (high - low) + low


def plain() -> nn.Sequential:
    return settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))


def seen(model: nn.Module, example: Tensor, source: ProbeSource) -> tuple[Tensor, str]:
    made = source.probes(model, ExampleInputs.of(example), torch.Generator().manual_seed(0), None)
    return torch.cat([batch.tensors()[0] for batch in made.batches]), made.note


SOURCES = [lbyl.Noise(64), lbyl.Photographs(32), lbyl.Dream(images=8, steps=1)]


@pytest.mark.parametrize("source", SOURCES, ids=["noise", "photographs", "dream"])
@pytest.mark.parametrize("span", [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0), (10.0, 14.0)], ids=str)
def test_without_batch_norms_the_examples_range_is_kept(source: ProbeSource, span: tuple[float, float]) -> None:
    probes, note = seen(plain(), images(*span), source)
    width = span[1] - span[0]
    beyond = 0.3 * width if isinstance(source, lbyl.Dream) else 0.0  # dreams move, but not far
    assert float(probes.min()) >= span[0] - beyond
    assert float(probes.max()) <= span[1] + beyond
    assert float(probes.std()) > 0.15 * width
    assert "estimated from the example" in note


@pytest.mark.parametrize(
    "example",
    [
        torch.zeros(1, 3, 16, 16),
        torch.ones(1, 3, 16, 16),
        torch.randn(1, 3, 16, 16),
        0.6 * torch.randn(1, 3, 16, 16) - 1,
    ],
    ids=["zeros", "ones", "normal", "a dark normalized image"],
)
def test_an_example_that_says_nothing_or_is_normalized(example: Tensor) -> None:
    probes, note = seen(plain(), example, lbyl.Photographs(32))
    assert abs(float(probes.mean())) < 0.2
    assert abs(float(probes.std()) - 1) < 0.2
    assert note == ""


def with_norm(mean: tuple[float, ...], deviation: float) -> nn.Module:
    """A network that was trained on inputs of such a mean and deviation: so its first batch norm says."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(len(mean), 16, 3), nn.BatchNorm2d(16, momentum=None), nn.ReLU(), nn.Conv2d(16, 4, 3))
    shape = (1, -1, 1, 1)
    for _ in range(4):
        net(torch.randn(16, len(mean), 16, 16) * deviation + torch.tensor(mean).reshape(shape))
    return net.eval()


@pytest.mark.parametrize("mean", [(120.0,), (123.0, 117.0, 104.0), (50.0, 60.0, 70.0, 80.0)], ids=str)
def test_the_first_batch_norm_tells_the_mean_of_each_channel(mean: tuple[float, ...]) -> None:
    example = torch.zeros(1, len(mean), 16, 16)  # which says nothing
    probes, note = seen(with_norm(mean, 60.0), example, lbyl.Noise(64))
    found = probes.mean((0, 2, 3))
    assert torch.allclose(found, torch.tensor(mean), rtol=0.2)
    assert 20 < float(probes.std((0, 2, 3)).mean()) < 240
    assert "first batch norm" in note


def test_batch_norms_bring_normalized_inputs_to_scale_themselves() -> None:
    example = images(0, 1)
    probes, note = seen(with_norm((0.3, -0.2, 0.1), 0.8), example, lbyl.Photographs(32))
    assert abs(float(probes.std()) - 1) < 0.2
    assert note == ""


class Logarithm(nn.Module):
    """Inputs that are not positive end in NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.body = plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.log(x))


def test_inputs_stay_legal() -> None:
    report = lbyl.compress(Logarithm().eval(), images(0.5, 2.0), ratio=0.5, forecast=False).report
    assert report.assessment is not None
    assert report.assessment.restored < report.assessment.pruned < 1.5


class Standardizes(nn.Module):
    """A small network whose code standardizes its inputs."""

    def __init__(self, mean: Tensor, deviation: Tensor, net: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.deviation)


def rows() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


MEANS = torch.linspace(-3, 1e5, 12)
DEVIATIONS = torch.logspace(-3, 3, 12)


def scale_of(model: nn.Module, example: Tensor) -> tuple[Tensor, Tensor, int]:
    scale = input_scales(model.eval(), ExampleInputs.of(example)).scales[0]
    return scale.mean, scale.deviation, scale.axis


@pytest.mark.parametrize("count", [1, 2, 64])
def test_what_the_code_subtracts_and_divides_by_is_the_scale(count: int) -> None:
    mean, deviation, _ = scale_of(Standardizes(MEANS, DEVIATIONS, rows()), torch.randn(count, 12) * DEVIATIONS + MEANS)
    torch.testing.assert_close(deviation, DEVIATIONS, rtol=1e-2, atol=0)
    assert bool(((mean - MEANS).abs() < 0.1 * DEVIATIONS.clamp_min(1)).all())


def test_a_features_scale_is_found_behind_transposed_channels_and_in_images() -> None:
    last = Standardizes(MEANS, DEVIATIONS, rows())
    _, deviation, axis = scale_of(last, torch.randn(2, 9, 12) * DEVIATIONS + MEANS)
    assert axis == 2
    torch.testing.assert_close(deviation, DEVIATIONS, rtol=1e-2, atol=0)
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    net = Standardizes(mean[:, None, None], spread[:, None, None], plain())
    found, deviation, axis = scale_of(net, images(0, 1))
    assert axis == 1
    torch.testing.assert_close(found, mean, rtol=1e-3, atol=0)
    torch.testing.assert_close(deviation, spread, rtol=1e-3, atol=0)


def test_a_change_of_units_says_nothing_about_the_scale() -> None:
    net = Standardizes(torch.zeros(1), torch.full((1,), 255.0), plain())
    mean, deviation, _ = scale_of(net, images(0, 255))
    assert len(mean) == len(deviation) == 1
    assert 40 < float(deviation) < 80


@pytest.mark.parametrize("turned", [False, True])
def test_a_batch_norm_on_the_input_says_the_scale(turned: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.net = nn.BatchNorm1d(12), rows()
            self.norm.running_mean, self.norm.running_var = MEANS.clone(), DEVIATIONS.square()

        def forward(self, x: Tensor) -> Tensor:
            if not turned:
                return self.net(self.norm(x))
            return self.net(self.norm(x.transpose(1, 2)).transpose(1, 2))

    shape = (2, 9, 12) if turned else (2, 12)
    mean, deviation, axis = scale_of(Net(), torch.randn(shape))
    assert axis == len(shape) - 1
    torch.testing.assert_close(mean, MEANS)
    torch.testing.assert_close(deviation, DEVIATIONS)


@pytest.mark.parametrize("shape", [(64, 12), (8, 12), (4, 30), (2, 12, 40), (2, 40, 12)])
def test_features_with_scales_of_their_own(shape: tuple[int, ...]) -> None:
    features = 12 if 12 in shape else 30
    scales = torch.logspace(-2, 2, features)
    axis = shape.index(features)
    view = [features if each == axis else 1 for each in range(len(shape))]
    scale = feature_scales(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scales.reshape(view))
    assert scale is not None
    assert scale.axis == axis
    assert float((scale.deviation / scales).log().abs().mean()) < 0.5


def test_of_one_row_only_magnitudes_are_known() -> None:
    row = torch.logspace(-5, 5, 30)[None]
    scale = feature_scales(row)
    assert scale is not None
    torch.testing.assert_close(scale.deviation, row[0] / 2)
    assert scale.low == 0


@pytest.mark.parametrize(
    "shape", [(1, 30), (2, 30), (4, 8), (16, 30), (300, 4), (2, 3, 16, 16), (4, 12, 64), (1, 1, 99)]
)
def test_features_of_one_scale_stay_together(shape: tuple[int, ...]) -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        assert feature_scales(torch.randn(shape, generator=generator)) is None
        assert feature_scales(torch.rand(shape, generator=generator)) is None


def test_a_table_with_columns_of_many_scales_is_restored() -> None:
    """Two networks on 30 raw measurements, from 0.003 to 4,000: standardized by a batch norm, or by the code."""
    table = load_breast_cancer()
    x, y = torch.tensor(table.data, dtype=torch.float32), torch.tensor(table.target)
    for first in (nn.BatchNorm1d(30), None):
        torch.manual_seed(0)
        layers = nn.Sequential(*[nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)])
        net = nn.Sequential(first, layers) if first else Standardizes(x.mean(0), x.std(0), layers)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(200):
            some = torch.randint(400, (128,))
            loss = nn.functional.cross_entropy(net(x[some]), y[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        net.eval()
        for ratio in (0.3, 0.6):
            smaller = lbyl.compress(net, x[:4], ratio=ratio, forecast=False).model
            with torch.no_grad():
                assert float((net(x).argmax(1) == smaller(x).argmax(1)).float().mean()) > 0.95


def test_tiny_inputs_and_features_that_are_zero_have_no_scale_of_their_own() -> None:
    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = rows()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x / 1e-20)

    example = 1e-20 * torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    example[:, 3] = 0
    assert standardization(Divides().eval(), ExampleInputs.of(example), 0) is None


def test_complex_inputs_vary_at_the_scale_of_the_example() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(torch.view_as_real(x).flatten(1))

    torch.manual_seed(0)
    net, x = Complex().eval(), 7 * torch.randn(64, 12, dtype=torch.complex64)
    probes, _ = seen(net, x[:2], lbyl.Noise(64))
    assert probes.is_complex()
    assert 3 < float(probes.abs().square().mean().sqrt()) < 20
    smaller, pruned = (
        lbyl.compress(net, x[:2], ratio=0.5, forecast=False, **settings).model
        for settings in ({}, {"restore": "prune"})
    )
    with torch.no_grad():
        errors = [float((model(x) - net(x)).norm()) for model in (smaller, pruned)]
    assert errors[0] < errors[1]
