"""Criteria that look at what consumers read and at what passes through the channels."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from nets import images
from torch import Tensor, nn

import lbyl
from lbyl.graph import Slot
from lbyl.moments import Probes
from lbyl.moments.columns import column_moments
from lbyl.runtime.inputs import ExampleInputs
from lbyl.selection.view import Reading


def two_layers(hidden: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 5)).eval()


def kept(net: nn.Module, x: Tensor, criterion: object, ratio: float = 0.5, **more: object) -> tuple[int, ...]:
    result = lbyl.compress(net, x[:1], ratio=ratio, criterion=criterion, restore=data(x), **more, forecast=False)  # pyright: ignore
    return result.plan.groups[0].keep


def data(x: Tensor) -> lbyl.LeastSquares:
    return lbyl.LeastSquares(moments=lbyl.Data(list(x.split(len(x) // 4))))


def test_energy_is_the_consumers_columns_times_the_mean_square() -> None:
    net, x = two_layers(), torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    hidden = torch.relu(net[0](x[:300])).double()  # the last batch is held out
    energy = net[2].weight.double().square().sum(0) * hidden.square().mean(0)  # pyright: ignore
    assert kept(net, x, "energy") == tuple(sorted(energy.argsort(descending=True)[:6].tolist()))


def test_obs_drops_what_the_others_can_stand_in_for() -> None:
    net, x = two_layers(6), torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # channels 4 and 5 are loud, but copies of each other
        net[0].weight[4:] *= 5  # pyright: ignore
        net[0].weight[5], net[0].bias[5] = net[0].weight[4], net[0].bias[4]  # pyright: ignore
        net[2].weight[:, :4] *= 0.2  # pyright: ignore
    assert {4, 5} <= set(kept(net, x, "energy", 1 / 6))
    assert len({4, 5} & set(kept(net, x, lbyl.OBS(ridge=1e-6), 1 / 6))) == 1


@pytest.mark.parametrize("centered", [True, False])
def test_obs_removes_what_a_new_solution_misses_least_each_time(centered: bool) -> None:
    """Compared with a search that solves least squares anew for each channel that could go next."""
    net, x = two_layers(10), torch.randn(4000, 6, generator=torch.Generator().manual_seed(1))
    seen = torch.relu(net[0](x[:3000])).detach().double()  # the last batch is held out
    seen = seen - seen.mean(0) if centered else seen
    wanted = seen @ net[2].weight.detach().double().T  # pyright: ignore
    left = list(range(10))

    def missed(gone: int) -> float:
        others = seen[:, [channel for channel in left if channel != gone]]
        return float((others @ torch.linalg.lstsq(others, wanted).solution - wanted).square().sum())

    while len(left) > 2:
        left.remove(min(left, key=missed))
        criterion = lbyl.OBS(ridge=1e-9, centered=centered)
        assert kept(net, x, criterion, 1 - len(left) / 10) == tuple(left)


def test_obs_removes_all_columns_of_a_channel_together() -> None:
    """The same search where each channel of a flattened map has four columns."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)).eval()
    x = torch.randn(4000, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen = net[:3](x[:3000]).double()
        wanted = seen @ net[3].weight.double().T  # pyright: ignore
    left = list(range(6))

    def missed(gone: int) -> float:
        others = seen[:, [4 * channel + place for channel in left if channel != gone for place in range(4)]]
        return float((others @ torch.linalg.lstsq(others, wanted).solution - wanted).square().sum())

    while len(left) > 1:
        left.remove(min(left, key=missed))
        assert kept(net, x, lbyl.OBS(ridge=1e-9), 1 - len(left) / 6) == tuple(left)


class Crossing(nn.Module):
    """A grouped convolution and a layer over each quarter of the channels read the same ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.quarter, self.head = nn.Linear(4, 6), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        each = self.quarter(y.transpose(1, 2).unflatten(-1, (4, -1))).relu().mean(-1)
        return self.head((self.b(y).transpose(1, 2) * each.mean(-1, keepdim=True)).relu())


def test_obs_ranks_channels_together_that_a_grouped_convolution_reads_apart() -> None:
    result = lbyl.compress(Crossing().eval(), images(4, 3, 10), ratio=0.5, criterion="obs", forecast=False)
    assert {row.group: (row.before, row.after) for row in result.report.rows}["a"] == (4, 2)


def test_columns_of_several_blocks_are_read_by_outputs_of_their_own() -> None:
    weight = torch.arange(1, 25, dtype=torch.float64).reshape(4, 2, 3)  # two blocks of two columns, three taps
    reading = Reading(Slot("w", 1, (0, 1, 2, 3), 2), weight, torch.tensor([[0, 2], [3, -1]]), None)
    columns = reading.columns
    assert columns.shape == (2, 2, 4 * 3)
    whole = torch.zeros(4, 4, 3, dtype=torch.float64)
    whole[:2, :2], whole[2:, 2:] = weight[:2], weight[2:]
    assert torch.equal(columns[0, 0], whole[:, 0].flatten())
    assert torch.equal(columns[0, 1], whole[:, 2].flatten())
    assert torch.equal(columns[1, 0], whole[:, 3].flatten())
    assert not columns[1, 1].any()


def test_obs_of_very_many_columns_is_their_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = two_layers(), torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    by_energy = kept(net, x, "energy")
    assert kept(net, x, "obs") != by_energy
    monkeypatch.setattr("lbyl.selection.criteria.obs._COLUMNS", 11)
    assert kept(net, x, "obs") == by_energy


def test_products_of_all_columns_fit_into_memory() -> None:
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)).eval()
    x = torch.randn(40, 6)
    graph = lbyl.inspect(net, x[:1]).graph
    probes = Probes((ExampleInputs.of(x),), ExampleInputs.of(x), batch_statistics=False)
    for memory, measured in ((12**2 * 8 + 20**2 * 8, [True, True]), (20**2 * 8, [True, False]), (0, [False, False])):
        found = column_moments(net, graph, range(len(graph.groups)), probes, products=True, seed=0, memory=memory)
        assert [found[name].products is not None for name in ("2.weight", "4.weight")] == measured
        torch.testing.assert_close(found["2.weight"].square, torch.relu(net[0](x)).double().square().mean(0))


@dataclass(frozen=True)
class Loudest:
    """A criterion of a user's: the mean over the seats of what a channel carries."""

    sees: ClassVar[str] = "squares"

    def score(self, view: lbyl.ChannelView) -> Tensor:
        return torch.stack([reading.square.mean(1) for reading in view.readings]).sum(0)


@dataclass(frozen=True)
class MostRead:
    """Another one, which needs no probes."""

    sees: ClassVar[str] = "consumers"

    def score(self, view: lbyl.ChannelView) -> Tensor:
        assert all(reading.moments is None for reading in view.readings)
        return torch.stack([reading.energy.sum(1) for reading in view.readings]).sum(0)


def test_own_criteria_that_see() -> None:
    net, x = two_layers(), torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    loud = torch.relu(net[0](x[:300])).square().mean(0)
    assert kept(net, x, Loudest()) == tuple(sorted(loud.argsort(descending=True)[:6].tolist()))
    read = net[2].weight.square().sum(0)  # pyright: ignore
    by_weights = (
        lbyl.compress(net, x[:1], criterion=MostRead(), restore="prune", ratio=0.5, forecast=False).plan.groups[0].keep
    )
    assert by_weights == tuple(sorted(read.argsort(descending=True)[:6].tolist()))


class Flattened(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.fc = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.mix(torch.relu(self.conv(x)))).flatten(1))


