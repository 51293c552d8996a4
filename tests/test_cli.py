"""The command line: every command, its JSON, its exit codes, and one line for every mistake."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from typer.testing import CliRunner

import lbyl
from lbyl._public import FAMILIES
from lbyl.cli.app import Stage, TimeLeft, app
from lbyl.cli.settings import Settings
from lbyl.io.files import files_in
from lbyl.io.images import preprocessing, read_images
from lbyl.io.sources import load_source
from lbyl.runtime.memory import ROOM

RESNET = ("torchvision:resnet18", "--no-pretrained", "--input", "1x3x32x32")
FACTORY = """
    import torch
    from torch import nn

    print("factories may talk")

    def net():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
        )

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.hidden, self.out = nn.Embedding(4, 5), nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, ids, scale):
            return self.out(self.hidden(self.embedding(ids)).relu()) * scale

    class Undecided(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
            self.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x):
            y = self.backbone(x).mean((2, 3))
            return self.head(y[y.sum(1) > -1e9])

    undecided = Undecided
    tokens = Tokens
    number = lambda: 3
"""
run = CliRunner().invoke


@pytest.fixture
def source(tmp_path: Path) -> str:
    file = tmp_path / "tiny.py"
    file.write_text(textwrap.dedent(FACTORY))
    return f"{file}:net"


def command(*args: object):
    return run(app, [str(arg) for arg in args])


def compress(source: str, out: Path, *args: object):
    asked = () if {"--ratio", "--budget"} & set(map(str, args)) else ("--ratio", "0.5")
    return command("compress", source, "-o", out, "--input", "1x3x12x12", *asked, *args)


def test_inspect_lists_groups(source: str) -> None:
    result = command("inspect", source, "--input", "1x3x12x12")
    assert result.exit_code == 0, result.output
    assert "Channel groups" in result.stdout
    assert "the model's output" in result.stdout


def test_inspect_json_is_the_only_thing_on_stdout(source: str) -> None:
    result = command("inspect", source, "--input", "1x3x12x12", "--json")
    document = json.loads(result.stdout)
    assert document["source"] == source
    assert [group["name"] for group in document["groups"]] == ["0", "3", "8"]
    assert document["groups"][0]["consumers"] == ["3"]
    assert "factories may talk" in result.stderr


@pytest.mark.parametrize("name", ["inspect", "compress", "sweep", "show", "export", "bench"])
def test_a_command_by_itself_shows_examples_that_are_right(name: str) -> None:
    said = command(name)
    assert said.exit_code == 2
    assert said.stdout == ""
    examples = [line.split()[1:] for line in said.stderr.splitlines() if line.startswith("  lbyl ")]
    assert examples
    known = {option for each in typer.main.get_command(app).commands[name].params for option in each.opts}  # type: ignore[attr-defined]
    for words in examples:
        assert words[0] == name
        assert {word for word in words if word.startswith("-")} <= known


def test_without_a_terminal_each_stage_is_a_line(source: str, tmp_path: Path) -> None:
    said = compress(source, tmp_path / "out", "--restore", "prune").stderr.splitlines()
    stages = [line.split(" s  ", 1)[1] for line in said if " s  " in line]
    assert stages[0] == f"loading {source}"
    assert {"tracing", "cutting and verifying", "measuring latency"} <= set(stages)
    assert len(stages) == len(set(stages))
    for args in (
        ("compress", source, "-o", tmp_path / "b", "--input", "1x3x12x12", "--ratio", 0.5, "--restore", "prune"),
        ("show", tmp_path / "out"),
    ):
        quiet = command(*args, "--quiet")
        assert quiet.exit_code == 0
        assert quiet.stderr.removeprefix("factories may talk\n") == ""


def test_compress_saves_what_the_library_saves(source: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compress(source, out, "--ratio", 0.5, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "8 → 4" in result.stdout
    # Whole, however narrow the terminal is: lines are there to be pasted.
    assert f"saved to {out}" in result.stdout
    assert any(str(out) in line and "load_source" in line for line in result.stdout.splitlines())
    net = load_source(source)
    x = torch.randn(2, 3, 12, 12)
    expected = lbyl.compress(net, x, ratio=0.5, seed=3).model
    assert torch.equal(lbyl.load(out, net)(x), expected(x))


def test_the_printed_line_loads_the_network(source: str, tmp_path: Path) -> None:
    document = json.loads(compress(source, tmp_path / "out", "--ratio", "0.5", "--json").stdout)
    names: dict[str, torch.nn.Module] = {}
    exec(document["load"], names)
    assert names["net"](torch.zeros(1, 3, 12, 12)).shape == (1, 4)


def test_parts_one_submodule_and_strict(source: str, tmp_path: Path) -> None:
    undecided = source.replace(":net", ":undecided")
    document = json.loads(compress(undecided, tmp_path / "parts", "--restore", "prune", "--json").stdout)
    assert document["plan"]["settings"]["parts"] == ["backbone", "head"]
    found = command("inspect", undecided, "--input", "1x3x12x12", "--submodule", "head", "--json")
    assert [group["name"] for group in json.loads(found.stdout)["groups"]] == ["head.0", "head.2"]
    alone = compress(undecided, tmp_path / "alone", "--restore", "prune", "--submodule", "backbone")
    assert "backbone.0" in alone.stdout
    assert "head.0" not in alone.stdout
    refused = compress(undecided, tmp_path / "refused", "--restore", "prune", "--strict")
    assert refused.exit_code == 1
    assert "depends on the data" in refused.stderr
    assert not (tmp_path / "refused").exists()


def test_budget(source: str, tmp_path: Path) -> None:
    args = ("--budget", "macs=0.63", "--exclude", "0", "--restore", "prune", "--json")
    document = json.loads(compress(source, tmp_path / "out", *args).stdout)
    assert document["report"]["macs"][1] / document["report"]["macs"][0] == pytest.approx(0.63, rel=0.02)
    assert [row["group"] for row in document["report"]["rows"]] == ["3"]
    for wrong, said in (
        (("--budget", "speed=2"), "macs=0.5"),
        (("--budget", "macs=0.5", "--ratio", "0.5"), "give only one of them"),
        (("--round-to", "8", "--ratio", "0.5"), "need --budget"),
        (("--budget", "macs=0.5", "--round-to", "x"), "whole number"),
    ):
        result = compress(source, tmp_path / "wrong", *wrong)
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.stderr.replace("│", " ").split())
    unreachable = compress(source, tmp_path / "wrong", "--budget", "macs=0.01", "--restore", "prune")
    assert unreachable.exit_code == 1
    assert "can't be reached" in unreachable.stderr


def test_torchvision_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = command("compress", *RESNET, "-o", out, "--ratio", 0.25, "--effort", "low", "--no-forecast", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["load"] == f"import lbyl; net = lbyl.load({str(out)!r})"
    first = document["report"]["rows"][0]
    assert (first["before"], first["after"]) == (64, 48)
    assert document == json.loads(command("show", out, "--json").stdout)
    shown = command("show", out)
    assert shown.exit_code == 0
    assert "torchvision:resnet18 on float32 1x3x32x32" in shown.stdout
    assert "64 → 48" in shown.stdout
    assert isinstance(lbyl.load(out), torch.nn.Module)


def test_timm_knows_its_input_size() -> None:
    result = command("inspect", "timm:test_resnet", "--no-pretrained", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["groups"]


def test_settings_reach_the_plan(source: str, tmp_path: Path) -> None:
    options = ("--ratio", "3=0.5", "--scope", "all", "--criterion", "l1", "--restore", "merge", "--no-verify")
    result = compress(source, tmp_path / "out", *options, "--json")
    document = json.loads(result.stdout)
    settings = document["plan"]["settings"]
    assert settings["ratio"] == {"3": 0.5}
    assert (settings["scope"], settings["criterion"]["name"], settings["restore"]["name"]) == (
        "all",
        "L1",
        "Merge",
    )
    assert [group["name"] for group in document["plan"]["groups"]] == ["3"]
    assert document["report"]["verified"] is None


def test_weights_are_loaded(source: str, tmp_path: Path) -> None:
    net = load_source(source)
    state = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in net.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    result = compress(source, tmp_path / "out", "--weights", tmp_path / "w.safetensors", "--restore", "prune")
    assert result.exit_code == 0, result.output
    assert torch.equal(lbyl.load(tmp_path / "out", net).state_dict()["8.bias"], state["8.bias"])


def test_several_inputs_of_other_types(source: str) -> None:
    source = source.replace(":net", ":tokens")
    result = command("inspect", source, "--input", "int64:1x6", "--input", "1x1x1", "--json")
    assert result.exit_code == 0, result.output
    assert [group["width"] for group in json.loads(result.stdout)["groups"]][-2:] == [8, 2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("inspect", "torchvision:resnet17"), "torchvision has no model 'resnet17'"),
        (("inspect", "nowhere.py:net"), "no file nowhere.py"),
        (("inspect", "no.such.package:net"), "can't be imported"),
        (("inspect", "SOURCE"), "pass --input"),
        (("inspect", "SOURCE", "--input", "1x4x12x12"), "torch.export can't trace"),
        (("inspect", "SOURCE", "--weights", "none.safetensors"), "no weights at none.safetensors"),
        (("inspect", "NUMBER"), "not a torch.nn.Module"),
        (("compress", "SOURCE", "-o", "TMP"), "exists already"),
        (("compress", "SOURCE", "-o", "TMP/a/b"), "is not a folder"),
        (
            ("compress", "SOURCE", "-o", "TMP/a", "--input", "1x3x12x12", "--ratio", "x=0.5"),
            "matches no group",
        ),
        (("show", "TMP"), "not a folder saved by lbyl"),
        (("compress", "SOURCE", "-o", "TMP/a", "--data", "TMP/b"), "is not a folder of images"),
        (("compress", "SOURCE", "-o", "TMP/a", "--data", "TMP"), "no image in"),
    ],
)
@pytest.mark.parametrize("flags", [("--quiet",), ("-q", "--json")])
def test_mistakes_are_one_line_and_exit_code_1(
    source: str, tmp_path: Path, args: tuple[str, ...], flags: tuple[str, ...], message: str
) -> None:
    words = {"SOURCE": source, "NUMBER": source.replace(":net", ":number")}
    result = command(*(words.get(arg, arg).replace("TMP", str(tmp_path)) for arg in args), *flags)
    assert result.exit_code == 1
    assert result.stdout == ""
    line = result.stderr.removeprefix("factories may talk\n")
    assert line.startswith("error: ")
    assert message in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ("compress", "SOURCE"),
        ("compress", "SOURCE", "-o", "o", "--ratio", "1"),
        ("compress", "SOURCE", "-o", "o", "--ratio", "layer=half"),
        ("compress", "SOURCE", "-o", "o", "--ratio", "0.1", "--ratio", "0.2"),
        ("compress", "SOURCE", "-o", "o", "--restore", "magic"),
        ("compress", "SOURCE", "-o", "o", "--input", "1x-3"),
        ("inspect", "SOURCE", "--input", "text:1x3"),
        ("inspect", "SOURCE", "--input", "large"),
        ("prune", "SOURCE"),
        ("compress", "SOURCE", "-o", "o", "--moments", "telepathy"),
        ("compress", "SOURCE", "-o", "o", "--ridge", "-1"),
        ("compress", "SOURCE", "-o", "o", "--restore", "lbyl", "--ridge", "1"),
        ("compress", "SOURCE", "-o", "o", "--restore", "merge", "--moments", "noise"),
        ("compress", "SOURCE", "-o", "o", "--restore", "prune", "--no-renorm"),
        ("compress", "SOURCE", "-o", "o", "--restore", "prune", "--no-sequential"),
        ("compress", "SOURCE", "-o", "o", "--moments", "weights", "--sequential"),
        ("compress", "SOURCE", "-o", "o", "--moments", "weights", "--solve", "patch"),
        ("compress", "SOURCE", "-o", "o", "--moments", "data"),
        ("compress", "SOURCE", "-o", "o", "--moments", "noise", "--data", "folder"),
        ("compress", "SOURCE", "-o", "o", "--moments", "noise", "--no-photographs"),
        ("compress", "SOURCE", "-o", "o", "--restore", "lbyl", "--no-photographs"),
        ("compress", "SOURCE", "-o", "o", "--restore", "lbyl", "--memory", "1"),
        ("compress", "SOURCE", "-o", "o", "--memory", "0"),
        ("compress", "SOURCE", "-o", "o", "--mean", "0.5"),
        ("compress", "SOURCE", "-o", "o", "--data", "folder", "--mean", "gray"),
        ("compress", "SOURCE", "-o", "o", "--data", "folder", "--std", "0,1,1"),
        ("compress", "SOURCE", "-o", "o", "--budget", "macs=0.5", "--budget", "params=0.9"),
        ("resize", "o", "-o", "p", "--budget", "macs=0.5", "--budget", "params=0.9"),
        ("compress", "SOURCE", "-o", "o", "--memory", "inf"),
        ("compress", "SOURCE", "-o", "o", "--budget", "macs=0.5", "--round-to", "9" * 30),
        ("inspect", "SOURCE", "--seed", "9" * 20),
    ],
)
def test_usage_errors_exit_with_2(args: tuple[str, ...]) -> None:
    result = command(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_an_existing_folder_is_refused_before_any_code_runs(source: str, tmp_path: Path) -> None:
    result = compress(source, tmp_path)
    assert result.exit_code == 1
    assert "factories may talk" not in result.output


@pytest.mark.parametrize("name", ["compress", "sweep"])
def test_both_commands_have_the_shared_options(name: str) -> None:
    parameters = {parameter.name: parameter for parameter in commands()[name].params}
    shared = [field.name for field in fields(Settings)]
    assert [parameter for parameter in parameters if parameter in shared] == shared
    assert {shared: parameters[shared].default for shared in ("seed", "criterion")} == {"seed": 0, "criterion": "auto"}


@pytest.mark.parametrize("name", ["compress", "sweep"])
@pytest.mark.parametrize(
    ("option", "family"), [("criterion", "criterion"), ("restore", "restorer"), ("moments", "moments")]
)
def test_help_and_completion_know_every_name(name: str, option: str, family: str) -> None:
    shown = run(app, [name, "--help"], env={"COLUMNS": "300"})
    assert shown.exit_code == 0
    text = "".join(re.sub("[│\n]", " ", shown.stdout).split())
    parameter = next(parameter for parameter in commands()[name].params if parameter.name == option)
    found = [item.value for item in parameter.shell_complete(click_context(name), "")]
    for member in FAMILIES[family]:
        assert member in text
        assert member in found
    assert [item.value for item in parameter.shell_complete(click_context(name), found[-1])] == [found[-1]]


@pytest.mark.parametrize(
    ("option", "known"),
    [("--criterion", "l2, l1, gm"), ("--restore", "auto, lbyl"), ("--moments", "weights, gaussian")],
)
@pytest.mark.parametrize("model", ["torchvision:resnet18", "FILE"])
def test_an_unknown_name_is_a_usage_error_that_lists_the_known(
    source: str, tmp_path: Path, option: str, known: str, model: str
) -> None:
    result = compress(source if model == "FILE" else model, tmp_path / "out", option, "magic")
    assert result.exit_code == 2
    said = " ".join(re.sub("[│\n]", " ", result.stderr).split())
    assert "'magic' is no" in said
    assert known in said
    assert not (tmp_path / "out").exists()


def commands() -> dict[str, Any]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def click_context(name: str) -> Any:
    return commands()[name].make_context(name, ["--help"], resilient_parsing=True)


def test_the_command_line_itself_does_not_import_torch() -> None:
    code = """
        import importlib.util, sys, types
        package = types.ModuleType("lbyl")
        package.__path__ = [sys.argv[1]]
        sys.modules["lbyl"] = package
        import lbyl.cli
        for words in (["--help"], ["compress", "--help"], ["compress", "timm:x", "-o", "o", "--criterion", "magic"]):
            try:
                lbyl.cli.app(words)
            except SystemExit:
                pass
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(Path(lbyl.__file__).parent)], check=True)


