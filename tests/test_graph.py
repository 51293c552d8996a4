"""The channel graph: what belongs together, who reads it, what can't be cut and why."""

from __future__ import annotations

import pytest
import torch
from nets import Depthwise, HardCoded, Residual, compress, flat_convnet, images, mlp, residual, settle
from torch import Tensor, nn
from torch.nn import functional as F

import lbyl
from lbyl.graph import Graph, Group, Norm, Slot


def graph_of(model: nn.Module, inputs: object) -> Graph:
    return lbyl.inspect(model, inputs).graph


def names(slots: tuple[Slot, ...]) -> list[tuple[str, int]]:
    return [(slot.parameter, slot.dim) for slot in slots]


def consumer(group: Group, parameter: str) -> Slot:
    (slot,) = [slot for slot in group.consumers if slot.parameter == parameter]
    return slot


def test_an_mlp_has_a_group_for_every_linear_layer() -> None:
    graph = graph_of(mlp(6, 10, 8, classes=3), images(2, 6))
    assert [(g.name, g.width, g.layers) for g in graph.groups] == [
        ("0", 10, ("0",)),
        ("2", 8, ("2",)),
        ("4", 3, ("4",)),
    ]
    first = graph.group("0")
    assert names(first.carriers) == [("0.weight", 0), ("0.bias", 0)]
    assert names(first.consumers) == [("2.weight", 1)]
    assert consumer(first, "2.weight").channels == tuple(range(10))
    assert first.prunable
    assert not first.coupled
    assert graph.barriers == ()


def test_flatten_multiplies_the_index_map() -> None:
    group = graph_of(flat_convnet(), images(2, 3, 4, 4)).group("0")
    assert consumer(group, "5.weight").channels == tuple(channel for channel in range(8) for _ in range(4))
    assert ("1.running_mean", 0) in names(group.carriers)
    (producer,) = group.producers
    (norm,) = producer.stages
    assert isinstance(norm, Norm)
    assert (norm.layer, norm.eps) == ("1", 1e-5)


def test_flatten_of_channels_last_interleaves_the_index_map() -> None:
    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).relu().permute(0, 2, 3, 1).flatten(1))

    group = graph_of(settle(ChannelsLast()), images(2, 3, 2, 2)).group("conv")
    assert consumer(group, "fc.weight").channels == tuple(range(4)) * 4


def test_a_residual_sum_couples_the_stream_but_not_the_inside_of_a_block() -> None:
    graph = graph_of(residual(), images(2, 3, 8, 8))
    stream = graph.group("stem.0")
    assert stream.layers == ("stem.0", "a.conv2")
    assert stream.coupled
    assert names(stream.consumers) == [("a.conv1.weight", 1), ("b.conv1.weight", 1), ("b.shortcut.0.weight", 1)]
    assert graph.group("b.conv2").layers == ("b.conv2", "b.shortcut.0")
    assert graph.group("b.conv2").coupled
    for inner in ("a.conv1", "b.conv1"):
        assert graph.group(inner).layers == (inner,)
        assert not graph.group(inner).coupled
    assert all(group.prunable for group in graph.groups if group.name != "fc")


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.bn, self.read, self.fc = nn.BatchNorm2d(10), nn.Conv2d(10, 3, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(torch.cat([self.a(x), self.b(x)], 1)))
        return self.fc(F.relu(self.read(y)).mean((2, 3)))


def test_concatenated_branches_stay_apart_and_share_the_batch_norm() -> None:
    graph = graph_of(settle(Branches()), images(2, 3, 5, 5))
    a, b = graph.group("a"), graph.group("b")
    assert (a.width, b.width) == (4, 6)
    assert consumer(a, "read.weight").channels == (0, 1, 2, 3, -1, -1, -1, -1, -1, -1)
    assert consumer(b, "read.weight").channels == (-1, -1, -1, -1, 0, 1, 2, 3, 4, 5)
    for group in (a, b):
        assert ("bn.running_var", 0) in names(group.carriers)
        assert not group.coupled


def test_depthwise_layers_carry_channels_through() -> None:
    group = graph_of(settle(Depthwise(6)), images(2, 3, 6, 6)).group("expand")
    assert {("depthwise.weight", 0), ("bn1.weight", 0), ("bn0.weight", 0)} <= set(names(group.carriers))
    assert names(group.consumers) == [("project.weight", 1)]


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.after = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.relu(self.grouped(F.relu(self.before(x)))))


def test_grouped_convolutions_label_their_blocks() -> None:
    graph = graph_of(settle(Grouped()), images(2, 3, 5, 5))
    assert graph.group("before").blocks == (0,) * 4 + (1,) * 4
    assert graph.group("grouped").blocks == (0,) * 6 + (1,) * 6
    assert consumer(graph.group("before"), "grouped.weight").blocks == 2


