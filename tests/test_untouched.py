"""Networks, inputs and the global state of PyTorch are what they were, whatever a forward pass writes to."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import images
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import lbyl


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU()), nn.Conv2d(12, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class WritesInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return super().forward(x)


class Counts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Replaces(Counts):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return Base.forward(self, x) * self.calls


class KeepsArray(Base):
    def __init__(self) -> None:
        super().__init__()
        self.history, self.last = np.zeros(3), torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.history[0] += 1
        self.last += 1
        return super().forward(x) * float(self.history[0]) * self.last[0]


class InstallsHooks(Base):
    """As models of transformers do when they first run; a hook that is there twice would double twice."""

    def __init__(self) -> None:
        super().__init__()
        self.installed = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.installed:
            self.installed = True
            self.a.register_forward_hook(lambda module, args, output: 2 * output)
        return super().forward(x)


class CachesBiases(Base):
    """As LeViT keeps what it computes from its weights, until it is trained again."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.cache = nn.Parameter(torch.ones(12)), {}

    def train(self, mode: bool = True) -> CachesBiases:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias.view(1, -1, 1, 1) * 2
        return self.b(self.a(x) + self.cache["bias"])


class Noisy(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + torch.randn_like(y) + random.random() + float(np.random.rand())  # noqa: NPY002


class RegistersWhatItNeeds(Base):
    """Makes parts when it first runs, and puts a new one into another's place at every call."""

    act: nn.Module
    scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "act"):
            self.act, self.scale = nn.ReLU(), nn.Parameter(torch.ones(()))
        self.a[2] = nn.LeakyReLU()
        return super().forward(self.act(x)) * self.scale


KINDS = [Base, WritesInput, Counts, Replaces, KeepsArray, Noisy]


def content(net: nn.Module) -> dict[str, Tensor]:
    held = {f"own {k}": torch.as_tensor(v) for k, v in vars(net).items() if isinstance(v, np.ndarray | Tensor)}
    return copy.deepcopy({**net.state_dict(), **held})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("restore", ["prune", "lbyl", "auto"])
def test_a_forward_pass_that_writes_leaves_no_trace(kind: type[Base], restore: str) -> None:
    net, x = kind().eval(), images(2, 3, 8, 8)
    before, seen = content(net), x.clone()
    result = lbyl.compress(net, x, ratio=0.5, restore=restore)
    assert result.report.verified is not None
    assert result.report.rows[0].after == 6
    assert torch.equal(x, seen)
    after = content(net)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    kept = content(result.model)
    assert all(torch.equal(kept[name], before[name]) for name in kept if name.startswith(("own", "calls")))


def test_parts_and_parameters_that_a_forward_pass_registers_are_not_left_behind() -> None:
    net, x = RegistersWhatItNeeds().eval(), images(2, 3, 8, 8)
    before = [*net.named_modules()], [*net.named_parameters()]
    result = lbyl.compress(net, x, ratio=0.5, restore="prune", forecast=False)
    assert result.report.rows[0].after == 6
    assert [name for name, _ in before[0]] == [name for name, _ in net.named_modules()]
    assert all(now is then for (_, now), (_, then) in zip(net.named_modules(), before[0], strict=True))
    assert all(now is then for (_, now), (_, then) in zip(net.named_parameters(), before[1], strict=True))
    assert result.model(x).shape == net(x).shape


@pytest.mark.parametrize("kind", KINDS)
def test_inspection_leaves_no_trace(kind: type[Base]) -> None:
    net, x = kind().eval(), images(2, 3, 8, 8)
    before, seen = content(net), x.clone()
    lbyl.inspect(net, x)
    assert torch.equal(x, seen)
    assert all(torch.equal(tensor, before[name]) for name, tensor in content(net).items())


@pytest.mark.parametrize("run_before", [False, True])
@pytest.mark.parametrize("kind", [InstallsHooks, CachesBiases])
def test_what_a_first_run_leaves_in_modules_is_of_no_matter(kind: type[Base], run_before: bool) -> None:
    net, x = kind().eval(), images(2, 3, 8, 8)
    with torch.no_grad():
        expected = kind().eval()(x)
        if run_before:
            net(x)
        for _ in range(2):
            lbyl.inspect(net, x)
        result = lbyl.compress(net, x, ratio=0.5, restore="prune", strict=True)
        assert torch.equal(net(x), expected)
        twice = [result.model(x) for _ in range(2)]
    assert result.report.rows[0].after == 6
    assert torch.equal(*twice)


