"""Export: the written file computes what the PyTorch model computes, for any batch size, or there is none."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import SAVED, Depthwise, compress, flat_convnet, images, mlp, residual, settle
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.io.artifact import CARD, MANIFEST, WEIGHTS, read_manifest
from lbyl.io.comparison import difference
from lbyl.io.report.model_card import card
from lbyl.runtime import registry
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.registry import find

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
FORMATS = ("onnx", "pt2")


class TwoInputs(nn.Module):
    """Two positional inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 10), nn.Linear(4, 10)
        self.out = nn.Linear(10, 3)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        hidden = F.relu(self.left(a) + self.right(b))
        return {"scores": self.out(hidden), "norm": a.norm(dim=1)}


class Tokens(nn.Module):
    """Token ids and keyword inputs, of which one has no batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.out = nn.Embedding(5, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(self.embedding(ids)))).mean(1) * scale


class Stubborn(nn.Module):
    """It knows its batch size by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x))).view(2, -1)


def conv1d() -> nn.Module:
    return settle(
        nn.Sequential(
            nn.Conv1d(2, 8, 5, padding=2, bias=False),
            nn.BatchNorm1d(8),
            nn.GELU(),
            nn.MaxPool1d(2),
            nn.Conv1d(8, 6, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        )
    )


def grouped() -> nn.Module:
    return settle(
        nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.Flatten()
        )
    )


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()


def stubborn() -> nn.Module:
    return settle(Stubborn())


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "convolutions with batch norm": (flat_convnet, images(1, 3, 4, 4), {}),
    "residual streams": (residual, images(2, 3, 8, 8), {"scope": "all"}),
    "depthwise": (lambda: settle(Depthwise()), images(1, 3, 6, 6), {"restore": "prune"}),
    "grouped": (grouped, images(3, 3, 6, 6), {"restore": "prune"}),
    "attention": (vit, images(1, 3, 64, 64), {"ratio": {"blocks.*": 0.34}}),
    "two inputs": (lambda: settle(TwoInputs()), (images(1, 6), images(1, 4)), {"scope": "all"}),
    "1-d convolutions": (conv1d, images(1, 2, 16), {}),
}


