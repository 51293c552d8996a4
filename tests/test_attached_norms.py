"""Batch norms that are attached where a network has none, and folded away again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nets import settle
from torch import Tensor, nn

import lbyl
from lbyl.moments.attached_norms import measure_statistics
from lbyl.runtime.inputs import ExampleInputs


class Residual(nn.Module):
    """Two blocks without any norm, as a deployed network has them."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.second = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for first, second in zip(self.first, self.second, strict=True):
            x = torch.relu(x + second(torch.relu(first(x))))
        return self.head(x.mean((2, 3)))


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def data(count: int = 96) -> lbyl.Data:
    return lbyl.Data(list(images(count, 1).split(count // 3)), batches=3)


def test_the_smaller_network_has_the_users_modules_only() -> None:
    net = settle(Residual())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = lbyl.compress(net, images(1), restore=lbyl.LeastSquares(moments=data()), ratio=0.5, forecast=False)
    assert set(result.model.state_dict()) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in result.model.modules())
    assert result.report.verified is not None
    assert result.report.verified < 1e-6


def error(net: nn.Module, other: nn.Module) -> float:
    x = images(256, 7)
    with torch.no_grad():
        expected, found = net(x), other(x)
    expected, found = expected - expected.mean(0), found - expected.mean(0)
    return float((expected - found).norm() / expected.norm())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_statistics_of_our_own_help(seed: int) -> None:
    net = settle(Residual(), seed)
    plain = lbyl.LeastSquares(moments=data(), attach_norms=False, prior=0.0)
    with_norms, without = (
        lbyl.compress(net, images(1), restore=restore, ratio=0.5, forecast=False).model
        for restore in (replace(plain, attach_norms=True), plain)
    )
    assert error(net, with_norms) < error(net, without)


def test_a_network_with_batch_norms_gets_no_others() -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    with_norms, without = (
        lbyl.compress(
            net, images(1), restore=lbyl.LeastSquares(moments=data(), attach_norms=attach), ratio=0.5, forecast=False
        ).model
        for attach in (True, False)
    )
    for one, other in zip(with_norms.state_dict().values(), without.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_what_is_not_changed_is_bit_for_bit_the_same() -> None:
    """Batch norms that were not moved are not folded: rounding would change every weight."""
    net = settle(Residual())
    result = lbyl.compress(net, images(1), ratio={"first.0": 0.25}, restore="prune", criterion="energy", forecast=False)
    assert torch.equal(result.model.stem.weight, net.stem.weight)  # pyright: ignore


class Twice(nn.Module):
    """A layer that runs twice, one that shares its weight, one whose output is the network's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.again, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.again.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(torch.relu(self.wide(torch.relu(self.inner(torch.relu(self.inner(x)))))))
        return self.last(torch.relu(self.twin(torch.relu(self.again(x)))))


class Tokens(nn.Module):
    """Linear layers with their channels last, and a layer norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)
        self.third, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.third(self.second(self.norm(torch.relu(self.first(x)))))).mean(1))


class Grouped(nn.Module):
    """A depthwise and a transposed convolution, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.d = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))))


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize(
    ("make", "shape"), [(Twice, (8,)), (Tokens, (5, 8)), (Grouped, (3, 8, 8))], ids=["twice", "tokens", "grouped"]
)
def test_layers_of_all_kinds(make: Callable[[], nn.Module], shape: tuple[int, ...], scope: str) -> None:
    net, x = settle(make()), torch.randn(96, *shape, generator=torch.Generator().manual_seed(2))
    restore = lbyl.LeastSquares(moments=lbyl.Data(list(x.split(32)), batches=3))
    if isinstance(net, Tokens) and scope == "inner":  # a layer norm is taken over all that could go
        with pytest.raises(lbyl.InputError, match="no group can be pruned"):
            lbyl.compress(net, x[:1], ratio={"first": 0.5}, restore=restore, scope=scope, forecast=False)
        return
    result = lbyl.compress(net, x[:1], restore=restore, scope=scope, ratio=0.5, forecast=False)
    assert result.report.assessment is not None
    assert result.report.assessment.restored <= result.report.assessment.pruned
    assert set(result.model.state_dict()) == set(net.state_dict())


def test_dreams_meet_the_statistics_that_photographs_have() -> None:
    net = settle(Residual())
    result = lbyl.compress(
        net, images(1), restore=lbyl.LeastSquares(moments=lbyl.Dream(images=24, steps=3)), ratio=0.5, forecast=False
    )
    assert result.report.assessment is not None
    assert result.report.assessment.restored < result.report.assessment.pruned


def test_a_sweep_keeps_the_statistics(tmp_path: Path) -> None:
    net, x = settle(Residual()), images(1)
    budgets = [lbyl.Budget(macs=0.7), lbyl.Budget(macs=0.5)]
    restore = lbyl.LeastSquares(moments=lbyl.Photographs(24))
    for each in ([budgets[0]], budgets):  # the second run goes on with what the first one kept
        lbyl.sweep(net, x, each, tmp_path / "kept", restore=restore)
    lbyl.sweep(net, x, budgets, tmp_path / "anew", restore=restore)
    kept, anew = (lbyl.load(tmp_path / place / "macs-0.5", Residual()) for place in ("kept", "anew"))
    for one, other in zip(kept.state_dict().values(), anew.state_dict().values(), strict=True):
        assert torch.equal(one, other)


class OneLeft(Residual):
    """The same with one batch norm that was not folded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.relu(self.stem(x)))
        for first, second in zip(self.first, self.second, strict=True):
            x = torch.relu(x + second(torch.relu(first(x))))
        return self.head(x.mean((2, 3)))