class Frozen(OrderedDict[str, int]):
    """A configuration that refuses to be changed, as those of diffusers do."""

    def refuse(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("frozen")

    __delitem__ = update = clear = pop = refuse  # pyright: ignore[reportAssignmentType]


class Grows(Base):
    """Writes into a list, a set and a dictionary of its own at each run."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Frozen(width=12)
        self.listed, self.chosen, self.named = [1], {1}, {"a": 1}

    def forward(self, x: Tensor) -> Tensor:
        self.listed.append(2)
        self.chosen.add(2)
        self.named["b"] = 2
        return super().forward(x)


def test_containers_hold_what_they_held() -> None:
    net, x = Grows().eval(), images(2, 3, 8, 8)
    before = [net.config, net.listed, net.chosen, net.named]
    lbyl.inspect(net, x)
    smaller = lbyl.compress(net, x, ratio=0.5, restore="prune", forecast=False).model
    for each in (net, smaller):
        assert (dict(each.config), each.listed, each.chosen, each.named) == ({"width": 12}, [1], {1}, {"a": 1})
    assert all(now is then for now, then in zip([net.config, net.listed, net.chosen, net.named], before, strict=True))


def folded(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Conv2d(3, 12, 3)), nn.ReLU(), nn.Conv2d(12, 4, 3))


class Jittered(nn.Module):
    """A classifier without batch norms, which adds noise to its inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(192, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.randn_like(x) * random.random()
        return self.b(self.a(x.flatten(1)).relu())


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": Base,
    "noise": Noisy,
    "noise, no batch norms": Jittered,
    "weight norm": lambda: folded(weight_norm),
    "spectral norm": lambda: folded(spectral_norm),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("restore", ["prune", "coreset", "auto"])
def test_the_global_generators_stay(name: str, restore: str, tmp_path) -> None:
    net, fresh, x = NETS[name]().eval(), NETS[name]().eval(), images(2, 3, 8, 8)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    result = lbyl.compress(net, x, ratio=0.5, restore=restore)
    result.save(tmp_path / "saved")
    lbyl.load(tmp_path / "saved", fresh)
    lbyl.inspect(net, x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


def net_with(name: str, value: float) -> Base:
    net = Base().eval()
    state = net.state_dict()
    state[name].flatten()[0] = value
    return net


BAD_TENSORS = {
    "a weight that is not a number": ("b.weight", float("nan")),
    "a mean that is not a number": ("a.1.running_mean", float("nan")),
    "an infinite variance": ("a.1.running_var", float("inf")),
    "a negative variance": ("a.1.running_var", -0.5),
    "a huge weight": ("a.0.weight", 1e30),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_that_nothing_can_be_restored_from_are_named(what: str) -> None:
    name, value = BAD_TENSORS[what]
    with pytest.raises(lbyl.InputError, match=name):
        lbyl.compress(net_with(name, value), images(2, 3, 8, 8), ratio=0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_the_batch_that_is_not_finite_is_named(value: float) -> None:
    batches = [images(4, 3, 8, 8) for _ in range(3)]
    batches[1][2, 0, 0, 0] = value
    with pytest.raises(lbyl.InputError, match="batch 1 "):
        lbyl.compress(
            Base().eval(), images(1, 3, 8, 8), restore=lbyl.LeastSquares(moments=lbyl.Data(batches)), ratio=0.5
        )
    if value != 1e30:
        with pytest.raises(lbyl.InputError, match="example_inputs hold"):
            lbyl.compress(Base().eval(), batches[1], ratio=0.5)


def test_the_layer_that_reads_numbers_without_a_square_is_named() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    net[0].weight.data *= 1e17
    data = lbyl.LeastSquares(lbyl.Data([images(8, 6) * 1e5 for _ in range(3)]))
    with pytest.raises(lbyl.RestorationError, match="'1' reads NaN, or numbers whose squares are infinite"):
        lbyl.compress(net, images(2, 6), restore=data, ratio={"0": 0.5}, forecast=False)


def test_what_imports_draw_from_the_global_generator_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "draws_when_imported.py").write_text("import random\nmade = random.random()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(lbyl.HOME, "made", "draws_when_imported")
    before = random.getstate()
    assert 0 <= lbyl.made < 1
    assert random.getstate() == before
    delattr(lbyl, "made")
