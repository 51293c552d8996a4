"""ONNX files in, and the same files out, smaller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import attention, convnet, model, node, real, run, save
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.io.onnx.write import write_onnx
from lbyl.runtime.inputs import ExampleInputs


def names(graph: onnx.GraphProto) -> list[str]:
    return [item.name for item in graph.node]


def test_same_file_smaller(tmp_path: Path) -> None:
    file = save(convnet(), tmp_path / "net.onnx")
    network = lbyl.load_source(str(file))
    x = torch.randn(2, 3, 16, 16)
    result = lbyl.compress(network, x, ratio=0.25, restore="prune", forecast=False)
    assert {row.before for row in result.report.rows} == {12, 16}
    folder = result.save(tmp_path / "smaller")
    before, after = onnx.load(file), onnx.load(folder / "model.onnx")
    onnx.checker.check_model(after, full_check=True)
    assert names(after.graph) == names(before.graph)
    assert [item.name for item in after.graph.initializer] == [item.name for item in before.graph.initializer]
    for part in ("input", "output"):
        assert list(getattr(after.graph, part)) == list(getattr(before.graph, part))
    assert after.opset_import == before.opset_import
    assert list(after.metadata_props) == list(before.metadata_props)
    assert (after.producer_name, after.ir_version) == (before.producer_name, before.ir_version)
    with torch.no_grad():
        expected = result.model(x)
    np.testing.assert_allclose(run(folder / "model.onnx", x.numpy())[0], expected, rtol=1e-4, atol=1e-6)
    other = torch.randn(5, 3, 16, 16)  # the batch size is still open
    with torch.no_grad():
        found = run(folder / "model.onnx", other.numpy())[0]
        np.testing.assert_allclose(found, result.model(other), rtol=1e-4, atol=1e-6)
    assert (folder / "model.onnx").stat().st_size < file.stat().st_size
    assert any("onnxruntime" in note for note in json.loads((folder / "report.json").read_text())["report"]["notes"])


def test_a_budget_keeps_whole_vectors_of_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 96, 3), torch.nn.ReLU(), torch.nn.Conv2d(96, 80, 3), torch.nn.ReLU()]
    net, x = torch.nn.Sequential(*layers, torch.nn.Conv2d(80, 4, 1)).eval(), torch.randn(1, 3, 12, 12)
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=False, opset_version=17)
    network = lbyl.load_source(str(tmp_path / "net.onnx"))

    def widths(**settings: Any) -> list[int]:
        budget = lbyl.Budget(macs=0.66, **settings)
        result = lbyl.compress(network, x, budget=budget, restore="prune", forecast=False)
        return [row.after for row in result.report.rows]

    assert widths() == widths(round_to="auto")
    assert any(width % 4 for width in widths(round_to=1))  # four is the narrowest vector
    assert not any(width % 4 for width in widths())


class Reader(torch.nn.Module):
    """A reader of lines of text: convolutions, a recurrent layer over the columns, and classes for each."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.Conv2d(16, 12, 3, 2, 1)
        self.over = getattr(torch.nn, operator)(12, 8, bidirectional=True)
        self.out = torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        columns = self.b(self.a(x).relu()).relu().mean(2)
        return self.out(self.over(columns.permute(2, 0, 1))[0])


@pytest.mark.parametrize("open_sizes", [False, True])
@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_and_those_around_are_cut(operator: str, open_sizes: bool, tmp_path: Path) -> None:
    """As in PyTorch: what the layer reads and its units, for which its first states of zeros must not be too wide."""
    torch.manual_seed(0)
    net, x = Reader(operator).eval(), torch.randn(2, 3, 16, 32)
    axes = {"x": {0: "batch", 3: "width"}} if open_sizes else None
    names: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": axes}
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=False, opset_version=17, **names)
    network = lbyl.load_source(str(tmp_path / "net.onnx"))
    result = lbyl.compress(network, x, ratio=0.5, restore="prune", forecast=False)
    assert [(row.before, row.after) for row in result.report.rows] == [(16, 8), (12, 6), (8, 4)]
    file = result.save(tmp_path / "smaller") / "model.onnx"
    assert not unused(file)
    for given in (x, torch.randn(3, 3, 16, 48)) if open_sizes else (x,):
        with torch.no_grad():
            np.testing.assert_allclose(run(file, given.numpy())[0], result.model(given), rtol=1e-4, atol=1e-5)
            again = lbyl.load_source(str(file))(given)
            np.testing.assert_allclose(again, result.model(given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"linear_before_reset": 1}])
