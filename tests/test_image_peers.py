"""The other methods of `benchmarks/image_peers.py`: each does on one layer what its paper says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
if BENCHMARKS not in sys.path:
    sys.path.append(BENCHMARKS)

from networks import CifarResNet  # noqa: E402
from peers.images import blocks_of, folded, grail, largest, magnitude, mixing, reestimated  # noqa: E402


def net() -> Any:
    torch.manual_seed(0)
    made = CifarResNet(8)
    for norm in (m for m in made.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.2, 0.6)
        norm.running_mean.normal_(std=0.1)  # pyright: ignore[reportOptionalMemberAccess]
        norm.running_var.uniform_(0.5, 1.5)  # pyright: ignore[reportOptionalMemberAccess]
    return made.eval()


def images(count: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def stays(made: Any) -> list[int]:
    return [int((block.conv2.weight != 0).flatten(2).any(2).any(0).sum()) for block in blocks_of(made)]


@pytest.mark.parametrize("method", [magnitude, folded, lambda net, share: grail(net, images(), share)])
def test_as_many_channels_stay_and_nothing_is_changed(method: Any) -> None:
    whole = net()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    assert stays(method(whole, 0.25)) == [12, 24, 48]
    assert all(torch.equal(before[name], tensor) for name, tensor in whole.state_dict().items())


def test_without_a_loss_nothing_changes() -> None:
    """Twice the same filter, half as loud to its reader, is one filter: by folding and by GRAIL exactly."""
    whole = net()
    with torch.no_grad():
        for block in blocks_of(whole):
            half = len(block.conv1.weight) // 2
            for tensor in (*block.conv1.parameters(), *block.bn1.parameters(), *block.bn1.buffers()):
                if tensor.dim():
                    tensor[half:] = tensor[:half]
        expected = whole(images())
    for made in (folded(whole, 0.5), folded(whole, 0.5, repair=True)):
        with torch.no_grad():
            torch.testing.assert_close(made(images()), expected, rtol=1e-3, atol=1e-3)
    first = next(blocks_of(whole))
    half = torch.arange(8)
    products = torch.randn(8, 50, dtype=torch.float64)
    products = torch.cat([products, products])
    mix = mixing(products @ products.T, half, ridge=1e-9)
    torch.testing.assert_close(mix, torch.cat([torch.eye(8), torch.eye(8)]).double(), rtol=1e-4, atol=1e-4)
    assert len(first.conv1.weight) == 16


def test_grail_is_the_ridge_regression_of_all_channels_on_the_kept_ones() -> None:
    x = torch.randn(200, 6, dtype=torch.float64)
    x[:, 5] = x[:, 0] - 2 * x[:, 1] + 0.1 * x[:, 5]
    keep, ridge = torch.tensor([0, 1, 3]), 0.02
    mix = mixing(x.T @ x, keep, ridge)
    amount = ridge * x[:, keep].square().sum(0).mean()
    rows = torch.cat([x[:, keep], amount.sqrt() * torch.eye(3)])
    expected = torch.linalg.lstsq(rows, torch.cat([x, torch.zeros(3, 6)])).solution.T
    torch.testing.assert_close(mix, expected)


def test_the_largest_filters_stay() -> None:
    weight = torch.arange(1.0, 9.0).reshape(8, 1, 1, 1) * torch.tensor([1, -1] * 4).reshape(8, 1, 1, 1)
    assert largest(weight, 0.5).tolist() == [4, 5, 6, 7]


def test_batch_norms_get_the_statistics_of_the_images() -> None:
    made = reestimated(net(), images(64))
    with torch.no_grad():
        seen = made.conv1(images(64))
    torch.testing.assert_close(made.bn1.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(made.bn1.running_var, seen.var((0, 2, 3)))
    assert not made.training