@pytest.mark.parametrize("criterion", ["energy", "obs"])
@pytest.mark.parametrize("make", [Flattened, lambda: Flattened(groups=2)], ids=["flattened", "grouped"])
@pytest.mark.parametrize("restore", ["auto", "prune", "lbyl"])
def test_seats_blocks_and_restorers_that_take_no_probes(
    criterion: str, make: Callable[[], nn.Module], restore: str
) -> None:
    torch.manual_seed(0)
    net = make().eval()
    result = lbyl.compress(
        net, torch.randn(1, 3, 4, 4), criterion=criterion, restore=restore, ratio=0.5, forecast=False
    )
    assert [len(group.keep) for group in result.plan.groups] == [4, 4]
    assert result.report.verified is not None


@pytest.mark.parametrize("criterion", ["energy", "obs"])
def test_a_budget_keeps_what_was_priced(criterion: str) -> None:
    net, x = two_layers(), torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    budget = lbyl.compress(
        net, x[:1], budget=lbyl.Budget(params=0.6), criterion=criterion, restore=data(x), forecast=False
    )
    count = len(budget.plan.groups[0].keep)
    assert budget.plan.groups[0].keep == kept(net, x, criterion, 1 - count / 12)


def with_norm() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


def classifier_of_texts() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(20, 6), nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3)).eval()


