"""Wrong calls, from the command line and from Python: one clear error each, and nothing changes."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import HardCoded, flat_convnet, images, mlp, residual
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.io.artifact import CARD, MANIFEST, WEIGHTS
from lbyl.io.sources import load_source, load_weights

FACTORY = """
    import torch
    from torch import nn

    def net():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
        )

    class Undecided(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            y = self.body(x)
            return y if y.sum() > 0 else -y

    undecided = Undecided
    number = lambda: 3
    broken = lambda: 1 / 0
    wider = lambda: nn.Sequential(*net()[:-1], nn.Linear(6, 5))

    def quits():
        raise SystemExit(0)
"""
COMPRESS = "compress net.py:net -o out --input 1x3x12x12 --restore prune"
"""A call that works, but for what a row adds."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, weights, images and a network that was saved."""
    place = tmp_path_factory.mktemp("template")
    (place / "net.py").write_text(textwrap.dedent(FACTORY))
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    net = load_source(f"{place / 'net.py'}:net")
    sys.dont_write_bytecode = bytecode
    lbyl.compress(net, images(1, 3, 12, 12), restore="prune", source="net.py:net", ratio=0.5).save(place / "saved")
    save_file(net.state_dict(), place / "good.safetensors")
    (place / "photos").mkdir()
    Image.new("RGB", (16, 16), "red").save(place / "photos" / "a.png")
    (place / "empty").mkdir()
    return place


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to stand in."""
    shutil.copytree(template, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "here")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path / "here"


def tree(place: Path) -> dict[str, str]:
    """Every name below a folder, with what it is and what it holds."""

    def content(path: Path) -> str:
        if path.is_symlink():
            return f"link to {os.readlink(path)}"
        if path.is_dir():
            return "folder"
        if path.stat().st_size > 2**20:
            return f"{path.stat().st_size} bytes"
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return {str(path.relative_to(place)): content(path) for path in sorted(place.rglob("*"))}


# -- ways to spoil files ---------------------------------------------------------------------------------------


class Hostile:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("owned"),)


def hostile(place: Path) -> None:
    (place / "bad.pth").write_bytes(pickle.dumps({"0.weight": Hostile()}))


def hostile_zip(place: Path) -> None:
    torch.save({"0.weight": Hostile()}, place / "bad.pth")


def lying_header(place: Path, end: int = 2**40, length: int | None = None) -> None:
    header = json.dumps({"0.weight": {"dtype": "F32", "shape": [end // 4], "data_offsets": [0, end]}}).encode()
    (place / "bad.safetensors").write_bytes(struct.pack("<Q", length or len(header)) + header + b"\0" * 64)


def state(place: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(place / "good.safetensors")
    change(tensors)
    save_file(tensors, place / "bad.safetensors")


def put(name: str, data: str | bytes) -> Callable[[Path], None]:
    return lambda place: (place / name).write_bytes(data.encode() if isinstance(data, str) else data) and None


def cut_short(name: str, by: int = 1) -> Callable[[Path], None]:
    return lambda place: os.truncate(place / name, (place / name).stat().st_size - by)


def bomb(place: Path) -> None:
    """2 GB of JSON that take no room on the disk."""
    os.truncate(place / "saved" / MANIFEST, 2 * 10**9)


def manifest(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        file = place / "saved" / MANIFEST
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return edit


def plan(**changes: Any) -> Callable[[Path], None]:
    return manifest(lambda data: data["plan"].update(changes))


def cut(number: int = 0, **changes: Any) -> Callable[[Path], None]:
    return manifest(lambda data: data["plan"]["cuts"][number].update(changes))


def attribute(**changes: Any) -> Callable[[Path], None]:
    item = {"module": "0", "name": "out_channels", "place": None, "old": 8, "new": 4, **changes}
    return plan(attributes=[item])


# -- the command line ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A wrong call, what must be said about it, and how the program must end."""

    name: str
    call: str
    says: tuple[str, ...]
    code: int = 1
    prepare: Callable[[Path], Any] = lambda place: None


def usage(name: str, call: str, *says: str) -> Row:
    return Row(name, call, says, 2)


CLI = [
    usage("no output", "compress net.py:net", "--output"),
    usage("no such command", "shrink net.py:net", "shrink"),
    usage("no such option", f"{COMPRESS} --fast", "--fast"),
    usage("criterion", f"{COMPRESS} --criterion l3", "l3", "gm"),
    usage("restorer", f"{COMPRESS} --restore magic", "magic", "merge"),
    usage("scope", f"{COMPRESS} --scope outer", "outer", "inner"),
    usage("format", "export saved --format tflite", "tflite", "onnx"),
    usage("ratio of one", f"{COMPRESS} --ratio 1", "at least 0 and below 1"),
    usage("negative ratio", f"{COMPRESS} --ratio -0.5", "-0.5"),
    usage("ratio of NaN", f"{COMPRESS} --ratio nan", "at least 0 and below 1"),
    usage("ratio in words", f"{COMPRESS} --ratio half", "'half' is not a number"),
    usage("two ratios", f"{COMPRESS} --ratio 0.3 --ratio 0.5", "two ratios"),
    usage("shape in words", "inspect net.py:net --input big", "'big' is not a shape"),
    usage("a size of zero", "inspect net.py:net --input 0x3x8x8", "is not a shape"),
    usage("dtype", "inspect net.py:net --input int7:1x3", "'int7' is not a dtype"),
    usage("budget of nothing known", f"{COMPRESS} --budget speed=2", "macs=0.5"),
    usage("budget and ratio", f"{COMPRESS} --budget macs=0.5 --ratio 0.5", "give only one of them"),
    usage("a multiple of zero", f"{COMPRESS} --budget macs=0.5 --round-to 0", "whole number from 1"),
    usage("negative ridge", f"{COMPRESS} --ridge -1", "greater than or equal to 0"),
    usage("moments of no data", f"{COMPRESS} --restore auto --moments data", "--data FOLDER"),
    usage("a divisor of zero", f"{COMPRESS} --restore auto --data photos --std 0", "must be above 0"),
    usage("no colon", "inspect resnet", "'resnet' names no model", "timm:NAME"),
    usage("no colon, compressed", "compress resnet -o out", "'resnet' names no model", "timm:NAME"),
    usage("no colon, another", "bench saved --against resnet", "'resnet' names no model"),
    usage("no colon, exported", "export saved --model resnet", "'resnet' names no model"),
    Row("timm's name", "inspect timm:resnet-fifty", ("no model 'resnet-fifty'", "list_models")),
    Row("torchvision's name", "inspect torchvision:vgg", ("no model 'vgg'", "list_models")),
    Row("no file", "inspect nowhere.py:net", ("no file nowhere.py",)),
    Row("no module", "inspect nowhere.models:net", ("nowhere.models can't be imported", "file.py:factory")),
    Row("relative module", "inspect ..models:net", ("..models can't be imported", "file.py:factory")),
    Row("no factory", "inspect net.py:nett", ("net.py has no factory 'nett'",)),
    Row("factory that fails", "inspect net.py:broken", ("broken() failed", "ZeroDivisionError")),
    Row("factory that quits", "inspect net.py:quits", ("quits() failed", "SystemExit")),
    Row("factory of a number", "inspect net.py:number", ("returned an int", "torch.nn.Module")),
    Row("source with an error", "inspect bad.py:net", ("bad.py can't be run", "SyntaxError"), 1, put("bad.py", "def")),
    Row("module with an error", "inspect bad:net", ("bad can't be imported", "SyntaxError"), 1, put("bad.py", "def")),
    Row("binary source", "inspect bad.py:net", ("bad.py can't be run",), 1, put("bad.py", b"\0\xff\xfe")),
    Row("source that quits", "inspect bad.py:net", ("bad.py can't be run",), 1, put("bad.py", "raise SystemExit")),
    Row("no weights", f"{COMPRESS} --weights nowhere.pth", ("no weights at nowhere.pth",)),
    Row("weights in a folder", f"{COMPRESS} --weights photos", ("no weights at photos",)),
    Row("hostile pickle", f"{COMPRESS} --weights bad.pth", ("weights_only=True", ".safetensors"), 1, hostile),
    Row("hostile zip", f"{COMPRESS} --weights bad.pth", ("bad.pth", "weights_only=True"), 1, hostile_zip),
    Row("text for weights", f"{COMPRESS} --weights net.py", ("net.py", "weights_only=True")),
    Row("lying header", f"{COMPRESS} --weights bad.safetensors", ("not a readable safetensors",), 1, lying_header),
    Row(
        "endless header", f"{COMPRESS} --weights bad.safetensors", ("not a readable safetensors",), 1,
        partial(lying_header, length=2**62),
    ),
    Row(
        "weights cut short", f"{COMPRESS} --weights good.safetensors", ("good.safetensors",), 1,
        cut_short("good.safetensors"),
    ),
    Row(
        "NaN in the weights", f"{COMPRESS} --weights bad.safetensors", ("2.weight holds NaN",), 1,
        partial(state, change=lambda tensors: tensors["2.weight"].fill_(torch.nan)),
    ),
    Row(
        "a tensor too few", f"{COMPRESS} --weights bad.safetensors", ("does not fit Sequential", "6.bias"), 1,
        partial(state, change=lambda tensors: tensors.pop("6.bias")),
    ),
    Row(
        "a tensor too large", f"{COMPRESS} --weights bad.safetensors", ("does not fit Sequential", "6.bias"), 1,
        partial(state, change=lambda tensors: tensors.update({"6.bias": torch.ones(5)})),
    ),
    Row("folder that exists", f"{COMPRESS} -o saved", ("saved exists already", "choose another")),
    Row("file that exists", f"{COMPRESS} -o net.py", ("net.py exists already",)),
    Row(
        "link to nowhere", f"{COMPRESS} -o link", ("link exists already",), 1,
        lambda place: (place / "link").symlink_to("nowhere"),
    ),
    Row("no parent", f"{COMPRESS} -o a/b", ("a is not a folder", "create it first")),
    Row("file for a parent", f"{COMPRESS} -o net.py/out", ("net.py",)),
    Row("a long name", f"{COMPRESS} -o {'a' * 300}", ("aaa", "File name too long")),
    Row("no memory", "inspect net.py:net --input 1x3x99999999x99999999", ("no memory for inputs of 1x3x99999999x",)),
    Row("no input", "inspect net.py:net", ("has no default input", "--input 1x3x224x224")),
    Row("channels", "inspect net.py:net --input 1x4x12x12", ("can't trace", "Check that the model runs")),
    Row("tokens for pixels", "inspect net.py:net --input int64:1x3x12x12", ("can't trace", "int")),
    Row("too many inputs", "inspect net.py:net --input 1x3x9x9 --input 1x3", ("can't trace",)),
    Row("unreachable budget", f"{COMPRESS} --budget macs=0.001", ("can't be reached",)),
    Row("budget above one", f"{COMPRESS} --budget macs=2", ("macs=2", "not above 1"), 2),
    Row("budget of NaN", f"{COMPRESS} --budget macs=nan", ("macs=nan", "not above 1"), 2),
    Row("least of all widths", f"{COMPRESS} --budget macs=0.5 --min-keep 99", ("can't be reached", "min_keep")),
    Row("pattern of no group", f"{COMPRESS} --ratio nobody*=0.5", ("'nobody*' matches no group", "inspect")),
    Row("nothing to drop", f"{COMPRESS} --ratio 0", ("no group can be pruned", "ratio 0")),
    Row("no submodule", f"{COMPRESS} --submodule head", ("'head'",)),
    Row("strict", f"{COMPRESS.replace(':net', ':undecided')} --strict", ("can't trace Undecided",)),
    Row("no photos", f"{COMPRESS} --restore auto --data nowhere", ("nowhere is not a folder of images",)),
    Row("empty folder", f"{COMPRESS} --restore auto --data empty", ("no image in empty", ".jpg")),
    Row(
        "broken photo", f"{COMPRESS} --restore auto --data photos", ("a.png can't be read as an image",), 1,
        put("photos/a.png", b"\x89PNG nothing"),
    ),
    Row(
        "photo cut short", f"{COMPRESS} --restore auto --data photos", ("a.png can't be read",), 1,
        cut_short("photos/a.png", 40),
    ),
    Row("show nothing", "show nowhere", ("nowhere is not a folder saved by lbyl", "lbyl.json")),
    Row("show a foreign folder", "show photos", ("photos is not a folder saved by lbyl",)),
    Row("a bomb of JSON", "show saved", ("larger than 8 MiB",), 1, bomb),
    Row("deep JSON", "show saved", ("damaged",), 1, put(f"saved/{MANIFEST}", "[" * 200_000)),
    Row("half JSON", "show saved", ("damaged",), 1, cut_short(f"saved/{MANIFEST}")),
    Row("a number too long", "show saved", ("damaged",), 1, put(f"saved/{MANIFEST}", "9" * 10_000)),
    Row("no text", "show saved", ("damaged",), 1, put(f"saved/{MANIFEST}", b"\xff\xfe\x00")),
    Row("unknown version", "show saved", ("version 99 is unknown", "update lbyl"), 1, plan(version=99)),
    Row(
        "words for seconds", "show saved", ("report is damaged",), 1,
        manifest(lambda data: data["report"].update(seconds={"cut": "long"})),
    ),
    Row(
        "words for channels", "show saved", ("report is damaged",), 1,
        manifest(lambda data: data["report"]["rows"][0].update(re="much", before="many")),
    ),
    Row("export nothing", "export nowhere", ("nowhere is not a folder saved by lbyl",)),
    Row("export without a model", "export saved", ("does not know how to build", "--model")),
    Row("export of another", "export saved --model net.py:wider", ("another architecture", "6.weight is 5x6", "4x6")),
    Row(
        "export of cut weights", "export saved --model net.py:net", ("SHA-256", "truncated or changed"), 1,
        cut_short(f"saved/{WEIGHTS}"),
    ),
    Row(
        "export of no weights", "export saved --model net.py:net", (f"{WEIGHTS} is missing",), 1,
        lambda place: (place / "saved" / WEIGHTS).unlink(),
    ),
    Row(
        "export over a folder", "export saved --model net.py:net --format pt2", ("model.pt2",), 1,
        lambda place: (place / "saved" / "model.pt2").mkdir(),
    ),
    Row("export on other sizes", "export saved --model net.py:net --input 1x4x9x9 --format pt2", ("1x4x9x9",)),
]  # fmt: skip


@pytest.mark.parametrize("row", CLI, ids=lambda row: row.name)
def test_command_line(row: Row, place: Path) -> None:
    row.prepare(place)
    before = tree(place)
    with warnings.catch_warnings(record=True) as warned:  # outside of tests they are lines on stderr
        warnings.simplefilter("default")
        result = CliRunner().invoke(app, [*shlex.split(row.call), *(["--quiet"] if row.code == 1 else [])])
    assert not [w for w in warned if issubclass(w.category, (UserWarning, RuntimeWarning))], warned[0].message
    said = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == row.code, (said, result.exception)
    assert isinstance(result.exception, SystemExit), said  # and no traceback
    for words in row.says:
        assert words in said
    if row.code == 1:
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
    assert result.stdout == ""
    assert tree(place) == before


# -- Python ----------------------------------------------------------------------------------------------------

X = images(2, 3, 8, 8)


class Fails(nn.Module):
    """Runs on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("never ready")


@dataclass(frozen=True)
class Call:
    """A wrong call from Python on a network, what is raised, and what it must say."""

    name: str
    call: Callable[[Any], Any]
    error: type[lbyl.LbylError]
    says: tuple[str, ...]
    net: Callable[[], Any] = residual
    prepare: Callable[[Path], Any] = lambda place: None


def compress(name: str, *says: str, net: Callable[[], Any] = residual, x: Any = X, **settings: Any) -> Call:
    error = settings.pop("error", lbyl.InputError)
    return Call(
        name,
        lambda net: lbyl.compress(
            net, x, **{"restore": "prune", "ratio": None if "budget" in settings else 0.5, **settings}
        ),
        error,
        says,
        net,
    )


def budget(name: str, *says: str, **settings: Any) -> Call:
    return Call(name, lambda net: lbyl.Budget(**settings), lbyl.InputError, says)


def load(name: str, prepare: Callable[[Path], Any], *says: str) -> Call:
    return Call(
        name, lambda net: lbyl.load("saved", net), lbyl.ArtifactError, says, lambda: load_source("net.py:net"), prepare
    )


def spoiled(value: float) -> nn.Module:
    net = residual()
    with torch.no_grad():
        net.b.conv1.weight[0, 0, 0, 0] = value
    return net


PYTHON = [
    compress("text for inputs", "example_inputs is a str", "pass a tensor", x="1x3x8x8"),
    compress("no inputs", "holds no tensor", x=()),
    compress("inputs of other sizes", "can't trace", "Check that", x=images(2, 4, 8, 8), error=lbyl.TraceError),
    compress("whole numbers for pixels", "can't trace", x=X.long(), error=lbyl.TraceError),
    compress("a function for a model", "torch.nn.Module", net=lambda: torch.relu),
    compress("a class for a model", "torch.nn.Module", net=lambda: nn.Identity),
    compress("an empty model", "no group can be pruned", net=nn.Sequential),
    compress("nothing to cut", "no group can be pruned", net=nn.ReLU),
    compress("one layer", "no group can be pruned", "output", net=lambda: nn.Conv2d(3, 4, 1)),
    compress("a model that fails", "can't trace Fails", "never ready", net=Fails, error=lbyl.TraceError),
    compress("on the meta device", "meta", net=lambda: residual().to("meta"), x=X.to("meta")),
    compress("NaN in a weight", "b.conv1.weight holds NaN", net=lambda: spoiled(torch.nan)),
    compress("infinity in a weight", "b.conv1.weight holds NaN or infinity", net=lambda: spoiled(torch.inf)),
    compress("ratio of one", "ratio=1.0", "below 1", ratio=1.0),
    compress("negative ratio", "-0.1", ratio=-0.1),
    compress("ratio of NaN", "nan", ratio=float("nan")),
    compress("ratio in words", "half", ratio="half"),
    compress("ratio for no group", "'nobody*' matches no group", ratio={"nobody*": 0.5}),
    compress("ratio above one for a group", "1.5", ratio={"a.*": 1.5}),
    compress("budget and ratio", "budget", ratio=0.5, budget=lbyl.Budget(macs=0.5)),
    compress("unreachable budget", "can't be reached", budget=lbyl.Budget(macs=0.01)),
    compress("unreachable size", "can't be reached", budget=lbyl.Budget(size_mb=1e-6)),
    budget("budget of nothing", "exactly one of"),
    budget("two budgets", "macs, params", macs=0.5, params=0.5),
    budget("budget above one", "above 1", macs=1.5),
    budget("multiple of nothing", "whole number", macs=0.5, round_to=0),
    compress("scope", "outer", "inner", scope="outer"),
    compress("criterion", "l3", "l2", criterion="l3"),
    compress("criterion of no kind", "criterion", criterion=3),
    compress("restorer", "magic", "merge", restore="magic"),
    compress("a class for a restorer", "restore", restore=lbyl.Prune),
    compress("no submodule", "'head'", submodule="head"),
    compress(
        "data of other sizes", "2x4x8x8", "like the example inputs",
        restore=lbyl.LeastSquares(moments=lbyl.Data([images(2, 4, 8, 8)])),
    ),
    compress("no data", "Data", restore=lbyl.LeastSquares(moments=lbyl.Data([]))),
    compress(
        "widths by heart, strictly", net=HardCoded, x=images(2, 6), strict=True, error=lbyl.VerificationError
    ),
    Call("inspect on text", lambda net: lbyl.inspect(net, "x"), lbyl.InputError, ("example_inputs is a str",)),
    Call("load nothing", lambda net: lbyl.load("nowhere", net), lbyl.ArtifactError, ("nowhere", "lbyl.json")),
    Call("load into another", lambda net: lbyl.load("saved", net), lbyl.ArtifactError, ("another architecture",), mlp),
    Call("load without a model", lambda net: lbyl.load("saved"), lbyl.InputError, ("pass lbyl.load(path, model)",)),
    Call("weights of a list", lambda net: load_weights(net, "list.pth"), lbyl.InputError, ("holds no state dict",),
         prepare=lambda place: torch.save([torch.ones(2)], place / "list.pth")),
    Call("weights named by numbers", lambda net: load_weights(net, "list.pth"), lbyl.InputError, ("no state dict",),
         prepare=lambda place: torch.save({0: torch.ones(2)}, place / "list.pth")),
    Call("export as nothing known", lambda net: lbyl.export("saved", net, format="x"), lbyl.InputError, ("'onnx'",)),
    load("index out of range", cut(keep=[0, 99]), "0.weight", "rise within 0..7"),
    load("negative index", cut(keep=[-1, 2]), "rise within"),
    load("indices twice", cut(keep=[1, 1]), "rise within"),
    load("indices out of order", cut(keep=[2, 1]), "rise within"),
    load("nothing kept", cut(keep=[]), "not be empty"),
    load("another size", cut(size=9, keep=[0, 8]), "0.weight", "expects 9 channels"),
    load("another dimension", cut(dim=7), "dimension 7"),
    load("negative dimension", cut(dim=-1), "dimension -1"),
    load("no blocks", cut(blocks=0), "0.weight"),
    load("blocks that do not divide", cut(2, blocks=3, size=25, keep=[0, 24]), "2.weight"),
    load("a parameter that is not there", cut(parameter="9.weight"), "no parameter or buffer '9.weight'"),
    load("path for a parameter", cut(parameter="../../net.py"), "../../net.py"),
    load("a cut twice", manifest(lambda data: data["plan"]["cuts"].append(data["plan"]["cuts"][0])), "twice"),
    load("a group kept beyond its width", manifest(lambda data: data["plan"]["groups"][0].update(keep=[7, 99])), "99"),
    load("an attribute that is not there", attribute(name="widths"), "no attribute 'widths'"),
    load("an attribute of another value", attribute(name="out_channels", old=7, new=5), "out_channels"),
    load("an attribute of Python's", attribute(name="__class__"), "__class__"),
    load("an attribute of PyTorch's", attribute(name="_version", old=1, new=0), "_version"),
    load("an attribute that grows", attribute(new=10**9), "out_channels"),
    load("a place that is not there", attribute(name="kernel_size", place=-5, old=3, new=1), "kernel_size"),
    load("a module that is not there", attribute(module="nobody"), "nobody"),
    load("a layer in place of the model", plan(folds=[{"module": "", "op": "linear", "arguments": {}}]), "linear"),
    load("a layer of no kind", plan(folds=[{"module": "0", "op": "system", "arguments": {}}]), "system"),
    load("a layer that computes nothing", plan(folds=[{"module": "0", "op": "itself", "arguments": {}}]), "computes"),
    load(
        "a layer that fills the memory",
        plan(folds=[{"module": "0", "op": "linear", "arguments": {"in_features": 10**9, "out_features": 10**9}}]),
        "linear",
    ),
    load("weights cut short", cut_short(f"saved/{WEIGHTS}"), "SHA-256", "truncated"),
    load("another digest", manifest(lambda data: data.update(sha256="0" * 64)), "SHA-256"),
    load("another version", plan(version="1; drop"), "is unknown"),
    load("text for sizes", plan(architecture={"0.weight": "8x3"}), "damaged"),
    load("nothing in the plan", manifest(lambda data: data.update(plan={})), "no version"),
    Call(
        "code in the source of a plan", lambda net: lbyl.load("saved"), lbyl.InputError, ("pass lbyl.load(path, ",),
        prepare=lambda place: (
            plan(source="timm:evil.py:run")(place),
            put("timm:evil.py", "open('owned', 'w')\ndef run(): pass")(place),
        ),
    ),
    Call(
        "a path in the source of a plan", lambda net: lbyl.load("saved"), lbyl.InputError, ("no model '../../evil'",),
        prepare=plan(source="timm:../../evil"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("row", PYTHON, ids=lambda row: row.name)
def test_python(row: Call, place: Path) -> None:
    row.prepare(place)
    net, before = row.net(), tree(place)
    state = {name: t.clone() for name, t in net.state_dict().items()} if isinstance(net, nn.Module) else {}
    with pytest.raises(row.error) as caught:
        row.call(net)
    for words in row.says:
        assert words in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert tree(place) == before
    for name, tensor in state.items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)


# -- writes that fail ------------------------------------------------------------------------------------------


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond a size: what a full disk or a quota looks like."""
    import resource  # there is none on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def result() -> lbyl.Result:
    return lbyl.compress(flat_convnet(), images(1, 3, 4, 4), restore="prune", ratio=0.5, forecast=False)


@pytest.mark.posix
@pytest.mark.parametrize("size", [0, 100, 3000])
def test_no_room_for_the_weights(size: int, result: lbyl.Result, tmp_path: Path) -> None:
    with small_files(size), pytest.raises(lbyl.InputError, match=r"can't write .*small"):
        result.save(tmp_path / "small")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
def test_no_place_to_write(code: int, result: lbyl.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(lbyl.InputError, match=os.strerror(code)):
        result.save(tmp_path / "small")
    assert tree(tmp_path) == {}


@dataclass
class Files:
    """Calls an action at the n-th time that a file within a folder is opened, or one is renamed; keeps their names."""

    folder: Path
    at: int
    action: Callable[[], Any]
    names: list[str] = field(default_factory=list)

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(file: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, str | Path) and self.folder in Path(file).parents:
                self.names.append(Path(file).name)
                if len(self.names) == self.at:
                    self.action()
            return call(file, *args, **kwargs)

        return counted

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module, name in ((io, "open"), (os, "rename"), (os, "replace")):
            monkeypatch.setattr(module, name, self.watched(getattr(module, name)))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")], ids=repr)
def test_an_interruption_leaves_nothing(
    error: BaseException, result: lbyl.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the weights are collected, at each file, and before the folder gets its name."""

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise error

    def save_interrupted() -> None:
        with pytest.raises(lbyl.InputError if isinstance(error, OSError) else KeyboardInterrupt):
            result.save(tmp_path / "small")
        assert tree(tmp_path) == {}

    with result.model.register_state_dict_pre_hook(stop):
        save_interrupted()
    stopped: list[str] = []
    while not stopped or stopped[-1] != "content":  # the folder itself
        files = Files(tmp_path, len(stopped) + 1, stop)
        with monkeypatch.context() as patch:
            files.watch(patch)
            save_interrupted()
        stopped.append(files.names[-1])
    assert {MANIFEST, CARD, "report.html", "report.json"} <= set(stopped)
    assert result.save(tmp_path / "small").is_dir()


@pytest.mark.posix
def test_a_killed_write_leaves_no_folder_of_that_name(
    result: lbyl.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = os.fork()
    if child == 0:
        Files(tmp_path, 2, lambda: os.kill(os.getpid(), signal.SIGKILL)).watch(monkeypatch)
        result.save(tmp_path / "small")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "small").exists()
    result.save(tmp_path / "small")  # what is left of the other one is not in the way
    assert lbyl.load(tmp_path / "small", flat_convnet())


@pytest.mark.posix
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_an_export_without_room_leaves_the_folder_as_it_was(format: str, place: Path) -> None:
    before = tree(place)
    with small_files(1000), pytest.raises(lbyl.InputError, match=rf"can't write .*model\.{format}"):
        lbyl.export("saved", load_source("net.py:net"), format=format)
    assert tree(place) == before


@pytest.mark.parametrize("wrapped", [lambda batch: batch, lambda batch: (batch,), lambda batch: {"input": batch}])
def test_an_object_that_holds_the_tensors_is_refused_with_the_way_out(wrapped: Callable[[object], object]) -> None:
    class Batch:
        def __init__(self) -> None:
            self.x = torch.randn(2, 6)

    given: Any = wrapped(Batch())
    with pytest.raises(lbyl.InputError, match="only inside of a Batch; wrap the model in a module that takes these"):
        lbyl.compress(mlp(6, 8), given, ratio=0.5, restore="prune", forecast=False)
