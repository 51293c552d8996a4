"""Tables of positions that are buffers, saved with the model or not, lose channels with the stream that they go to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lbyl

TABLE = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "whole": lambda x, table: x + table[:, : x.shape[1]],
    "first": lambda x, table: table[:, : x.shape[1]].to(x.dtype) + x,
    "one row": lambda x, table: x + table[0, : x.shape[1]],
    "transposed": lambda x, table: (x.transpose(0, 1) + table.transpose(0, 1)[: x.shape[1]]).transpose(0, 1),
    "by index": lambda x, table: x + table[0].index_select(0, torch.arange(x.shape[1])),
    "in place": lambda x, table: x.add_(table[:, : x.shape[1]]),
}


class Net(nn.Module):
    def __init__(self, use: str, persistent: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.inner, self.last, self.use = nn.Linear(16, 16), nn.Linear(16, 3), USES[use]
        self.register_buffer("table", TABLE.clone(), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.use(self.first(x), self.get_buffer("table"))
        return self.last(x + self.inner(self.norm(x)).tanh())


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("use", USES)
def test_a_table_is_cut_with_the_stream(use: str, persistent: bool, tmp_path: Path) -> None:
    net, x = Net(use, persistent).eval(), torch.randn(2, 5, 6)
    result = lbyl.compress(net, x, ratio=0.25, scope="all", restore="prune", strict=True, forecast=False)
    assert result.model.get_buffer("table").shape == (1, 12, 12)
    assert net.get_buffer("table").shape == (1, 12, 16)
    assert result.report.verified is not None
    assert result.report.verified < 1e-9
    result.save(tmp_path / "smaller")
    again = lbyl.load(tmp_path / "smaller", Net(use, persistent).eval())
    longer = torch.randn(3, 9, 6)
    torch.testing.assert_close(again(longer), result.model(longer))


def test_a_table_that_is_multiplied_stays() -> None:
    class Rotated(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) * self.get_buffer("table")[:, : x.shape[1]].cos())

    found = lbyl.inspect(Rotated("whole", False).eval(), torch.randn(2, 5, 6)).graph.groups[0]
    assert "fixed size" in str(found.reason)


class Grown(nn.Module):
    """Makes a table that is not saved when it first runs, as long as its inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("table", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        table = self._buffers["table"]
        if table is None or len(table) < x.shape[1]:
            table = self._buffers["table"] = torch.arange(x.shape[1]).float()[:, None]
        return self.last(self.first(x).relu()) + table[: x.shape[1]]


@pytest.mark.parametrize("ran", [False, True])
def test_a_table_that_a_run_made_is_not_asked_of_a_new_network(ran: bool, tmp_path: Path) -> None:
    net, x = Grown().eval(), torch.randn(2, 5, 6)
    if ran:
        net(x)
    result = lbyl.compress(net, x, ratio=0.25, restore="prune", forecast=False)
    result.save(tmp_path / "smaller")
    torch.testing.assert_close(lbyl.load(tmp_path / "smaller", Grown().eval())(x), result.model(x))