def test_a_package_in_the_working_directory_is_found(source: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lbyl", "inspect", "tiny:net", "--input", "1x3x12x12", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["source"] == "tiny:net"


def pictures(folder: Path, count: int, size: tuple[int, int] = (20, 16)) -> Path:
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        place = folder / f"class{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place / f"{index}.png")
    return folder


def restorer_of(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["plan"]["settings"]["restore"]


def test_least_squares_options_reach_the_plan(source: str, tmp_path: Path) -> None:
    options = ("--moments", "noise", "--solve", "mix", "--ridge", 0.05, "--no-renorm", "--no-sequential")
    found = restorer_of(compress(source, tmp_path / "out", *options, "--json"))
    expected = {"name": "LeastSquares", "solve": "mix", "ridge": 0.05, "renorm": False, "sequential": False}
    assert found.items() >= expected.items()
    assert found["moments"]["name"] == "Noise"
    assert "moments=Noise(images=" in command("show", tmp_path / "out").stdout


@pytest.mark.parametrize("moments", ["weights", "gaussian"])
def test_moments_from_weights(source: str, tmp_path: Path, moments: str) -> None:
    found = restorer_of(compress(source, tmp_path / "out", "--moments", moments, "--json"))
    assert found["moments"]["name"].lower() == moments


def sequential(folder: Path, layers: str) -> tuple[object, ...]:
    """A network of these layers, and what it is called with."""
    (folder / "small.py").write_text(f"from torch import nn\ndef net(): return nn.Sequential({layers})")
    return f"{folder / 'small.py'}:net", "--input", "1x3x16x16"


def test_dreams_without_photographs(tmp_path: Path) -> None:
    net = sequential(tmp_path, "nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)")
    options = ("--no-photographs", "--ratio", "0.5", "--json")
    found = restorer_of(command("compress", *net, "-o", tmp_path / "out", *options))
    assert found["moments"].items() >= {"name": "Dream", "photographs": False}.items()


def test_memory_is_for_dreaming_and_solving(tmp_path: Path) -> None:
    net = sequential(tmp_path, "nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)")
    options = ("--memory", "0.25", "--ratio", "0.5", "--json")
    found = restorer_of(command("compress", *net, "-o", tmp_path / "out", *options))
    assert found["memory"] == found["moments"]["memory"] == 2**28


def test_the_help_tells_how_much_memory_is_taken_by_default() -> None:
    assert f"Default: {ROOM / 2**30:g}." in get_type_hints(Settings, include_extras=True)["memory"].__metadata__[0].help


def test_options_go_on_from_what_the_network_gets_by_itself(tmp_path: Path) -> None:
    net = sequential(tmp_path, "nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)")
    by_itself = restorer_of(command("compress", *net, "-o", tmp_path / "first", "--ratio", "0.5", "--json"))
    assert by_itself["moments"]["name"] == "Photographs"
    options = ("--ridge", "0.25", "--memory", "1", "--ratio", "0.5", "--json")
    told = restorer_of(command("compress", *net, "-o", tmp_path / "second", *options))
    assert told == {**by_itself, "ridge": 0.25, "memory": 2**30}


def test_a_folder_of_images(source: str, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "images", 30)
    (folder / "notes.txt").write_text("not an image")
    found = restorer_of(compress(source, tmp_path / "out", "--data", folder, "--json"))
    assert found["moments"] == {"name": "Data", "batches": 2}
    net = load_source(source)
    batches, left = read_images(folder, *preprocessing("file.py:net", net, (1, 3, 12, 12)))
    assert not left
    assert [batch.shape for batch in batches] == [(24, 3, 12, 12), (6, 3, 12, 12)]
    restore = lbyl.LeastSquares(moments=lbyl.Data(batches, batches=2))
    expected = lbyl.compress(net, torch.zeros(1, 3, 12, 12), restore=restore, ratio=0.5).model
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(lbyl.load(tmp_path / "out", net)(x), expected(x))


def test_an_image_that_can_not_be_read_is_left_out(source: str, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "images", 2)
    (folder / "broken.jpg").write_bytes(b"no JPEG")
    result = compress(source, tmp_path / "out", "--data", folder, "--json")
    assert result.exit_code == 0, result.output
    told = "left out of --data"
    assert told in result.stderr
    assert any(
        told in note and "broken.jpg can't be read" in note for note in json.loads(result.stdout)["report"]["notes"]
    )


@pytest.mark.parametrize(("mode", "most"), [("I;16", 65535), ("F", 1.0)])
def test_gray_images_of_more_than_8_bits_keep_their_range(mode: str, most: float, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    values = np.linspace(0, most, 64).reshape(8, 8).astype(np.uint16 if mode == "I;16" else np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    batches, left = read_images(
        tmp_path, *preprocessing("f.py:net", torch.nn.Identity(), (1, 1, 8, 8), mean=[0], std=[1])
    )
    assert not left
    torch.testing.assert_close(batches[0].flatten(), torch.linspace(0, 1, 64), atol=1 / 255, rtol=0)


def test_float_images_of_another_range_are_left_out(tmp_path: Path) -> None:
    from PIL import Image

    for name, most in (("a.tif", 1.0), ("b.tif", 300.0)):
        Image.fromarray(np.linspace(0, most, 64).reshape(8, 8).astype(np.float32)).save(tmp_path / name)
    _, left = read_images(tmp_path, *preprocessing("f.py:net", torch.nn.Identity(), (1, 1, 8, 8), mean=[0], std=[1]))
    assert ["from 0 to 300" in line for line in left] == [True]


def test_inputs_have_the_precision_of_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "half.py"
    file.write_text(textwrap.dedent(FACTORY).replace("nn.Linear(6, 4),\n    )", "nn.Linear(6, 4),\n    ).half()"))
    result = compress(f"{file}:net", tmp_path / "out", "--restore", "prune")
    assert result.exit_code == 0, result.output
    result = compress(f"{file}:net", tmp_path / "b", "--input", "float64:1x3x12x12", "--restore", "prune")
    assert result.exit_code == 1
    assert "the weights are float16, so pass inputs of float16" in " ".join(result.stderr.split())


def test_a_folder_of_broken_images(source: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no JPEG")
    result = compress(source, tmp_path / "out", "--data", tmp_path)
    assert result.exit_code == 1
    assert "no image in" in result.stderr
    assert "broken.jpg can't be read as an image" in result.stderr


def test_others_take_the_place_of_images_that_can_not_be_read(tmp_path: Path) -> None:
    folder = pictures(tmp_path, 100, (4, 4))
    for file in sorted(each for each in folder.rglob("*") if each.is_file())[:4]:
        file.write_bytes(b"nothing")
    batches, left = read_images(folder, *preprocessing("file.py:net", torch.nn.Identity(), (1, 3, 4, 4)))
    assert sum(map(len, batches)) == 96
    assert 0 < len(left) <= 4


def test_of_many_images_a_seeded_draw_is_taken(tmp_path: Path) -> None:
    folder = pictures(tmp_path, 100, (4, 4))
    made = preprocessing("file.py:net", torch.nn.Identity(), (1, 3, 4, 4))
    first, again, other = (torch.cat(read_images(folder, *made, seed)[0]) for seed in (0, 0, 1))
    assert first.shape == (96, 3, 4, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_preprocessing_keeps_proportions_and_scales() -> None:
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    image.paste((0, 255, 0), (10, 0, 20, 10))
    net = torch.nn.Identity()
    middle, _ = preprocessing("f.py:net", net, (1, 3, 10, 10), mean=(0.5,), std=(0.25,))
    assert torch.equal(middle(image)[:, 5, 5], torch.tensor([-2.0, 2.0, -2.0]))
    assert middle(image)[1].min() == 2
    gray, mode = preprocessing("f.py:net", net, (1, 1, 8, 4), mean=(0.0,), std=(1.0,))
    assert mode == "L"
    assert gray(image.convert("L")).shape == (1, 8, 4)
    default, _ = preprocessing("f.py:net", net, (1, 3, 10, 10))
    published, _ = preprocessing("torchvision:resnet18", net, (1, 3, 224, 224))
    red = Image.new("RGB", (300, 300), (255, 0, 0))
    assert torch.allclose(default(red)[:, 0, 0], published(red)[:, 0, 0])


def test_timm_models_know_their_preprocessing() -> None:
    net: Any = load_source("timm:test_resnet", pretrained=False)
    preprocess, _ = preprocessing("timm:test_resnet", net, (1, 3, 160, 160))
    white = preprocess(Image.new("RGB", (200, 180), (255, 255, 255)))
    assert white.shape == (3, 160, 160)
    scales = zip(net.pretrained_cfg["mean"], net.pretrained_cfg["std"], strict=True)
    assert white[:, 0, 0].tolist() == pytest.approx([(1 - mean) / std for mean, std in scales])


@pytest.mark.parametrize(
    ("shape", "numbers", "message"),
    [
        ((1, 5, 8, 8), None, "not a batch of gray or RGB images"),
        ((1, 16), None, "not a batch of gray or RGB images"),
        ((1, 1, 8, 8), None, "pass --mean and --std"),
        ((1, 3, 8, 8), (0.5, 0.5), "--mean has 2 numbers"),
    ],
)
def test_inputs_that_images_do_not_fit(shape: tuple[int, ...], numbers: tuple[float, ...] | None, message: str) -> None:
    with pytest.raises(lbyl.InputError, match=message):
        preprocessing("file.py:net", torch.nn.Identity(), shape, mean=numbers)


def test_time_left_is_shown_where_work_is_counted() -> None:
    seconds = itertools.count()
    progress = Progress(
        console=Console(file=io.StringIO()),
        get_time=lambda: float(next(seconds)),
        speed_estimate_period=3600,
        auto_refresh=False,
    )
    stage, column = Stage(progress, "loading"), TimeLeft()
    assert column.render(progress.tasks[0]).plain == ""
    for step in range(1, 4):
        stage.follow("dreaming", step, 10)
    assert progress.tasks[0].description == "dreaming"
    assert column.render(progress.tasks[0]).plain.endswith(" left")
    stage.follow("solving", 5, 5)
    assert (progress.tasks[0].description, progress.tasks[0].total) == ("cutting and verifying", None)


UNTRUSTED = "x\x1b[2K\x1b[1A|`<b>`\u202e"


def test_what_comes_from_a_folder_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    """Names, notes and sources that would erase a warning, or be code to paste."""
    saved = Path(__file__).with_name("saved_0_1_0") / "own"
    shutil.copytree(saved, tmp_path / "own")
    data = json.loads((saved / "lbyl.json").read_text())
    data["plan"] |= {"source": f"{UNTRUSTED}.py:run", "inputs": UNTRUSTED, "library": UNTRUSTED}
    data["plan"]["settings"]["ratio"] = {UNTRUSTED: 0.5}
    data["report"]["notes"] = [UNTRUSTED, "two\nlines"]
    data["report"]["left"] = [[UNTRUSTED, UNTRUSTED]]
    data["report"]["rows"][0] |= {"group": UNTRUSTED, "note": UNTRUSTED}
    data["report"]["seconds"] = {UNTRUSTED: 1.0}
    (tmp_path / "own" / "lbyl.json").write_text(json.dumps(data))
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "own")]).stdout
    assert "x\\x1b[2K" in shown
    assert not {"\x1b", "\u202e"} & set(shown)
    assert "note: two lines\n" in shown
    assert "load_source" not in shown
    found = json.loads(CliRunner().invoke(app, ["show", str(tmp_path / "own"), "--json"]).stdout)
    assert "load_source" not in found["load"]
    for change in ({"source": 5 * UNTRUSTED}, {"version": UNTRUSTED}, {"groups": [{"name": UNTRUSTED * 9999}]}):
        (tmp_path / "own" / "lbyl.json").write_text(json.dumps(data | {"plan": data["plan"] | change}))
        result = CliRunner().invoke(app, ["show", str(tmp_path / "own")])
        assert "\x1b" not in result.output
        assert len(result.output) < 10_000


@pytest.mark.parametrize(
    "settings", [{"a\nb": 1}, {"restore": {"name": "os.system('x')"}}, {"criterion": {"name": "L2", "x=1)#": 1}}]
)
def test_settings_that_would_be_code_are_damage(settings: dict[str, Any], tmp_path: Path) -> None:
    saved = Path(__file__).with_name("saved_0_1_0") / "own"
    data = json.loads((saved / "lbyl.json").read_text())
    data["plan"]["settings"] |= settings
    with pytest.raises(lbyl.ArtifactError, match="is not a name of a"):
        lbyl.Plan.from_dict(data["plan"])


def test_the_version_is_there() -> None:
    assert lbyl.__version__ == CliRunner().invoke(app, ["--version"]).stdout.split()[1]


def test_a_folder_without_its_weights_says_so(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).with_name("saved_0_1_0") / "own", tmp_path / "own")
    assert "load it with" in CliRunner().invoke(app, ["show", str(tmp_path / "own")]).stdout
    (tmp_path / "own" / "model.safetensors").unlink()
    lacking = CliRunner().invoke(app, ["show", str(tmp_path / "own")])
    assert lacking.exit_code == 0
    assert "model.safetensors is missing, so the folder can't be loaded" in " ".join(lacking.stdout.split())
    assert "load it with" not in lacking.stdout


def test_damaged_and_hidden_images_are_left_out(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("good.png", ".ipynb_checkpoints/good-checkpoint.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    first, second, *others = (tmp_path / "good.png").read_bytes().split(b"IDAT")
    (tmp_path / "bad.png").write_bytes(b"IDAT".join([first, second]) + b"\0\1\2\3" + b"IDAT".join(others))
    assert [file.name for file in files_in(tmp_path, (".png",), "image")] == ["bad.png", "good.png"]
    _, left = read_images(tmp_path, *preprocessing("f.py:net", torch.nn.Identity(), (1, 3, 8, 8), mean=[0], std=[1]))
    assert ["bad.png can't be read as an image" in line for line in left] == [True]