class TwoGroupings(nn.Module):
    """One layer's channels are read in two groups and in three."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.two = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, groups=2)
        self.three, self.last = nn.Conv2d(24, 24, 3, groups=3), nn.Conv2d(48, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(F.relu(torch.cat([self.two(x), self.three(x)], 1)))


def test_blocks_of_different_sizes_are_cut_in_smaller_ones_of_equal_size() -> None:
    net, x = settle(TwoGroupings()), images(2, 3, 8, 8)
    group = graph_of(net, x).group("first")
    assert group.prunable
    assert group.blocks == tuple(channel // 4 for channel in range(24))
    result = lbyl.compress(net, x, ratio={"first": 0.25}, restore="prune", forecast=False)
    assert result.model.first.out_channels == 18
    assert result.report.verified is not None
    assert result.report.verified < 1e-6


def test_channels_that_meet_the_padding_of_a_shortcut_belong_to_no_group() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 8, 1)
            self.fc = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            y = self.out(F.relu(self.inner(x))) + F.pad(x, (0, 0, 0, 0, 2, 2))
            return self.fc(y.mean((2, 3)))

    graph = graph_of(settle(Padded()), images(2, 3, 4, 4))
    assert graph.group("inner").prunable
    stem = graph.group("stem")
    assert stem.prunable
    assert stem.coupled
    assert stem.width == 4
    columns = {slot.parameter: slot.channels for slot in (*stem.carriers, *stem.consumers)}
    assert columns["out.weight"] == columns["fc.weight"] == (-1, -1, 0, 1, 2, 3, -1, -1)
    assert not graph.barriers


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.head(F.relu(self.twice(F.relu(self.twice(x)))))


def test_a_layer_that_runs_twice_reads_its_own_channels() -> None:
    graph = graph_of(settle(Reused()), images(2, 6))
    group = graph.group("first")
    assert group.layers == ("first", "twice")
    assert names(group.consumers) == [("twice.weight", 1), ("head.weight", 1)]
    assert next(r for r in graph.consumers if r.layer == "twice").calls == 2


class Gated(nn.Module):
    """Squeeze and excitation, then a gate of a single channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.gate, self.head = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(x * torch.sigmoid(self.gate(x)))


def test_a_gate_goes_with_what_it_gates_and_a_broadcast_one_is_pinned() -> None:
    graph = graph_of(settle(Gated()), images(2, 3, 6, 6))
    gated = graph.group("conv")
    assert gated.layers == ("conv", "excite")
    assert not gated.coupled  # a product is no sum
    assert names(gated.consumers) == [("squeeze.weight", 1), ("gate.weight", 1), ("head.weight", 1)]
    assert "broadcast" in str(graph.group("gate").reason)
    assert graph.group("squeeze").prunable


def test_halves_that_are_added_are_one_group_with_two_rows_a_channel() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.read, self.head = nn.Linear(6, 8), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.both(x).chunk(2, -1)
            return self.head(F.relu(self.read(F.relu(left + right))))

    group = graph_of(settle(Halves()), images(2, 6)).group("both")
    assert group.width == 4
    assert not group.coupled  # a layer's own channels are no residual stream
    assert group.producers[0].weight.channels == (0, 1, 2, 3, 0, 1, 2, 3)


def test_an_unknown_operation_is_a_barrier_named_in_the_reason() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.b(torch.cumsum(self.a(x), -1))))

    graph = graph_of(settle(Unknown()), images(2, 6))
    assert "cumsum" in str(graph.group("a").reason)
    assert any("cumsum" in barrier for barrier in graph.barriers)
    assert graph.group("b").prunable


@pytest.mark.parametrize(
    ("model", "inputs", "head"),
    [
        (mlp(6, 10), images(2, 6), "2"),
        (
            nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            images(2, 3, 6, 6),
            "2",
        ),
    ],
    ids=["linear", "conv"],
)
def test_classes_are_never_prunable(model: nn.Module, inputs: Tensor, head: str) -> None:
    group = graph_of(model.eval(), inputs).group(head)
    assert not group.prunable
    assert "output" in str(group.reason)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(F.relu(self.left(left) + self.right(right)))}


def test_tuple_and_dict_inputs_give_the_same_graph() -> None:
    model, left, right = settle(TwoInputs()), images(2, 4), images(2, 5)
    positional = graph_of(model, (left, right))
    assert positional.group("left").layers == ("left", "right")
    assert positional == graph_of(model, {"left": left, "right": right})
    result = compress(model, {"left": left, "right": right}, scope="all")
    assert result.model(left, right)["logits"].shape == (2, 2)
    assert result.model.left.out_features == result.model.right.out_features == 3


def test_one_dimensional_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 6, 3),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Conv1d(6, 4, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(2),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    graph = graph_of(settle(model), images(2, 3, 6))
    assert names(graph.group("0").consumers) == [("3.weight", 1)]
    assert consumer(graph.group("3"), "7.weight").channels == (0, 0, 1, 1, 2, 2, 3, 3)


def test_inspecting_leaves_mode_and_buffers_alone() -> None:
    model = Residual()
    model.a.eval()  # a frozen part of a model in training
    model.train(True)
    model.a.bn1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lbyl.inspect(model, images(4, 3, 8, 8))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert modes[""]
    assert not modes["a.bn1"]


def test_untraceable_models_are_one_clear_error() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[x.sum(1) > -100])

    with pytest.raises(lbyl.TraceError, match=r"Choosing.*depends on|can't trace Choosing"):
        lbyl.inspect(Choosing(), images(2, 6))


def test_inputs_that_the_model_can_not_run_on_are_one_clear_error() -> None:
    with pytest.raises(lbyl.TraceError, match="runs on the example inputs"):
        lbyl.inspect(mlp(6), images(2, 7))
    with pytest.raises(lbyl.InputError, match="tensor"):
        lbyl.inspect(mlp(6), "image")  # pyright: ignore[reportArgumentType]


def test_a_width_known_by_heart_does_not_show_in_the_graph() -> None:
    """Why verification is needed at all: the trace can't see such a condition."""
    assert graph_of(settle(HardCoded()), images(2, 6)).group("second").prunable
