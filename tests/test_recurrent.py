"""Recurrent layers make up for channels that are gone: those of their inputs, and units of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbyl
from lbyl.runtime.forward import ConsumerCall, run_intercepted
from lbyl.runtime.inputs import ExampleInputs


class Layers(nn.Module):
    """A linear layer, recurrent layers, and a linear layer. Half of all channels and units are copies of the others."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.LazyLinear(4)
        self.layers = getattr(nn, kind)(12, 8, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(torch.tanh(self.first(x)))[0])


class Cell(nn.Module):
    """The same with a cell, over the second axis."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.units = 8
        self.first, self.last = nn.Linear(6, 12), nn.Linear(8, 4)
        self.cell = getattr(nn, kind)(12, 8, **options)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = x.new_zeros(len(x), self.units)
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in range(x.shape[1]):
            state = self.cell(torch.tanh(self.first(x[:, step])), state)
        return self.last(state[0] if isinstance(state, tuple) else state)


NETS = {
    "LSTM": lambda: Layers("LSTM"),
    "LSTM, batch first": lambda: Layers("LSTM", batch_first=True),
    "LSTM, both directions": lambda: Layers("LSTM", bidirectional=True, batch_first=True),
    "LSTM, three layers": lambda: Layers("LSTM", num_layers=3),
    "GRU, two layers, both directions": lambda: Layers("GRU", num_layers=2, bidirectional=True, batch_first=True),
    "LSTM, without biases": lambda: Layers("LSTM", bias=False),
    "GRU": lambda: Layers("GRU", batch_first=True),
    "GRU, both directions": lambda: Layers("GRU", bidirectional=True),
    "RNN": lambda: Layers("RNN", batch_first=True),
    "RNN with ReLU": lambda: Layers("RNN", nonlinearity="relu"),
    "LSTMCell": lambda: Cell("LSTMCell"),
    "GRUCell": lambda: Cell("GRUCell", bias=False),
    "RNNCell": lambda: Cell("RNNCell"),
}


def doubled(net: nn.Module, x: Tensor) -> nn.Module:
    """The network with copies of the first half of the channels and units as the second half."""
    with torch.no_grad():
        net(x)
        for name, parameter in net.named_parameters():
            if name.startswith("last") or parameter.shape[0] % 4:
                continue
            gates = parameter.shape[0] // (12 if name.startswith("first") else 8)
            rows = parameter.reshape(gates, -1, *parameter.shape[1:])
            rows[:, rows.shape[1] // 2 :] = rows[:, : rows.shape[1] // 2].clone()
    return net.eval()


@pytest.mark.parametrize("name", NETS)
def test_copies_leave_all_that_they_did(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 7, 6)
    net = doubled(NETS[name](), x)
    settings: dict[str, Any] = {"ratio": 0.5, "criterion": _FirstStay(), "forecast": False}
    pruned = lbyl.compress(net, x[:2], restore="prune", **settings)
    restore = lbyl.LeastSquares(lbyl.Data([x[:48], x[48:]]), ridge=1e-9)
    restored = lbyl.compress(net, x[:2], restore=restore, **settings)
    assert restored.report.parameters[1] < 0.6 * restored.report.parameters[0]
    with torch.no_grad():
        torch.testing.assert_close(restored.model(x), net(x), rtol=1e-4, atol=1e-4)
        assert float((pruned.model(x) - net(x)).abs().max()) > 1e-2


class _FirstStay:
    """A criterion by which the last channels go."""

    def score(self, filters: Any, generator: torch.Generator) -> Tensor:
        return -torch.arange(len(filters), dtype=torch.float64)


@pytest.mark.parametrize("name", NETS)
def test_every_product_that_is_reported_is_computed_from_what_is_reported(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6)
    net = NETS[name]()
    net(x)
    state, calls = dict(net.named_parameters()), list[ConsumerCall]()
    with torch.no_grad():
        run_intercepted(net.eval(), ExampleInputs.of(x), on_consumer=calls.append)
    own = [call for call in calls if ".weight_" in call.weight]
    directions = 2 if "both" in name else 1
    layers = 3 if "three" in name else 2 if "two" in name else 1
    assert len(own) == (2 * x.shape[1] if "Cell" in name else 2 * directions * layers)
    for call in own:
        bias = state.get(call.weight.replace("weight", "bias"))
        torch.testing.assert_close(call.out, nn.functional.linear(call.x, state[call.weight], bias))


def test_states_are_those_before_each_step() -> None:
    torch.manual_seed(0)
    net = nn.RNN(3, 4, batch_first=True, bidirectional=True).eval()
    x, calls = torch.randn(2, 5, 3), dict[str, ConsumerCall]()
    with torch.no_grad():
        run_intercepted(net, ExampleInputs.of(x), on_consumer=lambda call: calls.update({call.weight: call}))
        sums = [calls[f"weight_ih_l0{end}"].out + calls[f"weight_hh_l0{end}"].out for end in ("", "_reverse")]
        torch.testing.assert_close(torch.tanh(torch.cat(sums, -1)), net(x)[0])


class ConvLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = 16
        self.gates, self.last = nn.Conv2d(3 + 16, 64, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], self.hidden, *x.shape[3:])
        c = torch.zeros_like(h)
        for frame in x.unbind(1):
            i, f, o, g = self.gates(torch.cat([frame, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.last(h)


class StateSpace(nn.Module):
    """A selective state space as in Mamba: all channels meet all entries of what is written and read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.states = 32, 4
        self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 3)
        self.write_and_read, self.rate = nn.Linear(32, 8), nn.Linear(32, 32)
        self.decay = nn.Parameter(torch.rand(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        u = nn.functional.silu(self.first(x))
        write, read = self.write_and_read(u).chunk(2, -1)
        rate, h = nn.functional.softplus(self.rate(u)), torch.zeros(len(x), self.inner, self.states)
        made = []
        for t in range(x.shape[1]):
            new = (rate * u)[:, t, :, None] * write[:, t, None]
            h = torch.exp(-rate[:, t, :, None] * self.decay) * h + new
            made.append((h * read[:, t, None]).sum(-1))
        return self.last(torch.stack(made, 1))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = 24
        self.first, self.again, self.last = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.hidden)
        for step in x.unbind(1):
            h = torch.tanh(self.first(step) + self.again(h))
        return self.last(h)


@pytest.mark.parametrize("kind", [ConvLSTM, StateSpace, Gated])
def test_states_that_start_as_zeros_of_a_known_width_are_cut(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = kind().eval()
    x = torch.randn(2, 3, 3, 8, 8) if kind is ConvLSTM else torch.randn(2, 5, 6)
    result = lbyl.compress(net, x, ratio=0.5, scope="all", restore="prune", forecast=False)
    width = "inner" if kind is StateSpace else "hidden"
    assert getattr(result.model, width) == getattr(net, width) // 2
    assert result.report.parameters[1] < 0.6 * result.report.parameters[0]
    assert result.model(x[:1]).shape == net(x[:1]).shape
    assert result.model(x.repeat(3, 2, *[1] * (x.dim() - 2))).shape == net(x.repeat(3, 2, *[1] * (x.dim() - 2))).shape


class ConvCell(nn.Module):
    def __init__(self, channels: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.gates = nn.Conv2d(channels + hidden_dim, 4 * hidden_dim, 3, padding=1)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, o, g = torch.split(self.gates(torch.cat([x, h], 1)), self.hidden_dim, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def start(self, rows: int, size: tuple[int, ...]) -> list[Tensor]:
        return [torch.zeros(rows, self.hidden_dim, *size, device=self.gates.weight.device) for _ in range(2)]


class StartsItsCells(nn.Module):
    """The network calls a method of its cells that makes their states."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.cells = nn.ModuleList(ConvCell(c, width) for c, width in zip((3, *widths), widths, strict=False))
        self.last = nn.Conv2d(widths[-1], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        states = [cell.start(len(x), tuple(x.shape[3:])) for cell in self.cells]  # pyright: ignore
        h = x[:, 0]
        for frame in x.unbind(1):
            h = frame
            for place, cell in enumerate(self.cells):
                states[place] = list(cell(h, *states[place]))
                h = states[place][0]
        return self.last(h)


@pytest.mark.parametrize("widths", [(16, 16), (16, 24), (8, 8)])  # the images are 8 by 8
def test_states_that_a_part_starts_for_its_caller_are_cut(widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net, x = StartsItsCells(widths).eval(), torch.randn(2, 3, 3, 8, 8)
    result = lbyl.compress(net, x, ratio=0.5, restore="prune", forecast=False, strict=True)
    assert [cell.hidden_dim for cell in result.model.cells] == [width // 2 for width in widths]
    assert [name for name, _ in result.report.left] == ["last"]
    assert result.model(torch.randn(1, 4, 3, 6, 10)).shape == (1, 2, 6, 10)


class WideAs(nn.Module):
    """A state as wide as something that the code asks for its width."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.first, self.again, self.last = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = {
            "layer": lambda: torch.zeros(len(x), self.again.out_features),
            "weight": lambda: x.new_zeros(len(x), self.again.weight.shape[0]),
            "value": lambda: x.new_zeros(len(x), self.first(x[:, 0]).shape[-1]),
        }[self.what]()
        for step in x.unbind(1):
            h = torch.tanh(self.first(step) + self.again(h))
        return self.last(h)


@pytest.mark.parametrize("what", ["layer", "weight", "value"])
def test_states_as_wide_as_something_else_are_cut(what: str) -> None:
    torch.manual_seed(0)
    net, x = WideAs(what).eval(), torch.randn(2, 5, 6)
    result = lbyl.compress(net, x, ratio=0.5, scope="all", restore="prune", forecast=False, strict=True)
    assert result.model.again.weight.shape == (12, 12)
    assert result.model(x.repeat(2, 2, 1)).shape == (4, 3)


def test_a_width_that_a_part_spells_out_in_another_method_is_cut() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h, self.d = 4, 8
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

        def attend(self, x: Tensor) -> Tensor:
            rows, steps, _ = x.shape
            q, k, v = self.qkv(x).view(rows, steps, 3, self.h, self.d).permute(2, 0, 3, 1, 4)
            mixed = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)
            return self.out(mixed.reshape(rows, steps, self.h * self.d))

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.part, self.last = nn.Linear(6, 32), Part(), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x + self.part.attend(x))

    torch.manual_seed(0)
    net, x = Calls().eval(), torch.randn(2, 5, 6)
    model = lbyl.compress(net, x, ratio=0.5, scope="all", restore="prune", forecast=False, strict=True).model
    assert (model.part.h, model.part.d, model.first.out_features) == (2, 8, 16)
    assert model(x[:1]).shape == (1, 5, 3)


def test_the_last_step_forward_and_the_first_backward_are_cut() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = 16
            self.lstm, self.last = nn.LSTM(5, 16, batch_first=True, bidirectional=True), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.lstm(x)[0]
            return self.last(torch.cat([y[:, -1, : self.hidden], y[:, 0, self.hidden :]], -1))

    torch.manual_seed(0)
    model = lbyl.compress(Ends().eval(), torch.randn(2, 6, 5), ratio=0.5, restore="prune", forecast=False).model
    assert (model.hidden, model.lstm.hidden_size, model.last.in_features) == (8, 8, 16)
    assert model(torch.randn(3, 9, 5)).shape == (3, 3)


def test_a_mask_as_long_as_a_number_of_heads_has_no_channels() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.qkv, self.last = 4, nn.Linear(16, 48), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            rows, steps, _ = x.shape
            mask = torch.zeros(steps, steps).masked_fill(torch.ones(steps, steps).triu(1) > 0, -1e9)
            q, k, v = self.qkv(x).reshape(rows, steps, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            seen = ((q @ k.mT) / 2 + mask).softmax(-1) @ v
            return self.last(seen.transpose(1, 2).reshape(rows, steps, -1))

    torch.manual_seed(0)
    net = Masked().eval()
    smaller = lbyl.compress(net, torch.randn(2, 4, 16), ratio=0.5, restore="prune", forecast=False).model
    assert smaller.heads == 2
    assert smaller(torch.randn(3, 7, 16)).shape == (3, 7, 3)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell])
def test_a_state_as_wide_as_its_input_is_cut_by_itself(kind: Any) -> None:
    class AsWide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 3)
            self.layer = kind(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            seen = self.layer(self.norm(self.first(x)))[0]
            return self.last(seen)

    torch.manual_seed(0)
    net, x = AsWide().eval(), torch.randn(5, 6)
    result = lbyl.compress(net, x, ratio=0.25, restore="prune", forecast=False)
    assert (result.model.layer.input_size, result.model.layer.hidden_size) == (12, 9)
    assert [name for name, _ in result.report.left] == ["first", "last"]
    assert result.model(x[:3]).shape == (3, 3)
