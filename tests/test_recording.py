"""Watching one run tells what `torch.export` tells; where it can't, `torch.export` is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nets import flat_convnet, images, mlp, residual, settle
from torch import Tensor, nn

import lbyl
from lbyl.graph.exported import export
from lbyl.graph.recording import Unseen, record
from lbyl.graph.trace import graph_of, trace
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.macs import count_macs


class Tied(nn.Module):
    """Uses a weight twice, under two names, and keeps a mask that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("mask", torch.ones(8), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * self.mask
        return self.head(x + self.down(self.up(x).relu_()))


class Attending(nn.Module):
    """Torch's own attention, which has a fast path that would hide its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


class Deciding(nn.Module):
    """Whether a number is seen by Python, and whether it depends on the input."""

    def __init__(self, on_input: bool) -> None:
        super().__init__()
        self.layers, self.on_input = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), on_input

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.linspace(0, 1, 3)
        size = x.sum() if self.on_input else steps.sum()
        return self.layers(x) * (2.0 if bool(size > 0) else 1.0)


class Masked(nn.Module):
    """How many rows come out depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x[x[:, 0] > 0])


class Counted(Masked):
    """The same by way of an operation that is made of others."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x[torch.where(x[:, 0] > 0)[0]])


class Behind(nn.Module):
    """Takes a weight past everything that watches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.from_numpy(self.layer.weight.detach().numpy()).T


MODELS = {
    "perceptron": (mlp, lambda: images(2, 6)),
    "convolutions": (flat_convnet, lambda: images(2, 3, 4, 4)),
    "residual": (residual, lambda: images(2, 3, 6, 6)),
    "tied": (Tied, lambda: torch.tensor([[1, 5, 3]])),
    "attention": (Attending, lambda: images(2, 5, 8)),
    "recurrent": (lambda: nn.LSTM(4, 6, batch_first=True), lambda: images(2, 3, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_recording_tells_what_an_export_tells(name: str) -> None:
    build, make = MODELS[name]
    model, inputs = build().eval(), ExampleInputs.of(make())
    recorded = graph_of(model, record(model, inputs))
    assert replace(recorded, macs=None) == graph_of(model, export(model, inputs))
    assert recorded.macs == count_macs(model, inputs)


class ConsumerMoments(nn.Module):
    """Chokes on zeros where a layer should have answered, which is nothing that Python sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return self.head(torch.linalg.cholesky(y.T @ y + 1e-3 * torch.eye(6)) @ y.T @ torch.linalg.inv(y @ y.T) @ y)


def test_a_model_that_can_not_do_with_zeros_is_computed() -> None:
    model, inputs = ConsumerMoments().eval(), ExampleInputs.of(images(3, 4))
    assert record(model, inputs).macs == count_macs(model, inputs)


@pytest.mark.parametrize(
    "model", [Deciding(True), Masked(), Counted(), Behind()], ids=lambda model: type(model).__name__
)
def test_what_one_run_can_not_vouch_for_is_not_recorded(model: nn.Module) -> None:
    with pytest.raises(Unseen):
        record(model.eval(), ExampleInputs.of(images(3, 4)))


def test_a_branch_on_constants_is_the_same_in_all_runs() -> None:
    graph = trace(Deciding(on_input=False).eval(), ExampleInputs.of(images(3, 4)))
    assert graph.group("layers.0").prunable


class Checking(Deciding):
    """Looks at its input, except for tools that ask it not to."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if torch.compiler.is_compiling() else super().forward(x)


def test_what_is_not_recorded_is_left_to_export() -> None:
    model, inputs = Checking(on_input=True).eval(), ExampleInputs.of(images(3, 4))
    with pytest.raises(Unseen):
        record(model, inputs)
    assert trace(model, inputs) == graph_of(model, export(model, inputs))


def test_sizes_that_depend_on_data_are_an_error() -> None:
    with pytest.raises(lbyl.TraceError, match="depend"):
        trace(Masked().eval(), ExampleInputs.of(images(3, 4)))


def test_recording_leaves_nothing_behind() -> None:
    model = settle(flat_convnet())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = images(2, 3, 4, 4)
    kept = x.clone()
    record(model, ExampleInputs.of(x))
    assert torch.equal(x, kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