def run_file(file: Path, *inputs: Tensor) -> list[Tensor]:
    """The file by itself, without anything of lbyl."""
    if file.suffix == ".pt2":
        with torch.no_grad():
            return output_tensors(torch.export.load(file).module()(*inputs))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feed = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_with_any_batch_size(family: str, tmp_path: Path) -> None:
    make, example, options = FAMILIES[family]
    net = make()
    result = compress(net, example, **options)
    folder = result.save(tmp_path / "small")
    if family == "attention":
        assert any("attn" in group.name for group in result.plan.groups)
    shapes = [x.shape[1:] for x in (example if isinstance(example, tuple) else (example,))]
    for format in FORMATS:
        exported = lbyl.export(folder, net, format=format)
        assert exported.file == folder / f"model.{format}"
        assert (exported.format, exported.dynamic, exported.note) == (format, True, "")
        assert len(exported.batches) >= 2
        assert exported.relative < 1e-5
        for batch in (1, 7):
            inputs = [images(batch, *shape, seed=batch) for shape in shapes]
            with torch.no_grad():
                expected = output_tensors(result.model(*inputs))
            for a, b in zip(expected, run_file(exported.file, *inputs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert sorted(os.listdir(folder)) == sorted([*SAVED, "model.onnx", "model.pt2"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return compress(mlp(6, 8), images(1, 6)).save(tmp_path / "small")


@pytest.mark.parametrize("format", FORMATS)
def test_a_fixed_batch_size_is_never_silent(tmp_path: Path, format: str) -> None:
    folder = compress(stubborn(), images(2, 6)).save(tmp_path / "small")
    exported = lbyl.export(folder, stubborn(), format=format)
    assert (exported.dynamic, exported.batches) == (False, (2,))
    assert exported.note.startswith("fixed batch size: ")
    assert "batch size fixed to 2" in exported.summary()[0]
    assert exported.summary()[-1] == f"note: {exported.note}"
    assert run_file(exported.file, images(2, 6))[0].shape == (2, 4)


def test_a_fixed_batch_size_on_request(folder: Path) -> None:
    exported = lbyl.export(folder, mlp(6, 8), inputs=images(3, 6), dynamic=False)
    assert (exported.dynamic, exported.batches, exported.note) == (False, (3,), "")
    with pytest.raises(Exception, match="invalid dimensions"):
        run_file(exported.file, images(2, 6))


@pytest.mark.parametrize("format", FORMATS)
def test_keyword_inputs_and_token_ids(tmp_path: Path, format: str) -> None:
    net = settle(Tokens())
    example = {"scale": torch.tensor([2.0, -1.0]), "ids": torch.tensor([[0, 1, 4], [2, 2, 1], [3, 0, 0]])}
    folder = compress(net, example).save(tmp_path / "small")
    with pytest.raises(lbyl.InputError, match=r"int64 can't be made up.*inputs="):
        lbyl.export(folder, net, format=format)
    exported = lbyl.export(folder, net, format=format, inputs=example)
    assert (exported.dynamic, exported.batches) == (True, (3, 5, 1))
    assert exported.note == "1 of 2 inputs have no batch axis"


def test_a_file_holds_no_data_and_no_paths(folder: Path) -> None:
    for format in FORMATS:
        file = lbyl.export(folder, mlp(6, 8), format=format).file
        assert b".py" not in file.read_bytes()
    assert torch.export.load(folder / "model.pt2").example_inputs is None


def test_the_batch_axis_has_a_name(folder: Path) -> None:
    file = lbyl.export(folder, mlp(6, 8)).file
    session = onnxruntime.InferenceSession(str(file))
    assert session.get_inputs()[0].shape == ["batch", 6]
    assert session.get_outputs()[0].shape == ["batch", 3]


def test_a_check_that_sees_nothing_says_so(tmp_path: Path) -> None:
    net = mlp(6, 8)
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    folder = compress(net, images(1, 6), restore="prune").save(tmp_path / "small")
    assert lbyl.export(folder, net, format="pt2").note == (
        "all outputs are zero on these inputs, so the check says little"
    )


def test_a_check_on_outputs_that_are_not_finite_says_so(tmp_path: Path) -> None:
    class Endless(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x, torch.full_like(x, torch.inf)])

    exported = lbyl.export(Endless(), to=tmp_path / "net.pt2", inputs=images(2, 6))
    assert "some outputs are not finite on these inputs, so the check says little" in exported.note


def test_a_format_of_the_user_s(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept:
        """It keeps the program in memory; the file only has a word."""

        name, runtime = "mine", "nothing"

        def check_available(self) -> None:
            pass

        def write(self, traced: Any, file: Path) -> None:
            self.module = traced.program.module()
            file.write_text("mine")

        def open(self, file: Path) -> Callable[[ExampleInputs], list[Tensor]]:
            return lambda inputs: output_tensors(inputs.call(self.module))

    monkeypatch.setitem(registry._REGISTERED, "format", {})
    lbyl.register("format", "mine", Kept)
    exported = lbyl.export(folder, mlp(6, 8), format="mine")
    assert exported.file.name == "model.mine"
    assert "checked with nothing" in exported.summary()[1]
    with pytest.raises(lbyl.InputError, match=r"choose 'onnx' or 'pt2' or 'gguf' or 'mine'"):
        lbyl.export(folder, mlp(6, 8), format="other")


def test_an_earlier_export_is_replaced(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"old")
    assert lbyl.export(folder, mlp(6, 8)).file.stat().st_size > 100


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("wrong", ["numbers", "shape", "nan", "count"])
def test_a_file_that_computes_something_else_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, format: str, wrong: str
) -> None:
    kind = find("format", format)
    load = kind.open
    damage: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
        "numbers": lambda found: [found[0] * (1 + 1e-3)],
        "shape": lambda found: [found[0][:1, :1]],
        "nan": lambda found: [found[0] * torch.nan],
        "count": lambda found: found * 2,
    }

    def lie(self: Any, file: Path) -> Any:
        run = load(self, file)
        return lambda inputs: damage[wrong](run(inputs))

    (folder / f"model.{format}").write_bytes(b"an earlier one")
    before = sorted(os.listdir(folder))
    monkeypatch.setattr(kind, "open", lie)
    with pytest.raises(lbyl.ExportError, match="no file was kept"):
        lbyl.export(folder, mlp(6, 8), format=format)
    assert sorted(os.listdir(folder)) == before
    assert (folder / f"model.{format}").read_bytes() == b"an earlier one"


def test_infinities_and_nothing_compare() -> None:
    inf = torch.inf
    assert difference(torch.tensor([inf, torch.nan, 2.0]), torch.tensor([inf, torch.nan, 1.0])) == (1, 0.5)
    assert difference(torch.tensor([inf, 2.0]), torch.tensor([-inf, 2.0]))[0] > 1e300
    assert difference(torch.zeros(0), torch.zeros(0)) == (0, 0)
    assert difference(torch.zeros(2), torch.ones(2)) == (1, 1)


def test_a_model_that_can_not_be_exported(tmp_path: Path) -> None:
    class Undecided(Stubborn):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.first(x))
            return self.second(y) if y.sum() > 0 else -self.second(y)

    net = settle(Undecided())
    plain = compress(stubborn(), images(2, 6)).save(tmp_path / "small")
    for format in FORMATS:
        with pytest.raises(lbyl.ExportError, match=f"Undecided can't be exported as {format}: torch.export can't") as e:
            lbyl.export(plain, net, format=format)
        assert "\n" not in str(e.value)
    assert sorted(os.listdir(plain)) == sorted(SAVED)


def describe_inputs(folder: Path, text: str) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    data["plan"]["inputs"] = text
    (folder / MANIFEST).write_text(json.dumps(data))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "format": ({"format": "tflite"}, lbyl.InputError, r"'tflite'; choose 'onnx' or 'pt2'"),
    "no model": ({"model": None}, lbyl.InputError, r"--model"),
    "another model": ({"model": residual()}, lbyl.ArtifactError, "another architecture"),
    "inputs of another shape": ({"inputs": images(1, 7)}, lbyl.InputError, r"does not run on .* \(float32 1x7\)"),
    "inputs of another kind": ({"inputs": "1x6"}, lbyl.InputError, "example_inputs is a str"),
    "no inputs": ({"inputs": ()}, lbyl.InputError, "no tensor"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls(folder: Path, wrong: str) -> None:
    options, kind, words = WRONG[wrong]
    before = sorted(os.listdir(folder))
    with pytest.raises(kind, match=words) as error:
        lbyl.export(folder, **{"model": mlp(6, 8), **options})
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("float32 1x7", r"does not run on .*--input"),
        ("float32 1x6, float32 1x6", "does not run on"),
        ("int32 1x6", "int32 can't be made up"),
        ("an image", "without shapes"),
        ("float33 1x6", "without shapes"),
        ("nn 1x6", "without shapes"),
        ("", "without shapes"),
        ("float32 100000x100000", "too large"),
    ],
)
def test_inputs_that_the_plan_does_not_give(folder: Path, text: str, words: str) -> None:
    describe_inputs(folder, text)
    with pytest.raises(lbyl.InputError, match=words):
        lbyl.export(folder, mlp(6, 8), format="pt2")


