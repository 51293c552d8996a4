"""What a sweep keeps of the unpruned network for its further points: that it changes nothing, and how much it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from nets import Block, images, settle
from torch import Tensor, nn
from torch.nn import functional

import lbyl
from lbyl.moments import Probes
from lbyl.restore.least_squares import recall as module
from lbyl.restore.least_squares.paired_forward import ConsumerDue, PairedPass, run_paired
from lbyl.restore.least_squares.recall import Recall
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.memory import ROOM


class Residual(nn.Module):
    """Residual blocks, and a batch norm that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 12, 2), Block(12, 12))
        self.a, self.b = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)
        self.norm, self.fc = nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = functional.relu(self.norm(self.a(x)))
        return self.fc(functional.relu(self.norm(self.b(x))).mean((2, 3)))


READERS = [f"blocks.{number}.conv2.weight" for number in range(3)]


def walk(net: nn.Module, scale: float, recall: Recall | None, readers: list[str] = READERS):
    """A pass in which every consumer gets weights of another scale, and what each was to be solved for."""
    values: dict[str, Tensor] = {}
    dues: list[ConsumerDue] = []

    def solve(due: ConsumerDue) -> None:
        name = due.calls[0].weight
        values[name] = net.get_parameter(name).detach() * scale
        dues.append(due)

    batches = [ExampleInputs.of(images(count, 3, 8, 8, seed=count)) for count in (7, 9)]
    with torch.no_grad():
        walked = run_paired(net, batches, readers, values, solve, batch_statistics=True, renorm=True, recall=recall)
    return walked, dues


def assert_same(a: tuple[PairedPass, list[ConsumerDue]], b: tuple[PairedPass, list[ConsumerDue]]) -> None:
    for first, second in zip(a[1], b[1], strict=True):
        for one, other in zip(first.calls, second.calls, strict=True):
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.out, other.out)
        assert all(torch.equal(*pair) for pair in zip(first.wanted, second.wanted, strict=True))
    for name in ("original", "cut"):
        found, wanted = getattr(a[0], name), getattr(b[0], name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(*pair) for key in found for pair in zip(found[key], wanted[key], strict=True))
    assert a[0].missing.keys() == b[0].missing.keys()
    assert all(torch.equal(shift, b[0].missing[name]) for name, shift in a[0].missing.items())


def test_a_pass_that_knows_the_original_outputs_gives_the_same_to_the_bit() -> None:
    net, recall = settle(Residual()), Recall(2**20)
    walk(net, 0.5, recall)
    held = recall.held
    assert held > 0
    assert_same(walk(net, 0.8, recall), walk(net, 0.8, None))
    assert recall.held == held
    # It really uses them.
    known = recall.get(READERS[1])
    assert known is not None
    known[0].fill_(7.0)
    assert all(bool((call.out == 7.0).all()) for call in walk(net, 0.8, recall)[1][1].calls)


def test_passes_that_solve_other_consumers_use_nothing_of_each_other() -> None:
    net, recall = settle(Residual()), Recall(2**20)
    walk(net, 0.5, recall)
    for name in READERS:
        known = recall.get(name)
        assert known is not None
        known[0].fill_(7.0)
    assert_same(walk(net, 0.5, recall, READERS[1:]), walk(net, 0.5, None, READERS[1:]))


def test_what_saves_most_work_for_its_size_stays() -> None:
    recall, tensor = Recall(100), torch.ones(10)
    recall.keep("a", [tensor], worth=2)
    recall.keep("b", [tensor], worth=1)
    tensor.zero_()  # copies are kept
    recall.keep("c", [tensor], worth=3)
    assert recall.held == 80
    assert recall.get("b") is None
    for name, value in ("a", 1.0), ("c", 0.0):
        known = recall.get(name)
        assert known is not None
        assert torch.equal(known[0], torch.full((10,), value))
    recall.keep("d", [torch.ones(20)], worth=1)  # others are worth more
    recall.keep("e", [torch.ones(30)], worth=9)  # too large for all of the room
    assert recall.get("d") is recall.get("e") is None
    assert recall.held == 80
    recall.begin("another")
    assert recall.held == 0
    nothing = Recall(0)
    nothing.keep("a", [tensor])
    assert nothing.get("a") is None


def test_the_room_is_a_share_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, memory, room in (
        (2**36, ROOM, 2**30),
        (2**30, ROOM, 2**28),
        (2**36, 10**6, 4 * 10**5),
        (2**36, 10 * ROOM, 2**30),
        (0, ROOM, 0),
    ):
        monkeypatch.setattr(module, "available_bytes", lambda available=available: available)
        assert Recall.within(memory).room == room


@dataclass(frozen=True)
class Given:
    """A source of probes that are there already."""

    made: Probes

    def probes(self, model: object, inputs: object, generator: object, progress: object) -> Probes:
        return self.made


def test_points_of_a_sweep_know_the_original_outputs_and_single_networks_keep_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = settle(Residual()), images(1, 3, 8, 8)
    parts = tuple(ExampleInputs.of(images(128, 3, 8, 8, seed=seed)) for seed in (2, 3))
    probes = Probes(parts, ExampleInputs.of(images(16, 3, 8, 8, seed=9)), True, matches_training_statistics=True)
    restore, budgets = lbyl.LeastSquares(Given(probes)), [lbyl.Budget(macs=share) for share in (0.8, 0.7, 0.6)]
    kept: list[int] = []
    begin = Recall.begin

    def noting(self: Recall, setting: object) -> None:
        begin(self, setting)  # type: ignore[arg-type]
        kept.append(self.held)

    monkeypatch.setattr(Recall, "begin", noting)
    alone = [lbyl.compress(net, x, budget=budget, restore=restore, forecast=False) for budget in budgets]
    assert kept == [0, 0, 0]
    kept.clear()
    lbyl.sweep(net, x, budgets, tmp_path / "out", restore=restore, forecast=False)
    assert kept[0] == 0 < kept[1] == kept[2]
    for budget, found in zip(budgets, alone, strict=True):
        state = lbyl.load(tmp_path / "out" / f"macs-{budget.macs}", net).state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.model.state_dict().items())
    kept.clear()
    lbyl.sweep(net, x, [*budgets, lbyl.Budget(macs=0.5)], tmp_path / "out", restore=restore, forecast=False)
    assert kept == [0]
