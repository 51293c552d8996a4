"""Save and load: bit-equal after a round trip, and one clear error for every way a folder can be wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import SAVED, compress, images, mlp, residual
from torch import nn

import lbyl
from lbyl.io import artifact
from lbyl.io.artifact import MANIFEST, WEIGHTS
from lbyl.surgery.plan import Plan
from lbyl.surgery.versions import VERSION

X = images(2, 3, 8, 8)


@pytest.fixture(scope="module")
def result() -> lbyl.Result:
    """What the tests save and load; none of them changes it."""
    return compress(residual(), X, scope="all", ratio={"*": 0.5, "a.*": 0.25})


@pytest.fixture(scope="module")
def saved(result: lbyl.Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result.save(tmp_path_factory.mktemp("saved") / "small")


@pytest.fixture
def folder(tmp_path: Path, saved: Path) -> Path:
    """A copy, for it may be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "small"))


def edit(folder: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def fresh() -> nn.Module:
    model = residual()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)  # nothing of it may show in what is loaded
    return model


def test_a_round_trip_gives_bit_equal_outputs(folder: Path, result: lbyl.Result) -> None:
    model = fresh()
    loaded = lbyl.load(folder, model)
    with torch.no_grad():
        assert torch.equal(loaded(X), result.model(X))
    assert not loaded.training
    assert model.stem[0].out_channels == 8  # not cut in place
    assert float(model.stem[0].weight.detach().mean()) == 0.5
    assert [str(m) for m in loaded.modules()] == [str(m) for m in result.model.modules()]


def test_the_folder_holds_plain_files_and_nothing_lies_beside_it(folder: Path) -> None:
    assert sorted(os.listdir(folder)) == sorted(SAVED)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_tied_weights_survive_the_round_trip(tmp_path: Path) -> None:
    x = images(2, 6)
    model = mlp(6, 10).extend([nn.Linear(3, 3), nn.Linear(3, 3)]).eval()
    model[4].weight = model[3].weight
    result = compress(model, x, ratio={"0": 0.5})
    loaded = lbyl.load(result.save(tmp_path / "tied"), model)
    assert loaded[4].weight is loaded[3].weight
    assert torch.equal(loaded(x), result.model(x))