def test_a_batch_norm_that_was_left_does_not_speak_for_the_rest() -> None:
    """Deployed files keep a few that have no convolution before them."""
    torch.manual_seed(0)
    net = settle(OneLeft())
    result = lbyl.compress(net, images(1), ratio=0.5, criterion="auto", forecast=False)
    told = " ".join(result.report.notes)
    assert "too few batch norms" in told
    assert "OBS" in told
    with_data = [
        lbyl.compress(
            net, images(1), ratio=0.5, restore=lbyl.LeastSquares(moments=data(), attach_norms=attach), forecast=False
        )
        for attach in (True, False)
    ]
    assert error(net, with_data[0].model) < error(net, with_data[1].model)


def test_no_pass_over_all_inputs_where_no_layer_can_have_a_batch_norm() -> None:
    class Counting(nn.Sequential):
        rows = 0

        def forward(self, input: Tensor) -> Tensor:
            self.rows += len(input)
            return super().forward(input)

    net = Counting(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False)).eval()
    batches = [ExampleInputs.of(torch.randn(16, 4)) for _ in range(3)]
    assert measure_statistics(net, batches) == {}
    assert net.rows <= 2


class Fixed(nn.Module):
    """A network that takes a fixed number of images, or any."""

    def __init__(self, rows: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = rows
        self.a, self.b, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rows is None else x.reshape(self.rows, 3, 8, 8)
        return self.out(self.b(self.a(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("rows", [2, 4])
def test_statistics_do_not_depend_on_how_many_inputs_run_at_a_time(rows: int) -> None:
    fixed, free, x = Fixed(rows).eval(), Fixed(None).eval(), torch.randn(rows, 3, 8, 8)
    batches = [ExampleInputs.of(torch.randn(16, 3, 8, 8)) for _ in range(2)]
    some = ExampleInputs.of(x).with_rows(fixed)
    ours = measure_statistics(fixed, [replace(batch, rows=some.rows) for batch in batches])
    theirs = measure_statistics(free, batches)
    assert ours.keys() == theirs.keys() != set()
    for name, (mean, var) in theirs.items():
        torch.testing.assert_close(ours[name][0], mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours[name][1], var, rtol=1e-4, atol=1e-6)
    errors = {}
    for how in ("auto", "prune"):
        result = lbyl.compress(fixed, x, ratio=0.25, restore=how, forecast=False)
        errors[how] = float((fixed(x) - result.model(x)).detach().norm())
    assert errors["auto"] < errors["prune"]


class FixedRows(nn.Module):
    """Few rows at a time say too little of a layer's mean and variance."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.a, self.b, self.out = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.a(x).relu().reshape(self.rows, 32)).relu())


@pytest.mark.parametrize("rows", [2, 8])
def test_few_inputs_at_a_time_do_not_make_it_worse_than_plain_pruning(rows: int) -> None:
    torch.manual_seed(0)
    net = FixedRows(rows)
    for parameter in net.parameters():
        parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    net, errors = net.eval(), {}
    for how in ("auto", "prune"):
        smaller = lbyl.compress(
            net, torch.randn(rows, 12), ratio=0.4, criterion="l2", restore=how, forecast=False
        ).model
        torch.manual_seed(1)
        given = [torch.randn(rows, 12) for _ in range(40)]
        errors[how] = sum(float((net(x) - smaller(x)).detach().square().sum()) for x in given)
    assert errors["auto"] < errors["prune"]
