"""Regions of a forward that run in another state of PyTorch (autocast, gradients) are followed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lbyl


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.inner, self.leave = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = torch.relu(self.enter(x))
        return self.leave(torch.relu(self.inner(x)))


class Nested(Regions):
    """One region in another, several results, and gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = torch.relu(self.enter(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inner = self.inner(x)
            inner, gate = torch.relu(inner.to(x.dtype)), torch.sigmoid(x.mean(-1, keepdim=True))
        with torch.enable_grad():
            inner = inner * 2
        return self.leave(inner) * gate.detach()


class Whole(Regions):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@torch.library.custom_op("lbyl_regions::same", mutates_args=())
def same(x: Tensor) -> Tensor:
    return x.clone()


@same.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def exported(kind: type[Regions]) -> type[Regions]:
    """The same network, which no recording vouches for, so that torch.export traces it."""

    class Exported(kind):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(same(x))

    return Exported


KINDS = [Regions, Nested, Whole]


@pytest.mark.parametrize("how", [lambda kind: kind, exported], ids=["recorded", "exported"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_regions_are_cut(kind: type[Regions], how: Callable[[type[Regions]], type[Regions]]) -> None:
    result = lbyl.compress(
        how(kind)().eval(), torch.randn(4, 6), ratio=0.5, restore="prune", forecast=False, scope="all"
    )
    assert [(row.group, row.after) for row in result.report.rows] == [("enter", 8), ("inner", 6)]
    assert not [line for line in result.report.barriers if "same" not in line]


@pytest.mark.parametrize("kind", KINDS)
def test_regions_of_an_exported_program_are_followed(kind: type[Regions], tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    with torch.no_grad():
        torch.export.save(torch.export.export(kind().eval(), (x,), strict=False), tmp_path / "model.pt2")
    source = lbyl.load_source(str(tmp_path / "model.pt2"))
    result = lbyl.compress(source, x, ratio={"inner": 0.5}, restore="prune", forecast=False)
    assert [(row.group, row.after) for row in result.report.rows] == [("inner", 6)]
