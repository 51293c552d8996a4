"""Networks that insist on a precision are verified in it, and the report says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import images
from torch import Tensor, nn
from torch.nn import functional as F

import lbyl


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class AsksForFloats(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Bytes(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 255)


class Kernel(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.conv2d(x, torch.ones(3, 1, 3, 3, dtype=torch.float32) / 9, groups=3))


class Grid(Base):
    def forward(self, x: Tensor) -> Tensor:
        grid = torch.zeros(len(x), 9, 9, 2, dtype=torch.float32)
        return super().forward(F.grid_sample(x, grid, align_corners=False))


class Timestep(Base):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(6, dtype=torch.float32)[None].sin()
        return self.b((self.a(x) + self.time(steps)[:, :, None, None]).relu())


class Softmax(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1, dtype=torch.float32).to(x.dtype)


KINDS: dict[str, tuple[type[Base], Callable[[], Tensor]]] = {
    kind.__name__: (kind, lambda: images(2, 3, 10, 10)) for kind in (AsksForFloats, Kernel, Grid, Timestep, Softmax)
}
KINDS["Bytes"] = Bytes, lambda: torch.randint(256, (2, 3, 10, 10), dtype=torch.uint8)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("restore", ["prune", "lbyl"])
def test_a_network_that_says_float32_is_verified_in_it(name: str, restore: str) -> None:
    kind, make = KINDS[name]
    result = lbyl.compress(kind().eval(), make(), ratio=0.5, restore=restore, scope="all", forecast=False)
    assert [row.after for row in result.report.rows] == [8]
    assert result.report.verified is not None
    assert result.report.verified < 1e-4
    told = [note for note in result.report.notes if note.startswith("verified in float32")]
    assert len(told) == (name != "Softmax")


class Wrong(AsksForFloats):
    """Computes something else when it is narrower, which no tolerance hides."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x.float()).relu()
        return self.b(hidden) * (1.0 if hidden.shape[1] == 16 else 1.01)


def test_a_coarse_precision_hides_no_fault() -> None:
    with pytest.raises(lbyl.VerificationError):
        lbyl.compress(Wrong().eval(), images(2, 3, 10, 10), ratio=0.5, restore="prune", forecast=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_are_verified_in_float64_where_they_can_be(dtype: torch.dtype) -> None:
    result = lbyl.compress(
        Base().eval().to(dtype),
        images(2, 3, 10, 10).to(dtype),
        ratio=0.5,
        criterion="l2",
        restore="prune",
        forecast=False,
    )
    assert result.report.verified is not None
    assert result.report.verified < 1e-9
    assert not result.report.notes


class RootMean(nn.Module):
    """A residual stream under norms without a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.n, self.o, self.f = nn.Linear(8, 32), nn.RMSNorm(32, eps=1e-6), nn.Linear(32, 5), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        x = x + self.f(self.n(x))
        return self.o(self.n(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_norms_may_be_rounded_to_the_precision_of_the_network(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x = RootMean().to(dtype).eval(), torch.randn(2, 8, dtype=dtype)
    smaller = lbyl.compress(net, x, ratio=0.25, scope="all", restore="prune", forecast=False).model
    assert smaller.i.out_features == 24