def test_missing_and_broken_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(lbyl.ArtifactError, match="not a folder saved by lbyl"):
        lbyl.export(tmp_path / "nothing", mlp(6, 8))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / MANIFEST).write_text('{"name": "somebody else\'s"}')
    with pytest.raises(lbyl.ArtifactError, match="damaged"):
        lbyl.export(foreign, mlp(6, 8))
    with pytest.raises(lbyl.ArtifactError, match="not a folder saved by lbyl"):
        lbyl.export(folder / WEIGHTS, mlp(6, 8))
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1])
    with pytest.raises(lbyl.ArtifactError, match="truncated"):
        lbyl.export(folder, mlp(6, 8))
    assert sorted(os.listdir(folder)) == sorted(SAVED)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    def full(self: Any, traced: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(find("format", format), "write", full)
    with pytest.raises(lbyl.InputError, match=f"can't write .*model.{format}: No space left"):
        lbyl.export(folder, mlp(6, 8), format=format)
    assert sorted(os.listdir(folder)) == sorted(SAVED)


def test_a_missing_package_is_one_line_with_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(lbyl.InputError, match=r"needs onnxscript.*pip install onnx onnxscript onnxruntime"):
        lbyl.export(folder, mlp(6, 8))
    assert lbyl.export(folder, mlp(6, 8), format="pt2").file.is_file()  # which needs none


# -- the command line ---------------------------------------------------------------------------------------

FACTORY = """
    import torch
    from torch import nn

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x).view(2, 3)

    fixed = Fixed
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    file = tmp_path / "tiny.py"
    file.write_text(textwrap.dedent(FACTORY))
    return f"{file}:net"


def command(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def small(source: str, out: Path, shape: str) -> Path:
    result = command("compress", source, "-o", out, "--input", shape, "--restore", "prune", "--ratio", "0.5")
    assert result.exit_code == 0, result.output
    return out


def test_the_command_writes_checks_and_says_so(source: str, tmp_path: Path) -> None:
    out = small(source, tmp_path / "out", "1x6")
    result = command("export", out, "--model", source)
    assert result.exit_code == 0, result.output
    assert f"{out}/model.onnx: onnx, 0.0 MB, any batch size\nchecked with onnxruntime on batches of 1 and 3" in (
        result.stdout
    )
    result = command("export", out, "--model", source, "--format", "pt2", "--input", "4x6", "--json")
    document = json.loads(result.stdout)
    assert document["file"] == str(out / "model.pt2")
    assert (document["dynamic"], document["batches"], document["relative"] < 1e-6) == (True, [4, 6, 1], True)
    assert document["bytes"] == (out / "model.pt2").stat().st_size
    result = command("export", out, "--model", source, "--format", "pt2", "--fixed-batch")
    assert "batch size fixed to 1" in result.stdout


def test_the_command_says_why_the_batch_is_fixed(source: str, tmp_path: Path) -> None:
    fixed = source.replace(":net", ":fixed")
    result = command("export", small(fixed, tmp_path / "out", "2x6"), "--model", fixed, "--format", "pt2")
    assert result.exit_code == 0, result.output
    assert "note: fixed batch size: " in result.stdout


def test_a_library_s_model_needs_no_model(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    compress(net, images(1, 3, 32, 32), source="torchvision:resnet18", verify=False).save(tmp_path / "out")
    result = command("export", tmp_path / "out", "--format", "pt2")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("TMP/nothing",), 1, "not a folder saved by lbyl"),
        (("OUT",), 1, "tiny.py:net)"),
        (("OUT", "--model", "TMP/tiny.py:nobody"), 1, "has no factory 'nobody'"),
        (("OUT", "--model", "SOURCE", "--input", "1x7"), 1, "does not run on the example inputs (float32 1x7)"),
        (("OUT", "--model", "torchvision:resnet18"), 1, "another architecture"),
        (("OUT", "--format", "tflite"), 2, "tflite"),
        (("OUT", "--input", "large"), 2, "large"),
        ((), 2, "DIR"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_have_one_line_and_the_right_code(
    source: str, tmp_path: Path, args: tuple[str, ...], code: int, words: str
) -> None:
    out = small(source, tmp_path / "out", "1x6")
    names = {"OUT": str(out), "SOURCE": source}
    result = command("export", *(names.get(arg, arg).replace("TMP", str(tmp_path)) for arg in args), "--quiet")
    assert (result.exit_code, result.stdout) == (code, "")
    assert words in result.stderr
    if code == 1:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert sorted(os.listdir(out)) == sorted(SAVED)


# -- the model card -----------------------------------------------------------------------------------------


def test_the_card_says_what_was_cut_and_how_to_load_it(tmp_path: Path) -> None:
    result = compress(residual(), images(2, 3, 8, 8), scope="all", source=f"{tmp_path}/nets.py:residual")
    folder = result.save(tmp_path / "small")
    text = (folder / CARD).read_text(encoding="utf-8")
    manifest = read_manifest(folder)
    assert text == card(manifest.plan, manifest.report)
    head = text.split("---\n")[1]
    assert "library_name: lbyl\ntags:\n- pruned\n- lbyl\n" in head
    assert 'base_model_source: "nets.py:residual"' in head
    assert str(tmp_path) not in text
    before, after = result.report.parameters
    assert f"| parameters | {before:,} | {after:,} | {after / before:.1%} |" in text
    assert "| MACs on float32 2x3x8x8 |" in text
    for row in result.report.rows:
        assert f"| `{row.group}` | {row.before} → {row.after} |" in text
    assert 'lbyl.load("path/to/this/folder", fresh)' in text
    assert "What was lost is not known." in text


def test_the_card_of_a_library_s_model(tmp_path: Path) -> None:
    plan = compress(mlp(6, 8), images(1, 6), source="timm:mlp.in1k").plan
    report = lbyl.Report((), (("a|b", "two\nlines"),), (), (10, 5), None, None, {}, ("a\nnote",))
    text = card(plan, report)
    assert 'lbyl.load("path/to/this/folder")' in text
    assert "- `a|b`: two lines" in text
    assert "Note: a note" in text
    assert "not verified" in text


@pytest.mark.parametrize(
    "options",
    [
        {"restore": "lbyl", "ratio": {"0": 0.25}},
        {"restore": "coreset", "seed": 3},
        {"restore": lbyl.LeastSquares(moments=lbyl.Gaussian(), solve="mix"), "criterion": "gm"},
        {"restore": lbyl.LeastSquares(moments=lbyl.Data([images(16, 6), images(16, 6, seed=2)], batches=2))},
        {"restore": "lbyl", "budget": lbyl.Budget(params=0.759, exclude=("4",))},
    ],
    ids=["ratios", "coreset", "gaussian", "data", "budget"],
)
def test_the_code_in_the_card_makes_the_same_network(options: dict[str, Any]) -> None:
    net, x = mlp(6, 8), images(1, 6)
    asked = options if "budget" in options else {"ratio": 0.5, **options}
    result = lbyl.compress(net, x, **asked)
    code = re.findall(r"```python\n(.*?)```", card(result.plan, result.report), re.DOTALL)[1]
    names = {"net": net, "data": [images(16, 6), images(16, 6, seed=2)]}
    exec(code.replace("model = ...", "model = net").replace("batches = ...", "batches = data"), names)
    again: Any = names["result"]
    assert again.plan == result.plan
    with torch.no_grad():
        assert torch.equal(again.model(x), result.model(x))