def test_sequences_over_all_steps(settings: dict[str, int], tmp_path: Path) -> None:
    """As exporters of Keras write it: each sequence's length is the number of steps, taken from the shape."""
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "t"),
        node("Gather", "s one", "n"),
        node("Cast", "t", "i", to=TensorProto.INT32),
        node("Expand", "i n", "lengths"),
        node("GRU", "x w r _ lengths", "y", hidden_size=4, **settings),
    ]
    stored = {"w": real(0, 1, 12, 3), "r": real(1, 1, 12, 4), "zero": np.array([0]), "one": np.array([1])}
    made = model(nodes, stored, {"x": ("t", "n", 3)}, {"y": ("t", 1, "n", 4)})
    file, x = save(made, tmp_path / "net.onnx"), real(2, 5, 2, 3)
    np.testing.assert_allclose(run(file, x)[0], lbyl.load_source(str(file))(torch.from_numpy(x)).detach(), atol=1e-5)
    made = recurrent(operands="x w r _ n")
    made.graph.initializer[-1].CopyFrom(numpy_helper.from_array(np.array([4, 4], np.int32), "n"))
    with pytest.raises(lbyl.InputError, match=r"lengths .4., and 5 steps"):
        lbyl.load_source(str(save(made, file)))(torch.from_numpy(x))


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("states", ["none", "zeros", "numbers", "inputs"])
def test_units_that_have_first_states_stay(states: str, direction: str, tmp_path: Path) -> None:
    """Gates that nodes join, as Paddle writes them; and states, whose width is the units' unless all are zero."""
    count = 2 if direction == "bidirectional" else 1
    stored = {f"{name}{gate}": real(4 * gate + place, count, 4, size)
              for gate in range(4) for place, (name, size) in enumerate((("w", 12), ("r", 4)))}  # fmt: skip
    stored |= {"a": real(30, 12, 3, 1), "b": real(31, count, 32), "o": real(32, 4, 5)}
    if states in ("zeros", "numbers"):
        stored["s"] = real(33, count, 2, 4) * (states == "numbers")
    given = {"none": "", "inputs": "h h"}.get(states, "s s")
    nodes = [
        node("Conv", "x a", "c"),
        node("Relu", "c", "d"),
        node("Transpose", "d", "e", perm=[2, 0, 1]),
        *(node("Concat", " ".join(f"{name}{gate}" for gate in range(4)), name, axis=1) for name in "wr"),
        node("LSTM", f"e w r b _ {given}", "f", hidden_size=4, direction=direction),
        node("ReduceSum", "f axes", "g", keepdims=0),
        node("MatMul", "g o", "y"),
    ]
    inputs = {"x": ("n", 3, 7)} | ({"h": (count, 2, 4)} if states == "inputs" else {})
    made = model(nodes, {**stored, "axes": np.array([1])}, inputs, {"y": (7, "n", 5)})
    network = lbyl.load_source(str(save(made, tmp_path / "net.onnx")))
    x = (real(40, 2, 3, 7), real(41, count, 2, 4))[: len(inputs)]
    tensors = tuple(map(torch.from_numpy, x))
    result = lbyl.compress(network, tensors, ratio=0.5, restore="prune", forecast=False)
    widths = [(row.before, row.after) for row in result.report.rows if row.after < row.before]
    assert widths == [(12, 6), *([(4, 2)] if states in ("none", "zeros") else [])]
    file = result.save(tmp_path / "smaller") / "model.onnx"
    assert not unused(file)
    with torch.no_grad():
        np.testing.assert_allclose(run(file, *x)[0], result.model(*tensors), rtol=1e-4, atol=1e-5)


def recurrent(operator: str = "LSTM", operands: str = "x w r", **attributes: Any) -> onnx.ModelProto:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    stored = {"w": real(0, 1, 4 * gates, 3), "r": real(1, 1, 4 * gates, 4), "p": real(2, 1, 12)}
    lengths = {"n": np.array([5, 4], dtype=np.int32)}
    nodes = [node(operator, operands, "y", hidden_size=4, **attributes)]
    return model(nodes, {**stored, **lengths}, {"x": (5, 2, 3)}, {"y": (5, 1, 2, 4)})


