"""Huge numbers that stand for nothing (masked scores, masks that are added) do not drown what means something."""

from __future__ import annotations

import math

import pytest
import torch
from nets import images
from torch import Tensor, nn

import lbyl
from lbyl.moments.input_scales import input_scales
from lbyl.moments.synthesis import synthesize
from lbyl.runtime.forecast import scores_error
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.output_error import outputs_error
from lbyl.surgery.verification import difference

LEAST = torch.finfo(torch.float32).min
VALUES = [-math.inf, LEAST, torch.finfo(torch.float16).min, -1e9]


class MasksScores(nn.Module):
    """Three of ten scores are masked."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.a, self.b, self.value = nn.Linear(6, 24), nn.Linear(24, 10), value

    def forward(self, x: Tensor) -> Tensor:
        scores = self.b(self.a(x).relu())
        return scores.masked_fill(torch.arange(10) > 6, self.value)


class TakesMask(nn.Module):
    """Attention whose scores a given mask is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 24), nn.Linear(24, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = (x @ x.transpose(1, 2) + mask).softmax(-1)
        return self.head(weights @ self.b(self.a(x).relu()))


@pytest.mark.parametrize("value", VALUES)
def test_masked_scores_count_neither_as_error_nor_as_magnitude(value: float) -> None:
    torch.manual_seed(0)
    net, x = MasksScores(value).eval(), images(64, 6)
    with torch.no_grad():
        whole = net(x)
        other = torch.where(torch.arange(10) > 6, whole, whole + images(64, 10, seed=2))
    alone = outputs_error(whole[:, :7], other[:, :7])
    assert outputs_error(whole, other) == pytest.approx(alone, rel=0.05)
    assert scores_error(whole, other) == pytest.approx(scores_error(whole[:, :7], other[:, :7]), rel=1e-6)
    gap = (whole - other)[:, :7].abs().max() / whole[:, :7].abs().max()
    assert difference([whole], [other]) == pytest.approx(float(gap), rel=1e-5)
    assert difference([whole], [whole.nan_to_num(neginf=0).clamp_min(-100)]) == math.inf  # no longer masked

    result = lbyl.compress(net, x, ratio=0.5, restore=lbyl.LeastSquares(lbyl.Noise(64)), forecast=False)
    assessment = result.report.assessment
    assert assessment is not None
    assert 0.01 < assessment.restored < assessment.pruned
    assert result.report.verified is not None
    assert result.report.verified < 1e-6
    assert torch.equal(result.model(x) == value, whole == value)


@pytest.mark.parametrize("value", VALUES)
def test_a_mask_that_is_added_stays_as_it_is_in_probes(value: float) -> None:
    mask = torch.zeros(1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), value)
    inputs = ExampleInputs((images(1, 5, 6), mask))
    net = TakesMask().eval()
    scales = input_scales(net, inputs)
    made = synthesize(net, inputs, 8, lambda shape, generator: torch.ones(shape), torch.Generator(), scales)
    assert not scales.note
    assert torch.equal(made.tensors()[1], mask.expand(8, 5, 5))
    assert made.tensors()[0].shape == (8, 5, 6)


def test_data_may_hold_masks_of_the_least_number() -> None:
    torch.manual_seed(0)
    mask = torch.zeros(16, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), LEAST)
    data = lbyl.LeastSquares(lbyl.Data([(images(16, 5, 6, seed=seed), mask) for seed in (1, 2)]))
    result = lbyl.compress(TakesMask().eval(), (images(1, 5, 6), mask[:1]), ratio=0.5, restore=data, forecast=False)
    assert result.report.assessment is not None
    assert result.report.assessment.real


class ModelWithLoop(nn.Module):
    """Two parts around code that can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.second = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(torch.from_numpy(x.detach().numpy() * 2.0))


def test_data_reaches_the_parts_of_a_network_that_is_traced_in_parts() -> None:
    torch.manual_seed(0)
    net = ModelWithLoop().eval()
    read = (images(64, 6, seed=seed) + 3 for seed in (1, 2, 3))  # once only, though there are two parts
    x, seen = images(2, 6), images(200, 6, seed=9) + 3
    how = {"ratio": 0.5, "forecast": False}
    restored = lbyl.compress(net, x, restore=lbyl.LeastSquares(lbyl.Data(read)), **how)
    pruned = lbyl.compress(net, x, restore="prune", **how)
    assert {row.group for row in restored.report.rows} == {"first.0", "second.0"}
    with torch.no_grad():
        whole, one, other = (model(seen) for model in (net, restored.model, pruned.model))
    assert outputs_error(whole, one) < 0.5 * outputs_error(whole, other)
