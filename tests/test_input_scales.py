"""Probes at the network's own scale."""

from __future__ import annotations

import pytest
import torch
from nets import settle
from torch import Tensor, nn

import lbyl
from lbyl.moments.base import ProbeSource
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