class Windows(torch.nn.Module):
    """Pads images to a multiple of a window, as Swin does; in the file the padding is computed from the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        right, below = -x.shape[3] % 7, -x.shape[2] % 7
        return self.last(torch.nn.functional.pad(x, (0, right, 0, below))).mean((2, 3))


def test_padding_that_is_computed_from_the_shape(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x, file = Windows().eval(), torch.randn(2, 3, 16, 19), tmp_path / "net.onnx"
    sizes = {"x": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(
        net,
        (x,),
        file,
        dynamo=False,
        do_constant_folding=False,
        input_names=["x"],
        dynamic_axes=sizes,
        opset_version=13,
    )
    read = lbyl.load_source(str(file))
    for each in (x, torch.randn(1, 3, 25, 14)):
        torch.testing.assert_close(read(each), net(each), rtol=1e-5, atol=1e-5)
    ours, theirs = (
        lbyl.compress(each, x, ratio=0.25, criterion="l2", restore="prune", forecast=False) for each in (read, net)
    )
    assert [group.keep for group in ours.plan.groups] == [group.keep for group in theirs.plan.groups]
    saved = ours.save(tmp_path / "smaller") / "model.onnx"
    for each in (x, torch.randn(1, 3, 25, 14)):
        with torch.no_grad():
            np.testing.assert_allclose(run(saved, each.numpy())[0], theirs.model(each), rtol=1e-4, atol=1e-5)


def test_network_equals_its_file(tmp_path: Path) -> None:
    file = save(convnet(), tmp_path / "net.onnx")
    network = lbyl.load_source(str(file))
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        np.testing.assert_allclose(run(file, x.numpy())[0], network(x), rtol=1e-4, atol=1e-6)
    assert {"stem.weight", "depth.weight", "norm.weight"} <= set(dict(network.named_parameters()))
    assert isinstance(network.get_submodule("stem"), torch.nn.Conv2d)


def test_folder_is_loaded_and_compressed_again(tmp_path: Path) -> None:
    file = save(convnet(), tmp_path / "net.onnx")
    x = torch.randn(1, 3, 16, 16)
    result = lbyl.compress(lbyl.load_source(str(file)), x, ratio=0.25, restore="prune", forecast=False)
    folder = result.save(tmp_path / "smaller")
    loaded = lbyl.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), result.model(x))
    with pytest.raises(lbyl.InputError, match="already is the smaller network"):
        lbyl.export(folder)
    assert lbyl.export(folder, format="pt2").file.is_file()
    again = lbyl.compress(loaded, x, ratio=0.5, restore="prune", forecast=False).save(tmp_path / "again")
    assert (again / "model.onnx").stat().st_size < (folder / "model.onnx").stat().st_size
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-1])
    with pytest.raises(lbyl.ArtifactError, match="SHA-256"):
        lbyl.load(folder)


def test_heads_splits_and_slices_follow(tmp_path: Path) -> None:
    file = save(attention(), tmp_path / "net.onnx")
    network = lbyl.load_source(str(file))
    ids, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    with torch.no_grad():
        np.testing.assert_allclose(run(file, ids, mask)[0], network(ids, mask), rtol=1e-4, atol=1e-5)
    result = lbyl.compress(network, (ids, mask), ratio=0.5, restore="prune", forecast=False)
    widths = {row.group: (row.before, row.after) for row in result.report.rows}
    assert sorted(widths.values()) == [(4, 2), (4, 2), (16, 8)] or (16, 8) in widths.values()
    written = result.save(tmp_path / "smaller") / "model.onnx"
    with torch.no_grad():
        np.testing.assert_allclose(run(written, ids, mask)[0], result.model(ids, mask), rtol=1e-4, atol=1e-5)
        more = torch.randint(0, 50, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
        np.testing.assert_allclose(run(written, *more)[0], result.model(*more), rtol=1e-4, atol=1e-5)


def test_constant_for_several_views_is_split_where_they_differ(tmp_path: Path) -> None:
    """One shape constant stands at two views whose widths are cut differently."""
    stored = {
        "a.weight": real(0, 8, 3, 1, 1), "b.weight": real(1, 8, 3, 1, 1), "shape": np.array([0, 8, 256]),
        "c.weight": real(2, 5, 8, 1), "d.weight": real(3, 5, 8, 1),
    }  # fmt: skip
    nodes = [
        node("Conv", "x a.weight", "a"), node("Conv", "x b.weight", "b"),
        node("Relu", "a", "ar"), node("Relu", "b", "br"),
        node("Reshape", "ar shape", "av"), node("Reshape", "br shape", "bv"),
        node("Conv", "av c.weight", "c"), node("Conv", "bv d.weight", "d"), node("Add", "c d", "y"),
    ]  # fmt: skip
    file = save(model(nodes, stored, outputs={"y": ("batch", 5, 256)}), tmp_path / "net.onnx")
    x = torch.randn(2, 3, 16, 16)
    result = lbyl.compress(lbyl.load_source(str(file)), x, ratio={"a": 0.5, "b": 0.25}, restore="prune", forecast=False)
    written = result.save(tmp_path / "smaller") / "model.onnx"
    with torch.no_grad():
        np.testing.assert_allclose(run(written, x)[0], result.model(x), rtol=1e-4, atol=1e-5)
    assert [(row.before, row.after) for row in result.report.rows] == [(8, 4), (8, 6)]
    assert names(onnx.load(written).graph) == names(onnx.load(file).graph)


def test_weights_beside_the_file(tmp_path: Path) -> None:
    made, folder = convnet(), tmp_path / "original"
    folder.mkdir()
    onnx.save(made, folder / "net.onnx", save_as_external_data=True, location="net.weights", size_threshold=0)
    x = torch.randn(1, 3, 16, 16)
    result = lbyl.compress(lbyl.load_source(str(folder / "net.onnx")), x, ratio=0.25, restore="prune", forecast=False)
    smaller = result.save(tmp_path / "smaller")
    assert (smaller / "model.onnx.data").is_file()
    with torch.no_grad():
        np.testing.assert_allclose(run(smaller / "model.onnx", x)[0], result.model(x), rtol=1e-4, atol=1e-6)


def products(*shown: str) -> onnx.ModelProto:
    """Two matrix products; the weights in ``shown`` are also outputs."""
    nodes = [node("MatMul", "x w", "h"), node("Relu", "h", "r"), node("MatMul", "r v", "y")]
    outputs = {"y": [2, 5], **{name: [6, 32] for name in shown}}
    return model(nodes, {"w": real(0, 6, 32), "v": real(1, 32, 5)}, {"x": [2, 6]}, outputs)


def test_all_weights_beside_the_file_are_cut(tmp_path: Path) -> None:
    file, x = tmp_path / "net.onnx", torch.ones(2, 6)
    onnx.save(products(), file, save_as_external_data=True, location="net.weights", size_threshold=0)
    result = lbyl.compress(lbyl.load_source(str(file)), x, ratio=0.5, restore="prune", forecast=False)
    written = result.save(tmp_path / "out")
    assert (written / "model.onnx.data").stat().st_size >= 4 * 16 * 11
    assert (written / "model.onnx").stat().st_size < 4 * 16 * 11
    np.testing.assert_allclose(run(written / "model.onnx", x)[0], result.model(x).detach(), rtol=1e-4, atol=1e-6)


def test_a_weight_that_is_an_output_too_stays_there(tmp_path: Path) -> None:
    file, x = save(products("w"), tmp_path / "net.onnx"), torch.ones(2, 6)
    result = lbyl.compress(lbyl.load_source(str(file)), x, ratio=0.5, restore="prune", forecast=False)
    written = result.save(tmp_path / "out") / "model.onnx"
    before, after = run(file, x), run(written, x)
    assert [each.shape for each in before] == [each.shape for each in after] == [(2, 5), (6, 32)]
    assert np.array_equal(before[1], after[1])
    assert onnx.load(written).ByteSize() > 4 * 6 * 32


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(convnet(), tmp_path / "net.onnx")

    def call(*words: str) -> str:
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == 0, done.output
        return done.stdout

    call("compress", "net.onnx", "-o", "small", "--ratio", "0.25", "--restore", "prune", "--no-latency")
    assert "net.onnx" in call("show", "small")
    assert json.loads(call("bench", "small", "--runs", "3", "--json"))["against"] == "net.onnx"
    assert json.loads(call("inspect", "net.onnx", "--json"))["source"] == "net.onnx"
    call("sweep", "net.onnx", "-o", "several", "--budget", "macs=0.8,0.6", "--restore", "prune")
    assert len(list((tmp_path / "several").glob("*/model.onnx"))) == 2


def test_example_inputs_are_the_files_own(tmp_path: Path) -> None:
    network = lbyl.load_source(str(save(attention(), tmp_path / "net.onnx")))
    ids, mask = network.example_inputs()
    assert (ids.shape, ids.dtype) == ((1, 128), torch.int64)
    assert not ids.any()
    assert mask.all()
    assert [t.shape for t in network.example_inputs([(2, 5), (2, 5)])] == [(2, 5), (2, 5)]
    with pytest.raises(lbyl.InputError, match="takes 2 inputs"):
        network.example_inputs([(2, 5)])
    image = lbyl.load_source(str(save(convnet(), tmp_path / "image.onnx")))
    assert image.example_inputs()[0].shape == (1, 3, 16, 16)
    with pytest.raises(lbyl.InputError, match="can't be 1x4x16x16"):
        image.example_inputs([(1, 4, 16, 16)])


def test_scalars_need_no_shape(tmp_path: Path) -> None:
    """As with a network of speech that takes the sample rate: a command line can't write the shape of a scalar."""
    nodes = [
        node("Conv", "x w", "a"),
        node("Cast", "rate", "r", to=TensorProto.FLOAT),
        node("Add", "a r", "b"),
        node("Relu", "b", "c"),
        node("Conv", "c v", "y"),
    ]
    stored, inputs = {"w": real(0, 8, 3, 1), "v": real(1, 4, 8, 1)}, {"rate": (), "x": ("n", 3, "t")}
    made = model(nodes, stored, inputs, {"y": ("n", 4, "t")}, types={"rate": TensorProto.INT64})
    network = lbyl.load_source(str(save(made, tmp_path / "net.onnx")))
    for shapes in ([(2, 3, 9)], [(), (2, 3, 9)]):
        assert [tuple(t.shape) for t in network.example_inputs(shapes)] == [(), (2, 3, 9)]
    assert network.example_inputs([(2, 3, 9)], dtypes=[torch.float32])[1].dtype == torch.float32
    with pytest.raises(lbyl.InputError, match="'x': float32 nx3xt can't be int64"):
        network.example_inputs([(2, 3, 9)], dtypes=[torch.int64])
    with pytest.raises(lbyl.InputError, match=r"takes 2 inputs .*, but got 3"):
        network.example_inputs([(), (), (2, 3, 9)])
    given = network.example_inputs([(2, 3, 9)])
    file = lbyl.compress(network, given, ratio=0.5, restore="prune", forecast=False).save(tmp_path / "s") / "model.onnx"
    assert file.stat().st_size < (tmp_path / "net.onnx").stat().st_size


