"""Weights that the code masks in place are cut, and their masks with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lbyl


def multiply(layer: Masked) -> None:
    layer.weight.data *= layer.mask


def multiply_without_gradients(layer: Masked) -> None:
    with torch.no_grad():
        layer.weight.mul_(layer.mask)


def assign(layer: Masked) -> None:
    layer.weight.data = layer.weight.data * layer.mask


def copy(layer: Masked) -> None:
    layer.weight.data.copy_(layer.weight.data * (1 - layer.mask.logical_not().float()))


def fill(layer: Masked) -> None:
    layer.weight.data.masked_fill_(layer.mask == 0, 0)


def index(layer: Masked) -> None:
    layer.weight.data[layer.mask == 0] = 0


WAYS = [multiply, multiply_without_gradients, assign, copy, fill, index]


class Masked(nn.Conv2d):
    """The convolution of PixelCNN, which sees the pixels above and to the left."""

    mask: Tensor

    def __init__(self, center: int, way: Callable[[Masked], None], saved: bool, *args: int, padding: int) -> None:
        super().__init__(*args, padding=padding)
        mask, middle = torch.ones_like(self.weight), self.weight.shape[2] // 2
        mask[:, :, middle, middle + center :] = 0
        mask[:, :, middle + 1 :] = 0
        self.register_buffer("mask", mask, persistent=saved)
        self.way = way

    def forward(self, input: Tensor) -> Tensor:
        self.way(self)
        return super().forward(input)


def pixels(way: Callable[[Masked], None], saved: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        Masked(0, way, saved, 1, 12, 5, padding=2),
        nn.ReLU(),
        Masked(1, way, saved, 12, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 4, 1),
    ).eval()


def check(net: nn.Sequential, way: Callable[[Masked], None], saved: bool) -> None:
    x = torch.randn(2, 1, 8, 8)
    result = lbyl.compress(net, x, ratio=0.5, restore="prune", forecast=False)
    assert [row.after for row in result.report.rows] == [6, 6]
    assert result.model.get_buffer("2.mask").shape == result.model.get_parameter("2.weight").shape == (6, 6, 3, 3)
    zeroed = pixels(way, saved)
    with torch.no_grad():
        for cut in (cut for cut in result.plan.cuts if cut.dim == 1):
            gone = [index for index in range(cut.size) if index not in cut.keep]
            zeroed.state_dict(keep_vars=True).get(cut.parameter, torch.zeros(0, 12))[:, gone] = 0
        torch.testing.assert_close(result.model(x), zeroed(x))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_mask_in_place_is_cut_like_its_weight(way: Callable[[Masked], None]) -> None:
    check(pixels(way), way, saved=True)


def test_a_mask_that_is_not_saved_is_cut_too() -> None:
    check(pixels(multiply, saved=False), multiply, saved=False)


def test_what_the_code_sets_a_weight_to_keeps_it_whole() -> None:
    def renormalize(layer: Masked) -> None:
        layer.weight.data = torch.renorm(layer.weight.data, 2, 0, 0.3)

    with pytest.raises(lbyl.InputError, match=r"0: .* in '0'"):
        lbyl.compress(pixels(renormalize), torch.randn(1, 1, 8, 8), ratio=0.5, restore="prune", forecast=False)
