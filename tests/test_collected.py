"""Results of several layers that the code collects one by one: summed into zeros, or written to places of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lbyl


def into_zeros(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], net.width, *x.shape[2:])
    for layer in net.layers:
        out += layer(x)
    return out


def onto_zeros(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], net.width, *x.shape[2:])
    for layer in net.layers:
        out = out + layer(x)
    return out


def like_the_first(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros_like(net.layers[0](x))
    for layer in net.layers:
        out += layer(x)
    return out


def onto_nothing(net: Net, x: Tensor) -> Tensor:
    out = None
    for layer in net.layers:
        out = layer(x) if out is None else out + layer(x)
    assert out is not None
    return out


def rows_first(net: Net, x: Tensor) -> Tensor:
    out = torch.empty(len(net.layers), x.shape[0], net.width, *x.shape[2:])
    for place, layer in enumerate(net.layers):
        out[place] = layer(x)
    return out.sum(0)


def beside_each_other(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], len(net.layers), net.width, *x.shape[2:])
    for place, layer in enumerate(net.layers):
        out[:, place] = layer(x)
    return out.amax(1)


class Net(nn.Module):
    def __init__(self, collect: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.collect, self.width = collect, 12
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(12, 2, 1)
        self.layers = nn.ModuleList([nn.Conv2d(8, 12, 3, padding=1) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.collect(self, self.first(x).relu()).relu())


@pytest.mark.parametrize(
    "collect", [into_zeros, onto_zeros, like_the_first, onto_nothing, rows_first, beside_each_other]
)
def test_layers_whose_results_are_collected_are_cut_together(collect: Callable[[Net, Tensor], Tensor]) -> None:
    net, x = Net(collect).eval(), torch.randn(2, 3, 8, 8)
    result = lbyl.compress(net, x, ratio=0.25, scope="all", restore="prune", strict=True, forecast=False)
    assert [(row.group, row.after) for row in result.report.rows] == [("first", 6), ("layers.0", 9)]
    assert [layer.out_channels for layer in result.model.layers] == [9, 9, 9]
    assert result.report.verified is not None
    assert result.report.verified < 1e-6
    assert result.model(torch.randn(5, 3, 12, 12)).shape == (5, 2, 10, 10)


def test_a_channel_that_is_written_by_its_index_stays_where_it_is() -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x[:, 3] = 1.0
            return self.last(x)

    found = lbyl.inspect(Marked().eval(), torch.randn(2, 6)).graph.groups[0]
    assert "selected by its index" in str(found.reason)


class Filled(nn.Module):
    """A residual stream that meets a value which is the same everywhere."""

    def __init__(self, meet: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.meet = meet
        self.first, self.block, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.meet(x + self.block(torch.relu(x))).relu())


FOLLOWING: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda h: h + torch.ones(h.shape[0], 1, h.shape[-1]).to(h.dtype),
    "changed": lambda h: h + 2 * torch.ones(h.shape[-1]).sqrt(),
    "product": lambda h: h * torch.full((h.shape[-1],), 0.5),
    "largest": lambda h: torch.maximum(h, h.new_zeros(1, 1, h.shape[2])),
    "where": lambda h: torch.where(h.sum(-1, keepdim=True) > 0, h, torch.zeros(*h.shape)),
    "shifted": lambda h: h + torch.cat([torch.zeros(h.shape[0], 1, h.shape[2]), h[:, :-1]], 1),
    "stacked": lambda h: torch.stack([h, torch.zeros(*h.shape)], 1).sum(1),
}


@pytest.mark.parametrize("meet", FOLLOWING.values(), ids=FOLLOWING.keys())
def test_values_that_are_the_same_everywhere_follow_the_width_that_the_code_asks_for(
    meet: Callable[[Tensor], Tensor],
) -> None:
    result = lbyl.compress(
        Filled(meet).eval(), torch.randn(2, 5, 6), ratio=0.5, scope="all", restore="prune", forecast=False
    )
    assert result.model.first.out_features == 6
    assert result.report.verified is not None
    assert result.report.verified < 1e-6


def test_a_literal_width_keeps_the_layers_whole() -> None:
    net = Filled(lambda h: h + torch.zeros(1, 1, 12)).eval()
    with pytest.raises(lbyl.VerificationError, match="first: without them the code fails"):
        lbyl.compress(net, torch.randn(2, 5, 6), ratio=0.5, scope="all", restore="prune", forecast=False)


class Settings:
    width = 0

    def __init__(self) -> None:
        self.inside = 12


class Stateful(nn.Module):
    """A state of zeros, whose width is in an object of settings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.settings = Settings()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.decay = nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        u, state = self.first(x), torch.zeros(x.shape[0], self.settings.inside)
        for step in range(x.shape[1]):
            state = self.decay * state + u[:, step]
        return self.last(state)


def test_a_width_in_an_object_of_settings_follows() -> None:
    net = Stateful().eval()
    result = lbyl.compress(net, torch.randn(2, 5, 6), ratio=0.5, scope="all", restore="prune", forecast=False)
    assert result.model.first.out_features == result.model.settings.inside == 6
    assert net.settings.inside == 12


def masked_in_part(h: Tensor) -> Tensor:
    mask = torch.ones(h.shape[-1])
    mask[5:] = 0
    return h * mask


def test_a_mask_that_the_code_writes_is_no_single_number() -> None:
    found = lbyl.inspect(Filled(masked_in_part).eval(), torch.randn(2, 5, 6)).graph.groups
    assert "fixed size" in str(next(group for group in found if group.name == "first").reason)