def lines(height: int) -> onnx.ModelProto:
    """Reads lines of text: after the pooling, images of another height would have more than one row."""
    nodes = [
        node("Conv", "x w", "a", strides=[height // 2, 4]),
        node("Squeeze", "a axes", "b"),
        node("Transpose", "b", "y", perm=[0, 2, 1]),
    ]
    stored = {"w": real(0, 6, 3, height, 4), "axes": np.array([2])}
    return model(nodes, stored, {"x": ("batch", 3, "h", "w")}, {"y": ("batch", "t", 6)})


def test_open_sizes_become_those_that_the_file_runs_on(tmp_path: Path) -> None:
    for height, shape in ((200, (1, 3, 224, 224)), (48, (1, 3, 48, 320)), (32, (1, 3, 32, 320))):
        network = lbyl.load_source(str(save(lines(height), tmp_path / f"{height}.onnx")))
        assert network.example_inputs()[0].shape == shape
    # Channels are found as well, and sizes of one name are equal.
    made = lines(32)
    made.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, list("nchw")))
    assert lbyl.load_source(str(save(made, tmp_path / "bare.onnx"))).example_inputs()[0].shape == (1, 3, 32, 320)
    nodes = [node("Unsqueeze", "x first", "s"), node("LSTM", "s w r _ _ h h", "y", hidden_size=4)]
    stored = {"w": real(0, 1, 16, 3), "r": real(1, 1, 16, 4), "first": np.array([0])}
    made = model(nodes, stored, {"h": (1, "n", 4), "x": ("n", 3)}, {"y": (1, 1, "n", 4)})
    network = lbyl.load_source(str(save(made, tmp_path / "states.onnx")))
    assert [tuple(t.shape) for t in network.example_inputs()] == [(1, 1, 4), (1, 3)]
    made = model([node("Add", "p x", "y")], {}, {"p": ("t",), "x": ("n", "t")}, {"y": ("n", "t")})
    network = lbyl.load_source(str(save(made, tmp_path / "positions.onnx")))
    assert [tuple(t.shape) for t in network.example_inputs()] == [(128,), (1, 128)]


def test_errors_of_a_node_name_it_and_the_sizes(tmp_path: Path) -> None:
    network = lbyl.load_source(str(save(lines(32), tmp_path / "net.onnx")))
    said = r"net.onnx: node 'make b' .Squeeze. does not run on 1x6x3x8: axes .2. are not all of size 1; .*--input"
    with pytest.raises(lbyl.InputError, match=said):
        network(torch.randn(1, 3, 64, 32))
    with pytest.raises(lbyl.InputError, match=r"node 'make a' .Conv. does not run on 1x3x31x32: .*--input"):
        network(torch.randn(1, 3, 31, 32))


def test_inputs_that_would_be_huge(tmp_path: Path) -> None:
    for width in (2**20, "width"):
        made = model([node("Relu", "x", "y")], {}, {"x": (1, 3, 2**30, width)}, {"y": (1, 3, 2**30, width)})
        network = lbyl.load_source(str(save(made, tmp_path / "net.onnx")))
        with pytest.raises(lbyl.InputError, match="too large"):
            network.example_inputs()


def test_sequences(tmp_path: Path) -> None:
    nodes = [
        node("SplitToSequence", "x sizes", "s", axis=1),
        node("SequenceAt", "s second", "a"),
        node("ConcatFromSequence", "s", "b", axis=1),
        node("Concat", "a b", "y", axis=1),
    ]
    stored = {"sizes": np.array([1, 2]), "second": np.array(1)}
    file = save(model(nodes, stored, outputs={"y": ("n", 5, 16, 16)}), tmp_path / "net.onnx")
    x = torch.randn(2, 3, 16, 16)
    np.testing.assert_array_equal(run(file, x)[0], lbyl.load_source(str(file))(x))


def test_layers_that_share_a_vector_stay_apart(tmp_path: Path) -> None:
    """Exporters make one constant of equal vectors, of layers that have nothing to do with each other."""
    stored = {
        "a.weight": real(0, 8, 3, 1, 1), "b.weight": real(1, 8, 8, 1, 1), "c.weight": real(2, 5, 8, 1, 1),
        "zeros": np.zeros(8, np.float32),
    }  # fmt: skip
    nodes = [
        node("Conv", "x a.weight zeros", "a"), node("Relu", "a", "ar"),
        node("Identity", "zeros", "others"), node("Conv", "ar b.weight others", "b"), node("Relu", "b", "br"),
        node("Conv", "br c.weight", "y"),
    ]  # fmt: skip
    file = save(model(nodes, stored, outputs={"y": ("n", 5, 16, 16)}), tmp_path / "net.onnx")
    x = torch.randn(2, 3, 16, 16)
    result = lbyl.compress(lbyl.load_source(str(file)), x, ratio={"a": 0.5, "b": 0.25}, restore="prune", forecast=False)
    assert [(row.before, row.after) for row in result.report.rows] == [(8, 4), (8, 6)]
    written = result.save(tmp_path / "smaller") / "model.onnx"
    with torch.no_grad():
        np.testing.assert_allclose(run(written, x)[0], result.model(x), rtol=1e-4, atol=1e-5)


