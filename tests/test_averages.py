"""Norms that divide by a mean over all channels lose channels exactly: the weight and the constant make up for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nets import images
from torch import Tensor, nn

import lbyl

EPS = 0.3  # large, so that a constant that does not follow is seen


class Response(nn.Module):
    """Global response norm, as ConvNeXt V2 has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = EPS
        self.weight, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(p=2, dim=(2, 3), keepdim=True)
        relative = size / (size.mean(dim=1, keepdim=True) + self.eps)
        return x + torch.addcmul(self.bias.view(1, -1, 1, 1), self.weight.view(1, -1, 1, 1), x * relative)


class RootMeanSquare(nn.Module):
    """RMS norm, as Llama has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.variance_epsilon = EPS
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


class Shifted(RootMeanSquare):
    """As Gemma has it: the weight is not what the norm multiplies with."""

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class Stream(nn.Module):
    """A residual stream with a norm before each layer."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.table = nn.Linear(6, 12)
        self.norms = nn.ModuleList([norm(12), norm(12)])
        self.up, self.down, self.head = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        return self.head(self.norms[1](x + self.down(torch.relu(self.up(self.norms[0](x))))))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.GELU(), Response(12), nn.Conv2d(12, 4, 1), nn.Flatten())


def built(build, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().eval()


EXACT = {
    "response": (convolutions, (2, 3, 6, 6), "0", (12, 8)),
    "root mean square": (lambda: Stream(RootMeanSquare), (2, 5, 6), "table", (12, 8)),
    "torch's own": (lambda: Stream(lambda width: nn.RMSNorm(width, EPS)), (2, 5, 6), "table", (12, 8)),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_cut_is_exact_and_loads(name: str, tmp_path: Path) -> None:
    build, shape, group, widths = EXACT[name]
    model, x = built(build), images(*shape)
    result = lbyl.compress(model, x, ratio=1 / 3, scope="all", restore="prune", strict=True, forecast=False)
    assert {row.group: (row.before, row.after) for row in result.report.rows}[group] == widths
    assert result.report.verified is not None
    assert result.report.verified < 1e-6
    result.save(tmp_path / "out")
    fresh = built(build, seed=1)
    torch.testing.assert_close(lbyl.load(tmp_path / "out", fresh)(x), result.model(x))


@pytest.mark.parametrize("name", EXACT)
def test_what_goes_is_as_if_its_producers_made_zeros(name: str) -> None:
    build, shape, group, _ = EXACT[name]
    model, x = built(build), images(*shape)
    result = lbyl.compress(model, x, ratio={group: 1 / 3}, scope="all", restore="prune", strict=True, forecast=False)
    gone = sorted(set(range(12)) - set(result.plan.groups[0].keep))
    with torch.no_grad():
        for layer in [model[0]] if isinstance(model, nn.Sequential) else [model.table, model.down]:
            layer.weight[gone], layer.bias[gone] = 0, 0
        if isinstance(model, nn.Sequential):  # a constant that the norm adds is no channel's doing
            model[2].bias[gone] = 0
        torch.testing.assert_close(result.model(x), model(x))


@pytest.mark.parametrize("name", EXACT)
def test_restoration_keeps_the_cut_exact(name: str) -> None:
    build, shape, _, _ = EXACT[name]
    model, x = built(build), images(*shape)
    settings = lbyl.LeastSquares(moments=lbyl.Noise(images=16))
    report = lbyl.compress(model, x, ratio=1 / 3, scope="all", restore=settings, strict=True, forecast=False).report
    assert report.verified is not None
    assert report.verified < 1e-6
    assert report.assessment is not None
    assert report.assessment.restored <= report.assessment.pruned


class Literal(RootMeanSquare):
    """A constant that is no attribute."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.3))


class ByHand(RootMeanSquare):
    """A layer norm written by hand: where channels are gone, differences to the mean are not zero."""

    def forward(self, x: Tensor) -> Tensor:
        apart = x - x.mean(-1, keepdim=True)
        return self.weight * apart / torch.sqrt(apart.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Gated(RootMeanSquare):
    """A mean of what is one half where channels are gone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(torch.sigmoid(x).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("restore", ["prune", lbyl.LeastSquares(moments=lbyl.Noise(images=16))], ids=["prune", "fit"])
@pytest.mark.parametrize("norm", [Shifted, Literal, ByHand, Gated])
def test_where_no_weight_makes_up_for_it_the_mean_is_of_what_stays(norm, restore) -> None:
    model, x = built(lambda: Stream(norm)), images(2, 5, 6)
    group = lbyl.inspect(model, x).graph.group("table")
    assert group.statistics
    assert not group.averages
    result = lbyl.compress(model, x, ratio=1 / 3, scope="all", restore=restore, strict=True, forecast=False)
    assert result.report.verified is not None
    assert result.report.verified < 1e-6
    assert {row.group: row.after for row in result.report.rows}["table"] == 8


def test_a_constant_of_the_size_of_a_rounding_error_needs_no_correction() -> None:
    """By default, torch's RMSNorm adds the machine epsilon of its input's dtype."""
    model, x = built(lambda: Stream(nn.RMSNorm)), images(2, 5, 6)
    assert [average.eps for average in lbyl.inspect(model, x).graph.group("table").averages] == [None, None]
    result = lbyl.compress(model, x, ratio=1 / 3, scope="all", restore="prune", strict=True, forecast=False)
    assert {row.group: row.after for row in result.report.rows}["table"] == 8
    assert result.report.verified is not None
    assert result.report.verified < 1e-6


class ResponseOfItsOwn(Response):
    """As transformers writes it: eps is a number in the code."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(p=2, dim=(2, 3), keepdim=True)
        relative = size / (size.mean(dim=1, keepdim=True) + 1e-6)
        return self.weight.view(1, -1, 1, 1) * (x * relative) + self.bias.view(1, -1, 1, 1) + x


def test_a_response_norm_with_a_literal_eps_is_relative_to_the_kept_channels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.GELU(), ResponseOfItsOwn(12), nn.Conv2d(12, 4, 1), nn.Flatten()).eval()
    result = lbyl.compress(net, torch.randn(2, 3, 6, 6), ratio=0.5, restore="prune", forecast=False)
    assert [(row.group, row.before, row.after) for row in result.report.rows] == [("0", 12, 6)]
    assert (result.report.verified or 0.0) < 1e-9
    assert any(
        "a statistic in the model's own code is taken over the kept channels" in note for note in result.report.notes
    )
