"""Where a network is too large to try what cuts change at its outputs, gradients say it to first order."""

from __future__ import annotations

import pytest
import torch
from nets import images
from torch import Tensor, nn

import lbyl
from lbyl.budget import outputs
from lbyl.budget.outputs import Gradients, Trials, Unmeasured, changes_at_outputs, measure_for
from lbyl.moments import Probes
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.inputs import ExampleInputs


def cnn(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace)),
        *(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(inplace), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(inplace)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 24), nn.ReLU(inplace), nn.Linear(24, 10)),
    ).eval()


class Writer(nn.Module):
    """A language model: each token's logits depend on the mean of the tokens before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first, self.second = nn.Embedding(50, 24), nn.Linear(24, 48), nn.Linear(48, 24)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 50)
        nn.init.normal_(self.head.weight, std=0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        return self.head(self.norm(x + self.second(self.first(x).relu())))


def some_changes(net: nn.Module, names: list[str], size: float) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    state = tensors_of(net)
    noise = {name: size * torch.randn(state[name].shape, generator=generator) * state[name].std() for name in names}
    return {**{name: {name: more} for name, more in noise.items()}, "all": noise}


@torch.no_grad()
def really(net: nn.Module, x: Tensor, change: dict[str, Tensor], text: bool) -> float:
    """What a change of weights changes at the outputs."""
    state = tensors_of(net)
    before = net(x)
    after = torch.func.functional_call(net, {name: state[name] + more for name, more in change.items()}, (x,))
    if text:
        p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
        return float((p.exp() * (p - q)).sum()) / len(x)
    return float((after - before).square().sum() / before.square().sum())


@pytest.mark.parametrize("inplace", [False, True])
def test_small_changes_of_weights_are_foretold(inplace: bool) -> None:
    net, x = cnn(inplace), images(12, 3, 16, 16)
    names = [f"{number}.weight" for number in (3, 5, 9, 11)]
    changes, inputs = some_changes(net, names, 0.01), ExampleInputs.of(x)
    values = {name: tensors_of(net)[name] for name in names}
    found = changes_at_outputs(net, inputs, inputs, changes, values, torch.Generator().manual_seed(0), draws=16)
    assert len(found) == 5
    for key, change in changes.items():
        assert 0.7 < found[key] / really(net, x, change, text=False) < 1.4, key


def test_small_changes_of_a_language_model_are_foretold() -> None:
    net = Writer().eval()
    x = torch.randint(50, (12, 40), generator=torch.Generator().manual_seed(0))
    names = ["first.weight", "second.weight", "head.weight"]
    changes, inputs = some_changes(net, names, 0.01), ExampleInputs.of(x)
    values = {name: tensors_of(net)[name] for name in names}
    found = changes_at_outputs(net, inputs, inputs, changes, values, torch.Generator().manual_seed(0), draws=16)
    for key, change in changes.items():
        assert 0.7 < found[key] / really(net, x, change, text=True) < 1.4, key


def test_the_network_stays_as_it_is() -> None:
    net, x = cnn(), images(2, 3, 16, 16)
    net[3].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    asking = [parameter.requires_grad for parameter in net.parameters()]
    changes, inputs = some_changes(net, ["3.weight", "5.weight"], 0.1), ExampleInputs.of(x)
    values = {name: tensors_of(net)[name] for name in ("3.weight", "5.weight")}
    changes_at_outputs(net, inputs, inputs, changes, values, torch.Generator().manual_seed(0))
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    assert [parameter.requires_grad for parameter in net.parameters()] == asking
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_way_to_measure_is_what_can_be_afforded(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = cnn(), images(4, 3, 16, 16)
    monkeypatch.setattr(outputs, "_FEW", 2)
    inputs = ExampleInputs.of(x)
    probes = Probes((inputs,), inputs, batch_statistics=False)

    def way() -> outputs.Measure:
        return measure_for(net, inputs, probes, tensors_of(net), 4, 0)

    macs = lbyl.inspect(net, x).graph.macs
    assert macs is not None
    found = way()
    assert isinstance(found, Trials)
    assert len(found.shares) == 3
    assert found.probes.held_out.size == 4
    monkeypatch.setattr(outputs, "_TRIALS", 12 * macs - 1)  # four groups, three cuts of each
    found = way()
    assert isinstance(found, Trials)
    assert (len(found.shares), found.probes.held_out.size) == (3, 2)
    monkeypatch.setattr(outputs, "_FEW_TRIALS", 6 * macs - 1)
    found = way()
    assert isinstance(found, Trials)
    assert (found.shares, found.probes.held_out.size) == ((0.5,), 2)
    monkeypatch.setattr(outputs, "_FEW_TRIALS", 2 * macs - 1)
    found = way()
    assert isinstance(found, Gradients)
    assert (found.draws, found.probes.held_out.size) == (4, 4)
    monkeypatch.setattr(outputs, "_GRADIENTS", 4 * macs)
    found = way()
    assert isinstance(found, Gradients)
    assert found.draws == 1
    with monkeypatch.context() as small:
        small.setattr(outputs, "ROOM", 1000)  # bytes that activations may take
        assert isinstance(way(), Unmeasured)
    monkeypatch.setattr(outputs, "_GRADIENTS", 0.1 * macs)
    assert isinstance(way(), Unmeasured)


class Branches(nn.Module):
    """Two equal branches, of which one hardly counts."""

    def __init__(self, backward: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backward = backward
        self.a, self.b = nn.Linear(8, 64), nn.Linear(8, 64)
        self.c, self.d = nn.Linear(64, 16), nn.Linear(64, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.a(x).relu()) + 0.01 * self.d(self.b(x).relu())
        if not self.backward:
            y = y.sigmoid()
            with torch.no_grad():
                y.mul_(2)  # what the backward pass of the sigmoid would need
        return self.last(y)


def widths(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, int], str]:
    monkeypatch.setattr(outputs, "_TRIALS", 0)
    monkeypatch.setattr(outputs, "_FEW_TRIALS", 0)
    budget = lbyl.Budget(params=0.7, round_to=1)
    restore = lbyl.LeastSquares(lbyl.Data([images(64, 8)]))
    report = lbyl.compress(net, images(1, 8), budget=budget, restore=restore, forecast=False).report
    (note,) = (note for note in report.notes if note.startswith("widths:"))
    return {row.group: row.after for row in report.rows}, note


@pytest.mark.parametrize("together", [2**30, 1])
def test_groups_that_hardly_matter_lose_most(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_TOGETHER", together)
    kept, note = widths(Branches().eval(), monkeypatch)
    assert "gradients on held-out probes say it to first order" in note
    assert kept.get("a", 64) > 2 * kept["b"]


def test_without_gradients_all_groups_weigh_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, note = widths(Branches(backward=False).eval(), monkeypatch)
    assert note.endswith("all weigh equally")
    assert kept["a"] < 2 * kept["b"]