def test_channels_last_images_are_images(tmp_path: Path) -> None:
    """An input with its channels last, which a Transpose turns, is shown photographs."""
    made = convnet()
    made.graph.node.insert(0, node("Transpose", "image", "x", perm=[0, 3, 1, 2]))
    made.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 32, 32, 3]))
    network = lbyl.load_source(str(save(made, tmp_path / "net.onnx")))
    inputs = network.example_inputs()
    result = lbyl.compress(
        network, inputs, ratio=0.25, restore=lbyl.LeastSquares(lbyl.Photographs(images=8)), forecast=False
    )
    assert not any("noise in place of photographs" in note for note in result.report.notes)


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("batch", [1, 2])
def test_first_states_are_for_the_batch_at_hand(operator: str, batch: int, tmp_path: Path) -> None:
    """A file with a fixed batch holds states for that one; PyTorch would read memory beyond them."""
    gates, states = {"LSTM": (4, "s s"), "GRU": (3, "s"), "RNN": (1, "s")}[operator]
    stored = {
        "w": real(0, 1, 4 * gates, 3), "r": real(1, 1, 4 * gates, 4), "b": real(2, 1, 8 * gates),
        "s": np.repeat(real(3, 1, 1, 4), batch, 1),
    }  # fmt: skip
    nodes = [node(operator, f"x w r b _ {states}", "y", hidden_size=4)]
    made = model(nodes, stored, {"x": (5, batch, 3)}, {"y": (5, 1, batch, 4)})
    file, x = save(made, tmp_path / "net.onnx"), real(4, 5, 3, batch, 3)
    with torch.no_grad():
        found = lbyl.load_source(str(file))(torch.from_numpy(x.reshape(5, 3 * batch, 3)))
    expected = np.concatenate([run(file, x[:, place])[0] for place in range(3)], 2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 1, 4), (1, 1, 5)])
def test_first_states_that_do_not_fit(shape: tuple[int, int, int], tmp_path: Path) -> None:
    stored = {"w": real(0, 1, 16, 3), "r": real(1, 1, 16, 4), "s": real(3, *shape)}
    nodes = [node("LSTM", "x w r _ _ s s", "y", hidden_size=4)]
    file = save(model(nodes, stored, {"x": (5, "n", 3)}, {"y": (5, 1, "n", 4)}), tmp_path / "net.onnx")
    told = "x".join(map(str, shape))
    with pytest.raises(lbyl.InputError, match=rf"'make y' .LSTM. has first states of {told}.* needs 1x3x4"):
        lbyl.load_source(str(file))(torch.randn(5, 3, 3))


def unused(file: Path) -> list[str]:
    """Initializers and nodes that nothing uses."""
    graph = onnx.load(file).graph
    used = {name for item in graph.node for name in item.input} | {item.name for item in graph.output}
    return [item.name for item in graph.initializer if item.name not in used] + [
        item.name for item in graph.node if not used & set(item.output)
    ]


def through(*nodes: onnx.NodeProto, **stored: np.ndarray) -> onnx.ModelProto:
    """Two products with weights "a" (6 x 32) and "b" (32 x 5), which other nodes make of what is stored."""
    layers = [node("MatMul", "x a", "h"), node("Relu", "h", "r"), node("MatMul", "r b", "y")]
    return model([*nodes, *layers], stored, {"x": ("n", 6)}, {"y": ("n", 5)})


def halved(dtype: Any = np.float16) -> onnx.ModelProto:
    nodes = [node("Cast", f"{name}_half", name, to=TensorProto.FLOAT) for name in "ab"]
    return through(*nodes, a_half=real(0, 6, 32).astype(dtype), b_half=real(1, 32, 5).astype(dtype))


def turned() -> onnx.ModelProto:
    nodes = [node("Transpose", "a_rows", "a"), node("Cast", "b_half", "b_rows", to=1), node("Transpose", "b_rows", "b")]
    return through(*nodes, a_rows=real(0, 32, 6), b_half=real(1, 5, 32).astype(np.float16))


def normed() -> onnx.ModelProto:
    nodes = [node("ReduceL2", "v", "n", axes=[0]), node("Div", "v n", "d"), node("Mul", "d g", "a")]
    return through(*nodes, v=real(0, 6, 32), g=1 + real(2, 1, 32), b=real(1, 32, 5))


def reshaped() -> onnx.ModelProto:
    made = through(
        node("Reshape", "a_flat a_shape", "a"), a_flat=real(0, 1, 6, 1, 32), a_shape=np.array([6, 32]), b=real(1, 32, 5)
    )
    # A row that is repeated for all inputs, and added to the hidden channels.
    made.graph.node.insert(1, node("Expand", "row sizes", "rows"))
    made.graph.node.insert(3, node("Add", "h rows", "s"))
    made.graph.node[4].input[0] = "s"
    stored = {"row": real(3, 32, 1).T.copy(), "sizes": np.array([40, 32])}
    made.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in stored.items())
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 40
    return made


def listed() -> onnx.ModelProto:
    """As old files do, it lists its weights among its inputs."""
    made = normed()
    for item in made.graph.initializer:
        made.graph.input.append(helper.make_tensor_value_info(item.name, item.data_type, item.dims))
    made.ir_version = 3
    made.opset_import[0].version = 8
    return made


@pytest.mark.parametrize("make", [halved, turned, normed, listed, reshaped])
def test_weights_that_other_nodes_make_get_smaller(make: Any, tmp_path: Path) -> None:
    file, x = save(make(), tmp_path / "net.onnx"), torch.from_numpy(real(5, 40, 6))
    result = lbyl.compress(lbyl.load_source(str(file)), x, ratio=0.5, restore="prune", forecast=False)
    assert [(row.before, row.after) for row in result.report.rows] == [(32, 16)]
    written = result.save(tmp_path / "smaller") / "model.onnx"
    onnx.checker.check_model(onnx.load(written), full_check=True)
    np.testing.assert_allclose(run(written, x)[0], result.model(x).detach(), rtol=1e-4, atol=1e-5)
    assert not unused(written)
    before, after = onnx.load(file).graph, onnx.load(written).graph
    floats = [sum(len(item.raw_data) for item in graph.initializer) for graph in (before, after)]
    assert floats[1] <= 0.6 * floats[0]
    if make not in (normed, listed):  # their weight is computed, so that it gets one of its own
        assert names(after) == names(before)
        assert [item.data_type for item in after.initializer] == [item.data_type for item in before.initializer]