class Parts(nn.Module):
    """Its buffers are parts of larger tensors: such as a Hann window, which is made with one number more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)
        both, wide = torch.randn(2, 6), torch.randn(4, 12)
        for name, part in {
            "window": torch.hann_window(6),
            "first": both[0],
            "second": both[1],
            "again": both[1],
            "turned": torch.randn(12, 4).T[:2],
            "copies": torch.ones(1).expand(6),
            "whole": wide,
            "row": wide[1],
        }.items():
            self.register_buffer(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.window + self.first - self.second * self.copies * self.again
        return self.b(self.a(x).relu() + self.turned[0] * self.row * self.whole[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_types_are_those_of_the_saved_network(tmp_path: Path, dtype: torch.dtype) -> None:
    x = images(2, 6).to(dtype)
    result = compress(mlp().to(dtype), x, ratio=0.25)
    result.save(tmp_path / "out")
    fresh = mlp()
    loaded = lbyl.load(tmp_path / "out", fresh)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert {p.dtype for p in fresh.parameters()} == {torch.float32}
    assert torch.equal(loaded(x), result.model(x))


def test_parts_of_larger_tensors_are_saved(tmp_path: Path) -> None:
    x, net = images(2, 6), Parts().eval()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in net.named_buffers()}
    for number, ratio in enumerate(({"*": 0.5}, {"b": 0.3, "*": 0.25})):
        result = compress(net, x, ratio=ratio, scope="all")
        loaded = lbyl.load(result.save(tmp_path / f"{number}"), Parts())
        assert torch.equal(loaded(x), result.model(x))
        assert loaded.again.data_ptr() == loaded.second.data_ptr()  # what shared memory still does
        lbyl.save(result.model, tmp_path / f"again {number}")
    assert all(t.data_ptr() == before[n][0] and torch.equal(t, before[n][1]) for n, t in net.named_buffers())


def test_the_plan_is_equal_after_json(result: lbyl.Result) -> None:
    again = Plan.from_json(result.plan.to_json())
    assert again == result.plan
    assert hash(again.cuts) == hash(result.plan.cuts)


def test_the_report_is_equal_after_the_round_trip(folder: Path, result: lbyl.Result) -> None:
    manifest = artifact.read_manifest(folder)
    assert manifest.plan == result.plan
    assert manifest.report == result.report


@pytest.mark.parametrize(
    "restore",
    [lbyl.LBYL(bn=0.1, ridge=0.2, center=True), lbyl.Prune(), lbyl.Merge(threshold=None), lbyl.Coreset()],
    ids=repr,
)
def test_settings_travel_in_the_plan(restore: lbyl.Restorer) -> None:
    plan = compress(residual(), X, restore=restore, criterion="gm", seed=5).plan
    settings = Plan.from_json(plan.to_json()).settings
    assert settings["restore"].pop("name") == type(restore).__name__
    assert type(restore)(**settings["restore"]) == restore
    assert (settings["seed"], settings["ratio"], settings["scope"]) == (5, 0.5, "inner")
    assert settings["criterion"]["name"] == ("Coreset" if isinstance(restore, lbyl.Coreset) else "GeometricMedian")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (mlp(6, 8), "has no 'stem.0.weight'"),
        (nn.Sequential(), "another architecture"),
    ],
    ids=["other", "empty"],
)
def test_another_architecture(folder: Path, other: nn.Module, words: str) -> None:
    with pytest.raises(lbyl.ArtifactError, match=words):
        lbyl.load(folder, other)


def test_other_widths_and_more_layers_are_another_architecture(folder: Path) -> None:
    wider = residual()
    wider.fc = nn.Linear(16, 5)
    with pytest.raises(lbyl.ArtifactError, match=r"fc.weight is 5x16 .* expects 4x16"):
        lbyl.load(folder, wider)
    longer = residual()
    longer.extra = nn.Linear(2, 2)
    with pytest.raises(lbyl.ArtifactError, match="does not know 'extra"):
        lbyl.load(folder, longer)


def test_a_model_that_is_cut_already_is_another_architecture(folder: Path, result: lbyl.Result) -> None:
    with pytest.raises(lbyl.ArtifactError, match="unpruned"):
        lbyl.load(folder, result.model)


def test_truncated_weights(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    for size in (len(data) - 1, len(data) // 2, 4, 0):
        (folder / WEIGHTS).write_bytes(data[:size])
        with pytest.raises(lbyl.ArtifactError, match="truncated"):
            lbyl.load(folder, fresh())


def test_tampered_weights(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(lbyl.ArtifactError, match="SHA-256"):
        lbyl.load(folder, fresh())


def test_weights_of_another_result(folder: Path, tmp_path: Path) -> None:
    """Even with the right digest, tensors that do not fit the plan are refused."""
    other = compress(residual(), X, ratio=0.75, scope="all").save(tmp_path / "other")
    os.replace(other / WEIGHTS, folder / WEIGHTS)
    digest = json.loads((other / MANIFEST).read_text())["sha256"]
    edit(folder, lambda data: data.update(sha256=digest))
    with pytest.raises(lbyl.ArtifactError, match="does not fit its plan"):
        lbyl.load(folder, fresh())


def test_no_folder_is_overwritten(folder: Path, result: lbyl.Result) -> None:
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(lbyl.InputError, match="exists already"):
        result.save(folder)
    assert (folder / MANIFEST).read_bytes() == before
    with pytest.raises(lbyl.InputError, match="exists already"):
        result.save(folder / WEIGHTS)


def test_a_dangling_link_and_a_missing_parent(tmp_path: Path, result: lbyl.Result) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(lbyl.InputError, match="exists already"):
        result.save(tmp_path / "link")
    with pytest.raises(lbyl.InputError, match="create it first"):
        result.save(tmp_path / "missing" / "small")


def test_an_unknown_version(folder: Path) -> None:
    edit(folder, lambda data: data["plan"].update(version=VERSION + 1))
    with pytest.raises(lbyl.ArtifactError, match=rf"version {VERSION + 1} is unknown.*update lbyl"):
        lbyl.load(folder, fresh())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"plan": {}, "report": {}}', "\x00", "[" * 100_000],
    ids=lambda text: repr(text[:20]),
)
def test_a_damaged_manifest(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(lbyl.ArtifactError):
        lbyl.load(folder, fresh())


def test_a_manifest_that_is_no_text(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(lbyl.ArtifactError, match="damaged"):
        lbyl.load(folder, fresh())


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "no groups": lambda data: data["plan"].pop("groups"),
    "groups of another type": lambda data: data["plan"].update(groups=5),
    "text for a number": lambda data: data["plan"]["cuts"][0].update(dim="0"),
    "true for a number": lambda data: data["plan"]["cuts"][0].update(dim=True),
    "index out of range": lambda data: data["plan"]["cuts"][0].update(keep=[0, 10_000]),
    "negative index": lambda data: data["plan"]["cuts"][0].update(keep=[-1]),
    "nothing kept": lambda data: data["plan"]["cuts"][0].update(keep=[]),
    "no blocks": lambda data: data["plan"]["cuts"][0].update(blocks=0),
    "fractional index": lambda data: data["plan"]["cuts"][0].update(keep=[0.5]),
    "foreign parameter": lambda data: data["plan"]["cuts"][0].update(parameter="nobody.weight"),
    "architecture as a list": lambda data: data["plan"].update(architecture=[1]),
    "settings as a number": lambda data: data["plan"].update(settings=3),
    "source as a number": lambda data: data["plan"].update(source=3),
    "report as a list": lambda data: data.update(report=[]),
    "rows with foreign fields": lambda data: data["report"]["rows"][0].update(color="red"),
    "parameters too short": lambda data: data["report"].update(parameters=[1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plan_or_report(folder: Path, damage: str) -> None:
    edit(folder, DAMAGES[damage])
    with pytest.raises(lbyl.ArtifactError):
        lbyl.load(folder, fresh())


PLACES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "type": (
        lambda data: data["plan"]["groups"][1].update(keep="all"),
        r"the plan is damaged: .*\$\.groups\[1\]\.keep",
    ),
    "missing": (lambda data: data["plan"]["cuts"][2].pop("size"), r"the plan is damaged: .*`size`.*\$\.cuts\[2\]"),
    "order": (lambda data: data["plan"]["groups"][0].update(keep=[3, 1]), r"keeps \[3, 1\].*\$\.groups\[0\]\.keep"),
    "scale": (
        lambda data: data["plan"]["cuts"][1].update(scale=-1),
        r"positive number, found -1.*\$\.cuts\[1\]\.scale",
    ),
    "report": (lambda data: data["report"].update(notes=[1]), r"the report is damaged: .*\$\.notes\[0\]"),
    "foreign": (lambda data: data["report"]["rows"][0].update(color="red"), r"unknown field 'color'.*\$\.rows\[0\]"),
}


@pytest.mark.parametrize("damage", PLACES)
def test_damage_is_told_by_its_place(folder: Path, damage: str) -> None:
    change, words = PLACES[damage]
    edit(folder, change)
    with pytest.raises(lbyl.ArtifactError, match=words):
        lbyl.load(folder, fresh())


def test_numbers_that_are_none_come_back(folder: Path) -> None:
    edit(folder, lambda data: data["report"].update(verified=float("nan"), seconds={"cut": float("inf")}))
    report = artifact.read_manifest(folder).report
    assert report.verified is not None
    assert math.isnan(report.verified)
    assert report.seconds == {"cut": math.inf}


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(lbyl.ArtifactError, match="is missing"):
        lbyl.load(folder, fresh())
    with pytest.raises(lbyl.ArtifactError, match="not a folder saved by lbyl"):
        lbyl.load(tmp_path / "nothing", fresh())
    (tmp_path / "empty").mkdir()
    with pytest.raises(lbyl.ArtifactError, match="not a folder saved by lbyl"):
        lbyl.load(tmp_path / "empty", fresh())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("no")])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, result: lbyl.Result, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(model: nn.Module, filename: str, **_: object) -> None:
        Path(filename).write_bytes(b"half")
        raise error

    monkeypatch.setattr(artifact, "save_model", fail)
    expected = lbyl.InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        result.save(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_without_a_source_asks_for_the_model(folder: Path) -> None:
    with pytest.raises(lbyl.InputError, match=r"pass lbyl\.load\(path, model\)"):
        lbyl.load(folder)


def test_a_library_s_model_is_rebuilt_from_the_plan(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    x = images(1, 3, 32, 32)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    result = compress(model, x, source="torchvision:resnet18")
    loaded = lbyl.load(result.save(tmp_path / "resnet"))
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))


def test_a_user_s_code_is_never_run_from_a_plan(tmp_path: Path) -> None:
    code = tmp_path / "factory.py"
    code.write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    result = compress(mlp(6, 8), images(2, 6), source=f"{code}:build")
    with pytest.raises(lbyl.InputError, match=r"pass lbyl\.load"):
        lbyl.load(result.save(tmp_path / "small"))
    assert not (tmp_path / "ran").exists()


class OwnReader(nn.Module):
    """A class that reads states in its own way, and returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())

    def load_state_dict(self, state: Any, strict: bool = True) -> None:  # pyright: ignore
        super().load_state_dict(state, strict=strict)


