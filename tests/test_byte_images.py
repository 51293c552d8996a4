"""Networks that are given the bytes of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbyl


class Bytes(nn.Module):
    """A classifier of bytes, with channels first or last; or one that does not take floats."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, 1, 1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "insists":
            assert x.dtype == torch.uint8, "bytes, please"
        if self.how == "masks":
            x = x & 127
        if self.how == "last":
            x = x.permute(0, 3, 1, 2)
        return self.body(x.float() / 255)


def pixels(how: str) -> Tensor:
    shape = (2, 16, 16, 3) if how == "last" else (2, 3, 16, 16)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["first", "last"])
@pytest.mark.parametrize("settings", [{}, {"ratio": 0.4}], ids=["default", "ratio"])
def test_they_are_probed_with_floats(how: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net, x = Bytes(how).eval(), pixels(how)
    result = lbyl.compress(net, x, **settings)
    assert any("bytes of images" in note for note in result.report.notes)
    assert any("dreamed" in note for note in result.report.notes)
    assert result.report.parameters[1] < result.report.parameters[0]
    assert result.model(x).shape == (2, 5)


@pytest.mark.parametrize("how", ["insists", "masks"])
def test_networks_that_compute_something_else_from_floats_get_bytes(how: str) -> None:
    torch.manual_seed(0)
    result = lbyl.compress(Bytes(how).eval(), pixels(how), ratio=0.4)
    assert not any("bytes of images" in note for note in result.report.notes)
    assert result.model(pixels(how)).shape == (2, 5)


def test_the_user_s_bytes_are_taken_as_data() -> None:
    torch.manual_seed(0)
    net, x = Bytes("first").eval(), torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8)
    result = lbyl.compress(net, x[:2], ratio=0.4, restore=lbyl.LeastSquares(moments=lbyl.Data([x[:16], x[16:]])))
    before, after = net(x), result.model(x)
    error = (after - before).norm() / (before - before.mean(0)).norm()
    pruned = lbyl.compress(net, x[:2], ratio=0.4, restore="prune").model(x)
    assert error < 0.7 * (pruned - before).norm() / (before - before.mean(0)).norm()
