"""Whole numbers among the inputs: rows of tables, times, categories, flags; probes vary them as the network allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbyl.moments.input_scales import input_scales
from lbyl.moments.integers import Integers, find_integers
from lbyl.moments.synthesis import dead_leaves, synthesize
from lbyl.runtime.inputs import ExampleInputs

IDS = torch.tensor([[3, 0, 7], [1, 2, 9], [0, 5, 4]])
OFFSETS = torch.tensor([0, 10, 20])


def drawn(model: nn.Module, inputs: Any, count: int = 400) -> list[Tensor]:
    """What probes hold."""
    example, generator = ExampleInputs.of(inputs), torch.Generator().manual_seed(0)
    made = synthesize(model, example, count, dead_leaves, generator, input_scales(model, example))
    made.call(model)
    return made.tensors()


class Reads(nn.Module):
    """Looks its ids up in a table, in one way or another."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor], rows: int = 30) -> None:
        super().__init__()
        self.how, self.table, self.bag = how, nn.Embedding(rows, 4), nn.EmbeddingBag(rows, 4, mode="sum")
        self.narrow, self.out = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.how(self, ids).relu())


LOOKUPS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "embedding": (lambda n, i: n.table(i).sum(1), (29, 29, 29)),
    "a bag": (lambda n, i: n.bag(i), (29, 29, 29)),
    "an index": (lambda n, i: n.table.weight[i].sum(1), (29, 29, 29)),
    "index_select": (lambda n, i: n.table.weight.index_select(0, i.flatten()).unflatten(0, i.shape).sum(1), (29,) * 3),
    "a copy": (lambda n, i: n.table(i.int().long().clone()).sum(1), (29, 29, 29)),
    "column by column": (lambda n, i: n.table(i[:, 0]) + n.narrow(i[:, 1]) + n.table(i[:, 2:])[:, 0], (29, 9, 29)),
    "two tables": (lambda n, i: n.table(i).sum(1) + n.narrow(i).sum(1), (9, 9, 9)),
    "shifted": (lambda n, i: n.table(i + OFFSETS).sum(1), (3, 5, 9)),  # as far as the example goes
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_rows_of_tables_are_drawn_as_they_are_looked_up(name: str) -> None:
    how, highest = LOOKUPS[name]
    (ids,) = drawn(Reads(how), IDS)
    assert tuple(ids.amax(0).tolist()) == highest
    assert name != "shifted" or tuple(ids.amin(0).tolist()) == (0, 0, 4)


class Timed(nn.Module):
    """A network of an image and a time, as in diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.a, self.b = nn.Linear(8, 16), nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None].to(x.dtype) * torch.exp(-math.log(1e3) * torch.arange(4, dtype=x.dtype) / 4)
        gate = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        return self.b((self.a(x) * gate[:, :, None, None]).relu())


@pytest.mark.parametrize(
    ("times", "low", "high"), [((5, 90, 40), 5, 90), ((100,), 0, 100)], ids=["several rows", "a single row"]
)
def test_other_numbers_lie_where_the_example_has_them(times: tuple[int, ...], low: int, high: int) -> None:
    net, inputs = Timed(), (torch.randn(len(times), 3, 8, 8), torch.tensor(times))
    found = drawn(net, inputs)[1]
    assert low <= int(found.min()) < low + 5
    assert high - 5 < int(found.max()) <= high
    note = input_scales(net, ExampleInputs.of(inputs)).note
    assert f"probes have whole numbers from {low} to {high}, as the example does" in note


def test_flags_and_positions_stay_as_they_are() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(30, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor, mask: Tensor, place: Tensor) -> Tensor:
            return self.out((self.table(ids) * mask[..., None] + place[..., None].cos()).sum(1))

    ones, places = torch.ones_like(IDS), torch.arange(3).expand(3, 3).clone()
    ids, mask, place = drawn(Net(), (IDS, ones, places))
    assert int(ids.max()) == 29
    assert bool((mask == 1).all())
    assert torch.equal(place.unique(dim=0), places[:1])
    _, _, place = drawn(Net(), (IDS[:1], ones[:1], places[:1]))
    assert torch.equal(place.unique(dim=0), places[:1])
    padded = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    _, mask, _ = drawn(Net(), (IDS, padded, places))
    assert torch.equal(mask.unique(dim=0), padded.unique(dim=0))


def test_numbers_that_the_network_refuses_are_those_of_the_example_and_a_note_says_so() -> None:
    class Picky(Timed):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert bool((t % 10 == 7).all())
            return super().forward(x, t)

    inputs = ExampleInputs.of((torch.randn(2, 3, 8, 8), torch.tensor([17, 507])))
    found, note = find_integers(Picky(), inputs)
    assert found[0] is None
    assert isinstance(found[1], Integers)
    assert found[1].draw(5, torch.Generator().manual_seed(0)).tolist() == [17] * 5
    assert "the network refuses other whole numbers" in note
    assert "pass lbyl.Data" in note