def test_a_class_with_its_own_way_of_reading_states_is_loaded(tmp_path: Path) -> None:
    result = compress(OwnReader().eval(), images(2, 8))
    loaded = lbyl.load(result.save(tmp_path / "small"), OwnReader())
    torch.testing.assert_close(loaded(images(2, 8)), result.model(images(2, 8)))


def test_an_exported_file_does_not_stand_for_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model.onnx")
    with pytest.raises(lbyl.ArtifactError, match=rf"{WEIGHTS} is missing; model\.onnx beside it was exported"):
        lbyl.load(folder, residual())


def test_a_folder_of_folders_names_those_that_are_meant(result: lbyl.Result, tmp_path: Path) -> None:
    result.save(tmp_path / "point")
    with pytest.raises(lbyl.ArtifactError, match=r"not a folder saved by lbyl.*those in it are .*point"):
        lbyl.load(tmp_path, residual())


def test_whoever_saves_second_is_told_that_the_folder_exists(
    result: lbyl.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_meanwhile(path: Path) -> None:
        (tmp_path / "small").mkdir()
        (tmp_path / "small" / "file").touch()

    monkeypatch.setattr(artifact, "finish", made_meanwhile)
    with pytest.raises(lbyl.InputError, match="something else has made it"):
        result.save(tmp_path / "small")
    assert [file.name for file in (tmp_path / "small").iterdir()] == ["file"]
