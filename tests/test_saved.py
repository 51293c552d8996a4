"""Folders that lbyl 0.1.0 saved can be loaded, shown and made again: `saved_0_1_0/`, without the `report.html`.

What was in them then is in `saved_0_1_0.json`. `own` is the network of `saved_network.py` beside it, by least squares:
a plan with all that a plan can speak of. `squeezenet` is torchvision's, with random weights and by the weights alone.
`saved_first/` is of the very first plans, which had cuts and nothing else.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.surgery.versions import VERSION, upgraded

FOLDERS = Path(__file__).with_name("saved_0_1_0")
KNOWN: dict[str, Any] = json.loads(FOLDERS.with_suffix(".json").read_text(encoding="utf-8"))


def image(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).mul(0.37).sin().float().reshape(shape)


def fresh(name: str) -> nn.Module:
    from lbyl.sources import load_source  # where it was in 0.1.0: saved folders and their cards say so

    source = {"own": f"{FOLDERS / 'own' / 'saved_network.py'}:network", "squeezenet": "torchvision:squeezenet1_1"}
    return load_source(source[name], pretrained=False)


def check(name: str, net: nn.Module) -> None:
    known = KNOWN[name]
    assert {key: list(tensor.shape) for key, tensor in net.state_dict().items()} == known["shapes"]
    assert not net.training
    with torch.no_grad():
        output = net(image(*known["input"]))
    torch.testing.assert_close(
        output[:, : len(known["output"][0])], torch.tensor(known["output"]), rtol=1e-4, atol=1e-5
    )
    assert float(output.norm()) == pytest.approx(known["norm"], rel=1e-4)


def without_load(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in ("path", "load")}


@pytest.mark.parametrize("name", KNOWN)
def test_a_folder_is_loaded_into_a_fresh_network(name: str) -> None:
    net = fresh(name)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    check(name, lbyl.load(FOLDERS / name, model=net))
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_a_folder_is_loaded_by_its_source() -> None:
    check("squeezenet", lbyl.load(FOLDERS / "squeezenet"))
    with pytest.raises(lbyl.InputError, match=r"pass lbyl\.load\(path, model\)"):
        lbyl.load(FOLDERS / "own")  # a user's code is not run unasked


@pytest.mark.parametrize("name", KNOWN)
def test_the_line_that_the_report_has_for_loading_works(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDERS / name)
    found: dict[str, Any] = {}
    exec(json.loads(Path("report.json").read_text(encoding="utf-8"))["load"], found)
    check(name, found["net"])


def test_the_code_of_the_card_makes_such_a_network_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDERS / "own")
    code = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)[-1]
    assert "from lbyl.sources import load_source" in code
    found: dict[str, Any] = {}
    exec(code, found)
    shapes = {key: list(tensor.shape) for key, tensor in found["result"].model.state_dict().items()}
    assert shapes == KNOWN["own"]["shapes"]


LATER = {"trained": False, "network": "", "blocks": [], "version": VERSION}
"""What later versions write into plans as well, or in its place."""


@pytest.mark.parametrize("name", KNOWN)
def test_a_folder_is_shown(name: str) -> None:
    done = CliRunner().invoke(app, ["show", str(FOLDERS / name), "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    saved = json.loads((FOLDERS / name / "report.json").read_text(encoding="utf-8"))
    # Later versions write these as well.
    later = {"held_out_errors": {}, "forecast": None, "evaluation": None, "blocks": []}
    saved["report"] = {**later, **saved["report"]}
    if saved["report"]["assessment"]:
        saved["report"]["assessment"] |= {"held_out": True, "real": False}
    saved["plan"] = {**saved["plan"], **LATER}
    assert without_load(shown) == without_load(saved)


def test_a_plan_comes_back_as_it_was() -> None:
    for name in KNOWN:
        plan = json.loads((FOLDERS / name / "lbyl.json").read_text(encoding="utf-8"))["plan"]
        cuts = [{**cut, "experts": False} for cut in plan["cuts"]]
        assert json.loads(lbyl.Plan.from_dict(plan).to_json()) == {**plan, "cuts": cuts, **LATER}


FIRST = FOLDERS.with_name("saved_first")
FIRST_OUTPUT = [
    *(-0.18051419, -0.18754020, -0.03195540, -0.01319597, 0.03120818, 0.05975968),
    *(-0.15552121, -0.16541024, 0.04201046, 0.05665556, -0.16136624, -0.15648688),
]
"""What the network gave for ``image(1, 2, 6, 6)`` when the folder was saved."""


def test_the_first_form_of_plans_is_loaded() -> None:
    """It knew no scales, no numbers of modules and no layers that were replaced."""
    data = json.loads((FIRST / "lbyl.json").read_text(encoding="utf-8"))["plan"]
    assert data["version"] == 1
    assert not {"attributes", "folds", "trained", "network"} & data.keys()
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3))
    smaller = lbyl.load(FIRST, net)
    with torch.no_grad():
        torch.testing.assert_close(smaller(image(1, 2, 6, 6)).flatten(), torch.tensor(FIRST_OUTPUT))
    plan = lbyl.Plan.from_dict(data)
    assert (plan.version, plan.attributes, plan.folds, plan.trained) == (VERSION, (), (), False)
    assert all(cut.scale == 1 for cut in plan.cuts)


def test_a_folder_of_an_earlier_version_is_saved_in_the_present_one(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3))
    lbyl.save(lbyl.load(FIRST, net), tmp_path / "again")
    again = json.loads((tmp_path / "again" / "lbyl.json").read_text(encoding="utf-8"))["plan"]
    assert again["version"] == VERSION
    assert lbyl.load(tmp_path / "again", net)


@pytest.mark.parametrize("version", [0, VERSION + 1, True, "2", None, [2]])
def test_an_unknown_version_is_one_clear_line(version: object) -> None:
    with pytest.raises(lbyl.ArtifactError) as caught:
        upgraded({"version": version})
    assert str(caught.value) == f"plan version {version!r} is unknown (this lbyl reads versions 1 to 2); update lbyl"


def test_a_plan_is_not_changed_by_being_read() -> None:
    data = {"version": 1, "groups": []}
    assert upgraded(data)["version"] == VERSION
    assert data == {"version": 1, "groups": []}
