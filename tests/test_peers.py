"""The baselines that benchmarks compare with compute what their papers state, each on one pair of layers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from peers.corp import affine, corp  # pyright: ignore
from peers.folding import clusters, fold, fold_repaired, merging, variance_gain  # pyright: ignore
from peers.grail import compensation, grail  # pyright: ignore
from peers.magnitude import prune  # pyright: ignore
from peers.merging import neuron_merging, scaling  # pyright: ignore
from peers.pairs import Pair, reduced, reestimated, selection  # pyright: ignore

import lbyl
from lbyl.selection.filters import describe
from lbyl.surgery.masking import Delivery

KEEP = (0, 2, 3, 5, 6)
PAIR = Pair("0", "1", "3", KEEP)
MLP = Pair("0", None, "2", KEEP)


def convolutions(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False))
    norm: Any = net[1]
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.copy_(torch.rand(8) + 0.5)
    return net.eval()


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).eval()


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(2))


def hidden(net: nn.Sequential, x: Tensor) -> Tensor:
    """The consumer's input, a row for each position, in float64."""
    with torch.no_grad():
        return net[:3](x).movedim(1, -1).reshape(-1, 8).double()


def test_pruning_is_what_the_whole_network_computes_without_the_channels() -> None:
    net, x = convolutions(), images()
    small = reduced(net, [PAIR], prune)
    assert net[0].weight.shape[0] == 8
    assert small[0].weight.shape[0] == small[0].out_channels == small[3].in_channels == 5
    dropped = [channel for channel in range(8) if channel not in KEEP]
    net[3].weight.data[:, dropped] = 0  # pyright: ignore
    torch.testing.assert_close(small(x), net(x))


