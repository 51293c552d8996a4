"""Copies of networks compute what the originals do: hooks and functions refer to the copy, and names stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbyl
from lbyl.runtime.copying import copy_model

SEEN: dict[str, Tensor] = {}
"""Features that the hooks of `ByGlobal` store, and the network reads."""


class Features(nn.Module):
    """Reads features that hooks store: those of a copy must come from the copy's own layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU())
        self.head = nn.Linear(20, 3)
        self.features: dict[str, Tensor] = {}
        for place in (1, 3):
            self.body[place].register_forward_hook(self.stores(str(place)))

    def stores(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: object, output: Tensor) -> None:
            self.features[name] = output

        return hook

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.head(torch.cat([self.features[name].mean((2, 3)) for name in ("1", "3")], 1))


class ByDefault(Features):
    def stores(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: object, output: Tensor, into: dict[str, Tensor] = self.features) -> None:
            into[name] = output

        return hook


class ByGlobal(Features):
    def __init__(self) -> None:
        super().__init__()
        self.features = SEEN

    def stores(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: object, output: Tensor) -> None:
            SEEN[name] = output

        return hook


class ByAttribute(Features):
    """A function in an attribute calls a layer of the network."""

    def __init__(self) -> None:
        super().__init__()
        first = self.body[0]
        self.start = lambda x: torch.relu(first(x))

    def forward(self, x: Tensor) -> Tensor:
        kept = self.start(x)
        return self.head(torch.cat([kept.mean((2, 3)), self.body[2](kept).relu().mean((2, 3))], 1))


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("kind", [Features, ByDefault, ByGlobal, ByAttribute])
def test_functions_of_a_copy_refer_to_the_copy(kind: type[Features], ran: bool) -> None:
    SEEN.clear()
    net, x, other = kind().eval(), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = net(other)
        net.features.clear()
        if ran:
            net(x)
        stored = {name: tensor.clone() for name, tensor in net.features.items()}
        result = lbyl.compress(net, x, ratio=0.25, restore="prune", strict=True, forecast=False)
        assert [(row.group, row.after) for row in result.report.rows] == [("body.0", 6), ("body.2", 9)]
        assert net.features.keys() == stored.keys()
        assert all(torch.equal(net.features[name], tensor) for name, tensor in stored.items())
        assert not torch.equal(result.model(x), result.model(other))
        assert torch.equal(net(other), expected)
        assert torch.equal(copy_model(net)(other), expected)
        smaller = lbyl.compress(net, x, ratio=0.25, restore="prune", forecast=False).model
        torch.testing.assert_close(smaller(other), result.model(other))


def test_a_copy_with_other_names_is_refused() -> None:
    class Rebuilt(nn.Module):
        def __init__(self, scope: str = "outer") -> None:
            super().__init__()
            self.layers = nn.ModuleDict({f"{scope}_first": nn.Linear(4, 8), f"{scope}_last": nn.Linear(8, 2)})

        def forward(self, x: Tensor) -> Tensor:
            first, last = self.layers.values()
            return last(first(x).relu())

        def __deepcopy__(self, memo: Any) -> Rebuilt:
            return Rebuilt("inner")

    with pytest.raises(lbyl.InputError, match=r"its copy has no 'layers\.outer_first"):
        lbyl.compress(Rebuilt().eval(), torch.randn(2, 4), ratio=0.5, restore="prune", forecast=False)


def test_a_sparse_buffer_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    net.register_buffer("heads", torch.eye(4).to_sparse(), persistent=False)
    smaller = lbyl.compress(net, torch.randn(2, 6), ratio=0.5, restore="prune", forecast=False).model
    assert smaller[0].out_features == 8
    assert smaller.get_buffer("heads").is_sparse