def test_half_precision_stays_where_rounding_is_small(tmp_path: Path) -> None:
    import ml_dtypes

    torch.manual_seed(0)

    x = torch.from_numpy(real(5, 40, 6))
    for dtype, kept in ((np.float16, TensorProto.FLOAT16), (ml_dtypes.bfloat16, TensorProto.FLOAT)):
        network: Any = lbyl.load_source(str(save(halved(dtype), tmp_path / "net.onnx")))
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(torch.randn(weight.shape) / 100)
        write_onnx(network, tmp_path / "new.onnx", ExampleInputs.of(x))
        stored = onnx.load(tmp_path / "new.onnx").graph.initializer
        assert [item.data_type for item in stored] == [kept] * 2
        found, expected = run(tmp_path / "new.onnx", x)[0], network(x).detach().numpy()
        assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)


def test_a_table_that_is_also_turned_stays_one(tmp_path: Path) -> None:
    stored = {"table": real(0, 50, 12), "up": real(1, 12, 32), "down": real(2, 32, 12)}
    nodes = [
        node("Gather", "table ids", "e"), node("MatMul", "e up", "u"), node("Relu", "u", "r"),
        node("MatMul", "r down", "d"), node("Add", "e d", "s"), node("Transpose", "table", "t"),
        node("MatMul", "s t", "y"),
    ]  # fmt: skip
    made = model(nodes, stored, {"ids": ("n", 6)}, {"y": ("n", 6, 50)}, types={"ids": TensorProto.INT64})
    network = lbyl.load_source(str(save(made, tmp_path / "net.onnx")))
    assert sum(weight.numel() for weight in network.parameters()) == 50 * 12 + 2 * 12 * 32
    ids = torch.arange(12).reshape(2, 6)
    result = lbyl.compress(network, ids, ratio=0.5, scope="all", restore="prune", forecast=False)
    assert [(row.before, row.after) for row in result.report.rows] == [(12, 6), (32, 16)]
    written = result.save(tmp_path / "smaller") / "model.onnx"
    assert {item.name: tuple(item.dims) for item in onnx.load(written).graph.initializer} == {
        "table": (50, 6), "up": (6, 16), "down": (16, 6)
    }  # fmt: skip
    np.testing.assert_allclose(run(written, ids)[0], result.model(ids).detach(), rtol=1e-4, atol=1e-5)


