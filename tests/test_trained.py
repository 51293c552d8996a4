"""What was trained after it was compressed is saved, exported and compressed again like any other network."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import images, mlp, settle
from torch import Tensor, nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.io.artifact import CARD, PAGE, read_manifest

X = images(8, 6)


def small(ratio: float = 0.3) -> lbyl.Result:
    return lbyl.compress(settle(mlp()), X, ratio=ratio, restore="lbyl")


def train(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


def outputs(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


WAYS: dict[str, Callable[[lbyl.Result, Path], nn.Module]] = {
    "a result's model": lambda result, place: result.model,
    "a loaded folder": lambda result, place: lbyl.load(result.save(place / "first"), mlp()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrapper", [lambda net: net, nn.DataParallel], ids=["plain", "wrapped"])
def test_a_trained_network_is_saved_and_says_so(way: str, wrapper: Callable[..., Any], tmp_path: Path) -> None:
    net = train(WAYS[way](small(), tmp_path))
    folder = lbyl.save(wrapper(net), tmp_path / "trained")
    assert torch.equal(outputs(lbyl.load(folder, mlp())), outputs(net))
    manifest = read_manifest(folder)
    assert manifest.plan.trained
    assert "trained after it was compressed" in manifest.report.summary()[0]
    assert "Its weights were trained after that" in (folder / CARD).read_text()
    assert "trained as well" in (folder / PAGE).read_text()


def test_what_was_not_trained_is_saved_as_before(tmp_path: Path) -> None:
    result = small()
    net = lbyl.load(result.save(tmp_path / "first"), mlp())
    lbyl.save(net, tmp_path / "second")
    assert read_manifest(tmp_path / "second") == read_manifest(tmp_path / "first")
    assert "was not retrained" in (tmp_path / "second" / CARD).read_text()


def test_a_result_that_was_trained_says_so_as_well(tmp_path: Path) -> None:
    result = small()
    train(result.model)
    assert read_manifest(result.save(tmp_path / "a")).plan.trained


def test_prune_and_train_in_turns(tmp_path: Path) -> None:
    net: nn.Module = settle(mlp())
    for turn in range(3):
        net = train(lbyl.compress(net, X, ratio=0.2, restore="lbyl").model)
        folder = lbyl.save(net, tmp_path / str(turn))
        assert torch.equal(outputs(lbyl.load(folder, mlp())), outputs(net))
        net = lbyl.load(folder, mlp())
    between = lbyl.compress(net, X, ratio=0.2, restore="lbyl")
    assert between.plan.trained
    assert any("training in between" in note for note in between.report.notes)


LOST: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "no plan": (lambda net: mlp(), r"carries no plan.*net = lbyl.load\(folder\)"),
    "another head": (lambda net: net.append(nn.Linear(3, 5)), r"5.weight is 5x3.*missing.*layer was replaced"),  # type: ignore[operator]
}


@pytest.mark.parametrize("case", LOST)
def test_what_cannot_be_saved_says_what_to_do(case: str, tmp_path: Path) -> None:
    change, told = LOST[case]
    with pytest.raises(lbyl.InputError, match=told):
        lbyl.save(change(small().model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_process_get_in_by_way_of_the_folder(tmp_path: Path) -> None:
    folder = small().save(tmp_path / "first")
    state = pickle.loads(pickle.dumps(train(lbyl.load(folder, mlp())).state_dict()))
    net = lbyl.load(folder, mlp())
    net.load_state_dict(state)
    assert read_manifest(lbyl.save(net, tmp_path / "second")).plan.trained


def test_a_trained_network_is_exported(tmp_path: Path) -> None:
    net = train(small().model)
    exported = lbyl.export(net, to=tmp_path / "net.pt2")
    program = torch.export.load(exported.file).module()
    assert torch.allclose(program(X), outputs(net), atol=1e-5)
    with pytest.raises(lbyl.InputError, match="exists already"):
        lbyl.export(net, to=tmp_path / "net.pt2")
    assert lbyl.export(mlp(), to=tmp_path / "whole.pt2", inputs=X).dynamic
    asking = X.clone().requires_grad_()
    assert lbyl.export(mlp(), to=tmp_path / "whole.onnx", inputs=asking).dynamic


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "name the file"),
        ({"to": "net.xyz"}, "names no format"),
        ({"to": "nowhere/net.pt2"}, "not a folder"),
        ({"to": "net.pt2", "model": mlp()}, "for saved folders"),
        ({"to": "net.onnx", "format": "pt2"}, r"net.onnx would be a file in the format 'pt2': name it .pt2"),
    ],
)
def test_where_to_export_must_be_clear(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(lbyl.InputError, match=told):
        lbyl.export(small().model, **arguments)


def test_a_network_without_a_plan_is_exported_on_given_inputs(tmp_path: Path) -> None:
    with pytest.raises(lbyl.InputError, match="pass it as inputs="):
        lbyl.export(mlp(), to=tmp_path / "net.pt2")


def test_the_command_line_goes_on_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from nets import mlp\n")
    trained = lbyl.save(train(small().model), tmp_path / "trained")
    builder = f"{tmp_path / 'net.py'}:mlp"
    options = ["--model", builder, "--ratio", "0.3", "--restore", "lbyl", "--no-latency"]
    done = CliRunner().invoke(app, ["compress", str(trained), *options, "-o", str(tmp_path / "again"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["plan"]["trained"]
    assert lbyl.load(tmp_path / "again", mlp())(X).shape == (8, 3)
    done = CliRunner().invoke(app, ["inspect", str(trained), "--model", builder])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["compress", str(trained), "--ratio", "0.3", "-o", str(tmp_path / "third")])
    assert done.exit_code == 1
    assert "--model SOURCE" in done.output