def test_a_sparse_buffer_can_not_be_saved(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    net.register_buffer("heads", torch.eye(4).to_sparse())
    result = lbyl.compress(net, torch.randn(2, 6), ratio=0.5, restore="prune", forecast=False)
    with pytest.raises(lbyl.InputError, match="heads is sparse"):
        result.save(tmp_path / "smaller")
    assert not list(tmp_path.iterdir())


class Named(nn.Module):
    """A body that is registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.again, self.head = self.body, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.parametrize("limit", [{"macs": 0.6}, {"params": 0.6}, {"size_mb": 0.0072}])
def test_budgets_count_layers_with_two_names(limit: dict[str, float]) -> None:
    net, x, budget = Named().eval(), torch.randn(2, 3, 8, 8), lbyl.Budget(**limit)  # pyright: ignore[reportArgumentType]
    result = lbyl.compress(net, x, budget=budget, restore="prune", forecast=False)
    before, after = result.report.parameters
    assert 0.5 < after / before < 0.7
    assert result.model.again is result.model.body


def test_norms_that_compute_in_float32_are_taken_over_the_kept() -> None:
    class Low(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.float()).type(input.dtype)

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm, self.up, self.down = nn.Linear(6, 16), Low(16), nn.Linear(16, 24), nn.Linear(24, 16)
            self.after, self.last = Low(16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.after(x + self.down(self.up(self.norm(x)).relu())))

    result = lbyl.compress(
        Stream().eval(), torch.randn(4, 6), ratio=0.25, scope="all", restore="prune", strict=True, forecast=False
    )
    assert [(row.group, row.after) for row in result.report.rows] == [("first", 12), ("up", 18)]
    assert result.model.norm.normalized_shape == (12,)


def test_a_layer_in_a_plain_list_is_named_as_the_reason() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.hidden, self.last = nn.Linear(6, 16), [nn.Linear(16, 8)], nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.hidden[0](self.first(x).relu()).relu())

    group = lbyl.inspect(Hidden().eval(), torch.randn(2, 6)).graph.groups[0]
    assert "plain list? use nn.ModuleList" in str(group.reason)


def _plain() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 10)).eval()


def _by_global(net: nn.Module) -> None:
    """As in a notebook, where what the function calls is a global name."""
    names: dict[str, Any] = {"old": net.forward}
    exec("def forward(x):\n    return old(x)", names)
    net.forward = names["forward"]


def _by_wraps(net: nn.Module) -> None:
    old = net.forward

    @wraps(old)
    def forward(x: Tensor) -> Tensor:
        return old(x)

    net.forward = forward


WRAPS: dict[str, Callable[[nn.Sequential], Any]] = {
    "no_grad": lambda net: setattr(net, "forward", torch.no_grad()(net.forward)),
    "autocast": lambda net: setattr(net, "forward", torch.autocast("cpu", enabled=False)(net.forward)),
    "partial": lambda net: setattr(net, "forward", partial(net.forward)),
    "partial in a closure": lambda net: setattr(net, "forward", torch.no_grad()(partial(net.forward))),
    "wraps": _by_wraps,
    "global name": _by_global,
    "compiled": lambda net: net.compile(backend="eager"),
    "compiled forward": lambda net: setattr(net, "forward", torch.compile(net.forward, backend="eager")),
    "a layer": lambda net: setattr(net[2], "forward", torch.no_grad()(net[2].forward)),
    "a compiled layer": lambda net: net[0].compile(backend="eager"),
    "a wrapped layer": lambda net: net.__setitem__(2, torch.compile(net[2], backend="eager")),
}


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.filterwarnings("ignore")
def test_a_forward_that_holds_the_original_is_copied(name: str, tmp_path: Path) -> None:
    """Otherwise the smaller network computes with the original's layers, and all seems well."""
    net, x = _plain(), torch.randn(2, 3, 6, 6)
    WRAPS[name](net)
    before = net(x)
    result = lbyl.compress(net, x, ratio=0.75, restore="prune", strict=True, forecast=False)
    assert result.report.macs[1] < result.report.macs[0] / 4
    assert torch.equal(net(x), before)
    assert not torch.allclose(result.model(x), before)
    if name != "a wrapped layer":  # whose weights have other names
        plain = lbyl.compress(_plain(), x, ratio=0.75, restore="prune", forecast=False)
        torch.testing.assert_close(result.model(x), plain.model(x))
        torch.testing.assert_close(lbyl.load(result.save(tmp_path / "small"), _plain())(x), plain.model(x))


class Hidden:
    """Calls a network, and stays the same object in copies."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Tensor:
        return type(self.net).forward(self.net, x)

    def __deepcopy__(self, memo: object) -> Hidden:
        return self


def test_a_network_that_computes_with_the_original_s_weights_is_not_verified() -> None:
    net = _plain()
    net.forward = Hidden(net)
    with pytest.raises(lbyl.VerificationError, match="does not compute with its own weights, but with the original's"):
        lbyl.compress(net, torch.randn(2, 3, 6, 6), ratio=0.5, restore="prune", forecast=False)


def test_a_part_that_is_not_copied_is_refused() -> None:
    """A frozen teacher, say: a cut would change the user's own."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def __deepcopy__(self, memo: object) -> Frozen:
            return self

    net = nn.Sequential(Frozen(), nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(lbyl.InputError, match="its copy shares the module '0' with it"):
        lbyl.compress(net, torch.randn(2, 3, 6, 6), ratio=0.5, forecast=False)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