def test_a_bias_that_layers_shared_does_not_stay_behind(tmp_path: Path) -> None:
    stored = {"a": real(0, 8, 3, 3, 3), "b": real(1, 8, 8, 3, 3), "c": real(2, 5, 8, 1, 1), "bias": real(3, 8)}
    nodes = [
        node("Conv", "x a bias", "h"), node("Relu", "h", "r"), node("Conv", "r b bias", "i"), node("Relu", "i", "s"),
        node("Conv", "s c", "y"),
    ]  # fmt: skip
    file, x = (
        save(model(nodes, stored, outputs={"y": ("n", 5, 12, 12)}), tmp_path / "net.onnx"),
        torch.randn(2, 3, 16, 16),
    )
    result = lbyl.compress(
        lbyl.load_source(str(file)), x, ratio={"make h": 0.5, "make i": 0.25}, restore="prune", forecast=False
    )
    written = result.save(tmp_path / "smaller") / "model.onnx"
    assert not unused(written)
    np.testing.assert_allclose(run(written, x)[0], result.model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factors", [{"beta": 0.0}, {"alpha": 0.0}, {"beta": 1e-30}, {"alpha": 2.0, "beta": 0.5}])
def test_factors_of_gemm(factors: dict[str, float], tmp_path: Path) -> None:
    stored = {
        "a": real(0, 32, 6), "a_bias": real(1, 32), "b": real(2, 24, 32), "b_bias": real(3, 24), "c": real(4, 24, 5)
    }  # fmt: skip
    nodes = [
        node("Gemm", "x a a_bias", "h", transB=1, **factors), node("Relu", "h", "r"),
        node("Gemm", "r b b_bias", "i", transB=1, **factors), node("Relu", "i", "s"), node("MatMul", "s c", "y"),
    ]  # fmt: skip
    file, x = save(model(nodes, stored, {"x": ("n", 6)}, {"y": ("n", 5)}), tmp_path / "net.onnx"), torch.randn(40, 6)
    result = lbyl.compress(lbyl.load_source(str(file)), x, ratio=0.5, restore="prune", forecast=False)
    assert result.report.rows
    with torch.no_grad():  # as restoration does, which adds to biases
        for weight in result.model.parameters():
            weight.add_(0.01)
    written = result.save(tmp_path / "smaller") / "model.onnx"
    with torch.no_grad():
        np.testing.assert_allclose(run(written, x)[0], result.model(x), rtol=1e-4, atol=1e-5)


def test_sparse_initializers(tmp_path: Path) -> None:
    made = through(a=real(0, 6, 32), b=real(1, 32, 5))
    for place, (shape, index) in enumerate((((6, 32), [0, 40, 191]), ((32, 5), [[0, 1], [7, 3], [31, 4]]))):
        name = made.graph.initializer[0].name
        del made.graph.initializer[0]
        values = numpy_helper.from_array(1 + real(place, 3), name)
        places = numpy_helper.from_array(np.array(index), f"{name}_places")
        made.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, shape))
    file, x = save(made, tmp_path / "net.onnx"), torch.randn(4, 6)
    network = lbyl.load_source(str(file))
    np.testing.assert_allclose(run(file, x)[0], network(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_channels_in_the_sizes_of_a_resize_follow(mode: str, tmp_path: Path) -> None:
    """Exporters of networks with a fixed batch state all sizes, also those of batch and channels."""
    stored = {"a": real(0, 8, 3, 3, 3), "b": real(1, 5, 8, 1, 1), "sizes": np.array([1, 8, 20, 28])}
    nodes = [
        node("Conv", "x a", "h"), node("Relu", "h", "r"), node("Resize", "r _ _ sizes", "s", mode=mode),
        node("Conv", "s b", "y"),
    ]  # fmt: skip
    file = save(model(nodes, stored, {"x": (1, 3, 16, 16)}, {"y": (1, 5, 20, 28)}), tmp_path / "net.onnx")
    network, x = lbyl.load_source(str(file)), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = np.concatenate([run(file, image[None])[0] for image in x])
        np.testing.assert_allclose(network(x), expected, rtol=1e-4, atol=1e-5)
    result = lbyl.compress(network, x[:1], ratio=0.5, restore="prune", forecast=False)
    assert [(row.before, row.after) for row in result.report.rows] == [(8, 4)]
    written = result.save(tmp_path / "smaller") / "model.onnx"
    sizes = next(item for item in onnx.load(written).graph.initializer if item.name == "sizes")
    assert numpy_helper.to_array(sizes).tolist() == [1, 4, 20, 28]
    np.testing.assert_allclose(run(written, x[:1])[0], result.model(x[:1]).detach(), rtol=1e-4, atol=1e-5)


def test_parameters_are_those_of_the_file(tmp_path: Path) -> None:
    """Constants that were computed, as masks, are none, and tables of which a shape says the rows are."""
    stored = {
        "a": real(0, 16, 32), "b": real(1, 32, 16), "positions": real(2, 20, 16), "zero": np.array([0.0], np.float32),
        "causal": np.tril(np.ones((10, 10), bool)), "far": np.array([-1e4], np.float32), "one": np.array(1),
        "start": np.array(0), "step": np.array(1), "first": np.array([1]),
    }  # fmt: skip
    nodes = [
        node("Where", "causal zero far", "mask"), node("Shape", "x", "sizes"), node("Gather", "sizes one", "length"),
        node("Range", "start length step", "places"), node("Gather", "positions places", "rows"),
        node("Add", "x rows", "e"), node("MatMul", "e a", "h"), node("Relu", "h", "r"), node("MatMul", "r b", "v"),
        node("Transpose", "e", "t", perm=[0, 2, 1]), node("MatMul", "e t", "scores"), node("Add", "scores mask", "m"),
        node("Softmax", "m", "p"), node("MatMul", "p v", "y"),
    ]  # fmt: skip
    file = save(model(nodes, stored, {"x": ("n", 10, 16)}, {"y": ("n", 10, 16)}), tmp_path / "net.onnx")
    network, x = lbyl.load_source(str(file)), torch.randn(2, 10, 16)
    assert sum(weight.numel() for weight in network.parameters()) == 2 * 16 * 32 + 20 * 16
    with torch.no_grad():
        np.testing.assert_allclose(run(file, x)[0], network(x), rtol=1e-4, atol=1e-5)
    result = lbyl.compress(network, x, ratio=0.5, restore="prune", forecast=False)
    written = result.save(tmp_path / "smaller") / "model.onnx"
    np.testing.assert_allclose(run(written, x)[0], result.model(x).detach(), rtol=1e-4, atol=1e-5)


def test_open_sizes_of_outputs_stay_open(tmp_path: Path) -> None:
    """They could be inferred, but the file does not promise them."""
    made = through(a=real(0, 6, 32), b=real(1, 32, 5))
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 40
    made.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    made.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    x = torch.randn(40, 6)
    result = lbyl.compress(
        lbyl.load_source(str(save(made, tmp_path / "net.onnx"))), x, ratio=0.5, restore="prune", forecast=False
    )
    written = result.save(tmp_path / "smaller") / "model.onnx"
    assert list(onnx.load(written).graph.output) == list(made.graph.output)


def test_types_of_inputs_are_compared_with_the_file(tmp_path: Path) -> None:
    network: Any = lbyl.load_source(str(save(convnet(), tmp_path / "net.onnx")))
    shapes = [(1, 3, 16, 16)]
    assert network.example_inputs(shapes, dtypes=[torch.float32])[0].dtype == torch.float32
    assert network.example_inputs(shapes, dtypes=[None])[0].dtype == torch.float32
    with pytest.raises(lbyl.InputError, match=r"'x': float32 batchx3x16x16 can't be int64; leave the type out"):
        network.example_inputs(shapes, dtypes=[torch.int64])


# -- files that can't be read ---------------------------------------------------------------------------------


def cyclic() -> onnx.ModelProto:
    return model([node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "b", "y")], {}, outputs={"y": ("n",)})


def twice() -> onnx.ModelProto:
    return model([node("Relu", "x", "y"), node("Sigmoid", "x", "y")], {}, outputs={"y": ("n", 3, 16, 16)})


def gigantic() -> onnx.ModelProto:
    made = convnet()
    made.graph.initializer[0].dims[0] = 2**40
    return made


def short() -> onnx.ModelProto:
    made = convnet()
    made.graph.initializer[0].dims[0] = 13
    return made


def huge_fill() -> onnx.ModelProto:
    nodes = [node("ConstantOfShape", "shape", "a"), node("Add", "x a", "y")]
    return model(nodes, {"shape": np.array([1, 3, 2**20, 2**20])}, outputs={"y": ("n", 3, 16, 16)})


def quantized() -> onnx.ModelProto:
    nodes = [node("QuantizeLinear", "x scale zero", "a"), node("DequantizeLinear", "a scale zero", "y")]
    stored = {"scale": np.array(0.1, np.float32), "zero": np.array(0, np.uint8)}
    return model(nodes, stored, outputs={"y": ("n", 3, 16, 16)})


def branching(operator: str = "Identity") -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    branch = [
        helper.make_graph([node(name, "x", out)], name, [], [info(out, TensorProto.FLOAT, None)])
        for name, out in (("Relu", "r"), ("Sigmoid", "t"))
    ]
    nodes = [
        node(operator, "x", "v"),
        node("ReduceSum", "v", "s", keepdims=0),
        node("Greater", "s zero", "c"),
        node("If", "c", "y", then_branch=branch[0], else_branch=branch[1]),
    ]
    zero = np.array(0, np.int64 if operator == "Shape" else np.float32)
    return model(nodes, {"zero": zero}, outputs={"y": ("n", 3, 16, 16)})


def foreign() -> onnx.ModelProto:
    nodes = [node("Mystery", "x", "y", domain="com.example")]
    return model(nodes, {}, outputs={"y": ("n", 3)}, domains=["com.example"])


def unknown() -> onnx.ModelProto:
    return model([node("Det", "x", "y")], {}, outputs={"y": ("n", 3)})


def second(operator: str, operands: str, count: int, **attributes: Any) -> onnx.ModelProto:
    """A node of which another output than the first is used."""
    names = " ".join(["y", *("_" * (count - 2)), "z"])
    made = node(operator, operands, names, **attributes)
    made.output[:] = ["" if name == "_" else name for name in made.output]
    outputs = {"y": ("n", 3, "h", "w"), "z": ("n", 3, "h", "v")}
    types = {"z": TensorProto.INT64 if operator == "MaxPool" else TensorProto.FLOAT}
    return model([made], {"w": real(0, 16)}, outputs=outputs, types=types)


def outside(location: str) -> onnx.ModelProto:
    made = convnet()
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return made


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (cyclic, "topologically sorted"),
        (twice, "has been used as output names multiple times|single static assignment|SSA"),
        (gigantic, "too large for a file"),
        (short, "bytes of it in place of"),
        (huge_fill, "would make .* elements"),
        (quantized, "'make a' .QuantizeLinear. is part of a quantized network"),
        (branching, "'make y' .If. is control flow.* depends on the values of 'x'; export the network for one"),
        (lambda: branching("Shape"), "'make y' .If. is control flow.* depends on the sizes of 'x'; fix all sizes"),
        (foreign, "'make y' .Mystery. has the domain 'com.example'.*; export the network without them"),
        (unknown, "'make y' .Det. is an operator that lbyl can't read; compress the network in PyTorch"),
        (lambda: second("MaxPool", "x", 2, kernel_shape=[2, 2]), "its output Indices is used; compress"),
        (lambda: second("LayerNormalization", "x w", 3), "its output InvStdDev is used"),
        (lambda: recurrent(activations=["Sigmoid", "Relu", "Tanh"]), "its activations are Sigmoid, Relu, Tanh"),
        (lambda: recurrent(clip=1.0), "clips its gates.*; compress the network in PyTorch"),
        (lambda: recurrent(operands="x w r _ n"), "lengths of their own"),
        (lambda: recurrent(operands="x w r _ _ _ _ p"), "peepholes"),
        (lambda: outside("../weights"), "outside the file's folder"),
        (lambda: outside("/etc/passwd"), "outside the file's folder"),
        (lambda: outside("weights/../../w"), "outside the file's folder"),
        (lambda: outside("weights"), "which does not exist"),
        (lambda: outside("link"), "outside the file's folder"),
    ],
)
def test_files_that_cant_be_read(make, said: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "weights").write_bytes(bytes(10_000))
    (place / "link").symlink_to(tmp_path / "weights")
    file = save(make(), place / "net.onnx")
    with pytest.raises(lbyl.InputError, match=said) as caught:
        lbyl.load_source(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 40, 700, 2000])