def test_norms_are_re_estimated_as_one_pass_over_the_images_sees_them() -> None:
    net, x = convolutions(), images()
    again = reestimated(reduced(net, [PAIR], prune), x)
    seen = again[0](x)
    torch.testing.assert_close(again[1].running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(again[1].running_var, seen.var((0, 2, 3)))
    assert not any(module.training for module in again.modules())


def test_folding_of_equal_channels_loses_nothing() -> None:
    net, x = convolutions(), images()
    norm: Any = net[1]
    for dropped, twin in ((1, 0), (4, 2), (7, 5)):
        for tensor in (net[0].weight.data, net[0].bias.data, norm.weight.data, norm.bias.data):  # pyright: ignore
            tensor[dropped] = tensor[twin]
        norm.running_mean[dropped], norm.running_var[dropped] = norm.running_mean[twin], norm.running_var[twin]
    torch.testing.assert_close(reduced(net, [PAIR], fold)(x), net(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fold_repaired(net, [PAIR])(x), net(x), rtol=1e-4, atol=1e-5)


def test_folding_averages_rows_and_adds_columns() -> None:
    labels = clusters(torch.tensor([[0.0, 1.0], [5.0, 5.0], [0.0, 1.2]]), 2)
    assert labels[0] == labels[2] != labels[1]
    mix, unmix = merging(torch.tensor([0, 1, 0]))
    assert mix.tolist() == [[0.5, 0, 0.5], [0, 1, 0]]
    assert unmix.tolist() == [[1, 0], [0, 1], [1, 0]]


def test_the_gain_gives_back_the_variance_that_means_lose() -> None:
    generator = torch.Generator().manual_seed(3)
    filters, x = torch.randn(6, 40, generator=generator), torch.randn(200_000, 40, generator=generator)
    filters = nn.functional.normalize(filters + 0.5 * filters[:1], dim=1)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    made = x.double() @ filters.double().T @ merging(labels)[0].T * variance_gain(filters, labels)
    torch.testing.assert_close(made.var(0), torch.ones(3, dtype=torch.float64), rtol=0.02, atol=0)


@pytest.mark.parametrize("how", [prune, fold])
def test_grail_is_the_ridge_regression_on_what_is_left(how: Any) -> None:
    net, x = convolutions(), images()
    rows = hidden(net, x)
    mix = how(net, PAIR)[0]
    left = rows @ mix.T
    ridge = 1e-3 * float(left.square().sum(0).mean())
    padded = torch.cat([left, ridge**0.5 * torch.eye(5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(padded, torch.cat([rows, torch.zeros(5, 8, dtype=torch.float64)])).solution.T
    torch.testing.assert_close(compensation(rows.T @ rows, mix), expected)
    small = grail(net, [PAIR], x, torch.relu, how)
    at_once = grail(net, [PAIR], x, torch.relu, how, sequential=False)
    torch.testing.assert_close(at_once[3].weight, small[3].weight)
    columns = torch.einsum("oihw,ik->okhw", net[3].weight.detach().double(), expected)  # pyright: ignore
    torch.testing.assert_close(small[3].weight.detach(), columns.float(), rtol=1e-4, atol=1e-5)


def test_grail_sees_what_the_reduced_layers_before_give() -> None:
    first, second, x = convolutions(), convolutions(1), images()
    second[0] = nn.Conv2d(4, 8, 3)
    net = nn.Sequential(*first, *second).eval()
    pairs = [PAIR, Pair("4", "5", "7", KEEP)]
    alone = grail(nn.Sequential(*first), [PAIR], x, torch.relu, prune)
    rest = grail(second, [PAIR], alone(x), torch.relu, prune)
    torch.testing.assert_close(grail(net, pairs, x, torch.relu, prune)(x), rest(alone(x)))


def test_neuron_merging_is_the_released_form_of_the_library() -> None:
    net, x = convolutions(), images()
    group = next(group for group in lbyl.inspect(net, x[:1]).graph.groups if group.width == 8)
    keep, drop = torch.tensor(KEEP), torch.tensor([1, 4, 7])
    filters = describe(group, dict(net.state_dict()))
    made = lbyl.Merge(released=True).deliver(filters, keep, drop, torch.Generator())
    assert isinstance(made, Delivery)
    _, unmix = neuron_merging(net, PAIR)
    torch.testing.assert_close(unmix[drop].T, made.matrix)
    torch.testing.assert_close(unmix[keep], torch.eye(5, dtype=torch.float64))


def test_neuron_merging_leaves_out_what_is_not_similar() -> None:
    filters = torch.tensor([[1.0, 0, 0], [0, 1, 0], [2, 0.1, 0], [0, 0, 1]])
    made = scaling(filters, None, (0, 1))
    torch.testing.assert_close(made[2], torch.tensor([4.01**0.5, 0.0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert made[3].tolist() == [0, 0]


def test_corp_is_an_affine_regression() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(50_000, 8, generator=generator).double() @ torch.randn(8, 8, generator=generator).double() + 3
    mix, unmix, constant = affine(x, KEEP)
    torch.testing.assert_close(mix, selection(KEEP, 8))
    design = torch.cat([x[:, KEEP], torch.ones(len(x), 1, dtype=torch.float64)], 1)
    solved = torch.linalg.lstsq(design, x).solution
    predicted = x[:, KEEP] @ unmix.T + constant
    assert float((predicted - design @ solved).square().mean() / x.var(0).mean()) < 1e-4
    torch.testing.assert_close(predicted.mean(0), x.mean(0))


def test_corp_folds_the_constant_into_the_bias() -> None:
    net, x = mlp(), torch.randn(256, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        small = corp(net, [MLP], x, nn.functional.gelu)
        assert small[2].weight.shape == (4, 5)
        torch.testing.assert_close(small(x).mean(0), net(x).mean(0), rtol=1e-4, atol=1e-5)
        error = (small(x) - net(x)).square().sum()
        kept = small[0].weight
        drop = [row for row in range(8) if not bool((net[0].weight[row] == kept).all(1).any())]
        bare = net(x) - net[1](net[0](x))[:, drop] @ net[2].weight[:, drop].T  # pyright: ignore
        assert float(error) < 0.5 * float((bare - net(x)).square().sum())