@pytest.mark.parametrize(
    ("make", "probes", "restore", "criterion", "told"),
    [
        (two_layers, torch.randn(400, 6), "data", "OBS(ridge=0.3, centered=False)", "chosen by OBS"),
        (two_layers, torch.randn(400, 6), "lbyl", "L2()", "chosen by the L2 norm"),
        (two_layers, torch.randn(400, 6), "auto", "L2()", "chosen by the L2 norm"),  # noise, and no norms
        (with_norm, torch.randn(8, 3, 8, 8), "data", "OBS(ridge=0.3, centered=False)", "chosen by OBS"),
        (with_norm, torch.randn(8, 3, 8, 8), "auto", "L2()", "chosen by the L2 norm"),  # too small for photographs
        (classifier_of_texts, torch.randint(0, 20, (40, 5)), "data", "Energy()", "chosen by the energy"),
    ],
)
def test_auto_follows_what_the_network_sees(
    make: Callable[[], nn.Module], probes: Tensor, restore: str, criterion: str, told: str
) -> None:
    net = make()
    result = lbyl.compress(
        net, probes[:1], restore=data(probes) if restore == "data" else restore, ratio=0.5, forecast=False
    )
    settings = dict(result.plan.settings["criterion"])
    name = settings.pop("name")
    assert f"{name}({', '.join(f'{key}={value}' for key, value in settings.items())})" == criterion
    assert sum(told in note for note in result.report.notes) == 1


def test_a_criterion_that_the_user_chose_is_not_told() -> None:
    chosen = lbyl.compress(two_layers(), torch.randn(1, 6), criterion="l1", restore="prune", ratio=0.5, forecast=False)
    assert not any("channels are chosen" in note for note in chosen.report.notes)


class Blind:
    sees = "everything"

    def score(self, view: object) -> Tensor:
        raise AssertionError


class Broken:
    def score(self, filters: Tensor, generator: torch.Generator) -> Tensor:
        return torch.full((len(filters),), float("nan"))


@pytest.mark.parametrize(
    ("criterion", "says"),
    [(Blind(), "sees must be"), (lbyl.L1, "is a class"), (Broken(), "NaN"), (3, "no score"), ("magic", "energy, obs")],
)
def test_criteria_that_are_none(criterion: object, says: str) -> None:
    with pytest.raises(lbyl.InputError, match=says):
        lbyl.compress(two_layers(), torch.randn(1, 6), criterion=criterion, restore="prune", ratio=0.5, forecast=False)  # pyright: ignore


class WithoutSees:
    def score(self, view: object) -> Tensor:
        return torch.zeros(1)


class SeesTooLittle:
    sees: ClassVar[str] = "consumers"

    def score(self, view: lbyl.ChannelView) -> Tensor:
        return torch.stack([reading.square.sum() for reading in view.readings])


class Complex:
    def score(self, filters: Tensor, generator: torch.Generator) -> Tensor:
        return filters.flatten(1).norm(dim=1).to(torch.complex64)


class Raises:
    def score(self, filters: Tensor, generator: torch.Generator) -> Tensor:
        raise KeyError("mine")


class OddNorm(lbyl.L2):
    norm_order = "two"


@pytest.mark.parametrize(
    ("criterion", "said"),
    [
        (WithoutSees(), "for a view it needs the attribute sees"),
        (SeesTooLittle(), "SeesTooLittle.score failed on 0 .*sees = 'consumers' says what it gets"),
        (Complex(), "complex numbers"),
        (Raises(), r"Raises.score failed on 0 \(12 filters\): KeyError: 'mine'$"),
        (OddNorm(), "norm_order is 'two'"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_criterion_that_fails_is_named(criterion: object, said: str) -> None:
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    with pytest.raises(lbyl.InputError, match=said):
        lbyl.compress(net, torch.randn(4, 6), ratio=0.5, criterion=criterion, restore="prune", forecast=False)  # pyright: ignore[reportArgumentType]
    found = lbyl.compare(net, torch.randn(4, 6), restores=["prune"], criteria={"l2": "l2", "own": criterion})
    assert [bool(row.why) for row in found.rows] == [False, False, True, True]


def test_a_saved_folder_knows_a_criterion_s_array_by_its_digest(tmp_path: Path) -> None:
    @dataclass
    class Weighted:
        weights: Tensor
        shape: Callable[[Tensor], Tensor] = torch.abs

        def score(self, filters: Tensor, generator: torch.Generator) -> Tensor:
            return self.shape(filters.flatten(1) * self.weights).sum(1)

    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    settings = []
    for number in range(2):
        own = Weighted(torch.arange(7.0) + number)
        result = lbyl.compress(net, torch.randn(4, 6), ratio=0.5, criterion=own, restore="prune", forecast=False)
        saved = result.save(tmp_path / str(number))
        settings.append(json.loads((saved / "lbyl.json").read_text())["plan"]["settings"]["criterion"])
        assert lbyl.load(saved, net)[0].out_features == 6
    first, second = settings
    assert first["weights"]["shape"] == [7]
    assert first["weights"]["sha256"] != second["weights"]["sha256"]