def test_truncated_file(length: int, tmp_path: Path) -> None:
    file = save(convnet(), tmp_path / "net.onnx")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(lbyl.InputError, match=r"net.onnx") as caught:
        lbyl.load_source(str(file))
    assert "\n" not in str(caught.value)


def test_file_that_changes_meanwhile(tmp_path: Path) -> None:
    file = save(convnet(), tmp_path / "net.onnx")
    x = torch.randn(1, 3, 16, 16)
    result = lbyl.compress(lbyl.load_source(str(file)), x, ratio=0.25, restore="prune", forecast=False)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(lbyl.ArtifactError, match="has changed since it was read"):
        result.save(tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


# -- files of torch.export ------------------------------------------------------------------------------------


def test_program_of_torch_export(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    x = torch.randn(1, 3, 8, 8)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    source = str(tmp_path / "net.pt2")
    result = lbyl.compress(lbyl.load_source(source), x, ratio=0.5, restore="prune", source=source, forecast=False)
    folder = result.save(tmp_path / "smaller")
    program = torch.export.load(folder / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), result.model(x))
    assert result.report.parameters[1] < result.report.parameters[0]


@pytest.mark.parametrize("kept", [True, False], ids=["with its inputs", "without"])
def test_the_command_line_takes_a_program_as_it_is(kept: bool, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    sizes = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(net, (torch.randn(2, 3, 9, 9),), dynamic_shapes=(sizes,))
    program.example_inputs = program.example_inputs if kept else None
    torch.export.save(program, tmp_path / "net.pt2")
    asked = ["compress", str(tmp_path / "net.pt2"), "--ratio", "0.5", "--restore", "prune", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    smaller = torch.export.load(tmp_path / "out" / "model.pt2").module()
    assert smaller(torch.randn(2, 3, 9, 9)).shape == (2, 4, 5, 5)


def test_torchscript_is_told_how_to_export(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    torch.jit.trace(net, torch.randn(1, 4)).save(tmp_path / "net.pt")
    with pytest.raises(lbyl.InputError, match=r"torch\.export\.save"):
        lbyl.load_source(str(tmp_path / "net.pt"))


def test_a_node_that_the_evaluator_of_onnx_fails_on(tmp_path: Path) -> None:
    # Rows of a table of token types, looked up by position, as BERT's embeddings are exported.
    table, index = np.arange(8, dtype=np.float32).reshape(1, 8), np.array([[5, 0, 3]])
    nodes = [
        node("GatherElements", "table index", "rows", axis=1),
        node("MatMul", "x w", "mixed"),
        node("Relu", "mixed", "hidden"),
        node("MatMul", "hidden v", "last"),
        node("Add", "last rows", "y"),
    ]
    stored = {"table": table, "index": index, "w": real(0, 4, 6), "v": real(1, 6, 3)}
    file = save(model(nodes, stored, {"x": ("batch", 4)}, {"y": ("batch", 3)}), tmp_path / "net.onnx")
    network, x = lbyl.load_source(str(file)), torch.randn(2, 4)
    with torch.no_grad():
        np.testing.assert_allclose(run(file, x.numpy())[0], network(x), rtol=1e-5, atol=1e-6)
    saved = lbyl.compress(network, x, ratio=0.5, restore="prune", forecast=False).save(tmp_path / "smaller")
    assert run(saved / "model.onnx", x.numpy())[0].shape == (2, 3)
