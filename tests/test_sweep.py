"""Sweeps: points are what compress makes, dear work is done once, and nothing is lost or done twice after a kill."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from nets import HardCoded, Residual, images, mlp, settle
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

import lbyl
from lbyl.budget.curves import Curve, Curves
from lbyl.cli.app import app
from lbyl.io.artifact import read_manifest
from lbyl.moments import Probes
from lbyl.pipeline.analysis import Cuttable
from lbyl.pipeline.sweep.cache import FolderCache
from lbyl.pipeline.sweep.pareto import Point, by_cost, front, knee, plot, told
from lbyl.pipeline.sweep.state import ANALYSIS, SweepState, occupied
from lbyl.restore.least_squares.fit import measure
from lbyl.runtime.inputs import ExampleInputs

WIDE = lbyl.Budget(params=0.8), lbyl.Budget(params=0.6)


@dataclass(frozen=True)
class Counting:
    """Noise that writes a line whenever probes are made."""

    log: str

    def probes(self, model: nn.Module, inputs: ExampleInputs, generator: torch.Generator, progress: Any) -> Probes:
        note(Path(self.log), "probes")
        return lbyl.Noise(images=8).probes(model, inputs, generator, progress)


def note(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(line + "\n")


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def net() -> tuple[nn.Module, Tensor]:
    return mlp(6, 32, 32), images(2, 6)


def counting(tmp_path: Path) -> lbyl.LeastSquares:
    return lbyl.LeastSquares(moments=Counting(str(tmp_path / "log")))


def judged_by_size(model: nn.Module) -> float:
    return float(sum(p.numel() for p in model.parameters()))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files there are, and which of them were written again."""
    stats = {str(f.relative_to(folder)): f.stat() for f in folder.rglob("*") if f.name != ".lock"}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items() if not os.path.isdir(folder / name)}


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


@pytest.fixture
def plain_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages with empty pictures: drawing them is what takes the time here."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **settings: file.write('<svg viewBox="0 0 1 1"/>'))


def test_points_are_what_compress_makes_and_probes_are_made_once(tmp_path: Path) -> None:
    (model, x), restore = net(), counting(tmp_path)
    budgets = [lbyl.Budget(macs=0.8), lbyl.Budget(macs=0.6), lbyl.Budget(params=0.7)]
    swept = lbyl.sweep(model, x, budgets, tmp_path / "out", restore=restore)
    assert lines(tmp_path / "log") == ["probes"]
    assert [point.name for point in swept.made] == ["macs-0.8", "macs-0.6", "params-0.7"]
    for budget, point in zip(budgets, swept.points, strict=True):
        alone = lbyl.compress(model, x, budget=budget, restore=restore)
        assert same(lbyl.load(tmp_path / "out" / point.name, model), alone.model)
        assert (point.macs, point.parameters) == (alone.report.macs, alone.report.parameters)
        assert alone.report.assessment is not None
        assert point.error == alone.report.assessment.restored


def test_moments_are_measured_once_for_all_points_and_all_runs(tmp_path: Path) -> None:
    model, x = net()
    rows: list[int] = []
    stages: list[str] = []
    model[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))  # pyright: ignore

    def run(budgets: Sequence[lbyl.Budget], folder: str, **settings: int) -> int:
        """How often the network is run on the probes, of which there are 13."""
        rows.clear()
        stages.clear()
        restore = lbyl.LeastSquares(moments=lbyl.Noise(images=13), attach_norms=False, **settings)  # pyright: ignore
        lbyl.sweep(
            model,
            x,
            budgets,
            tmp_path / folder,
            restore=restore,
            progress=lambda *at: stages.append(at[0]),
            forecast=False,
        )
        return rows.count(13)

    def solved_on_probes() -> int:
        return len({stage for stage in stages if stage.endswith("solving")})

    # Error curves and moments are made on the probes; without batch norms, a point needs them no more.
    assert run(WIDE[:1], "out") == 2
    assert solved_on_probes() == 0
    kept = snapshot(tmp_path / "out" / ANALYSIS)
    assert run(WIDE, "out") == 0
    assert stages == []
    assert snapshot(tmp_path / "out" / ANALYSIS) == kept
    assert run(WIDE, "both") == 2
    assert solved_on_probes() == 0
    # Moments that there is no room for are measured for each point.
    run(WIDE, "no room", budget=10)
    assert solved_on_probes() == 2


def test_the_folder_has_a_table_a_picture_and_a_document(tmp_path: Path) -> None:
    (model, x), out = net(), tmp_path / "out"
    swept = lbyl.sweep(
        model, x, WIDE, out, restore=counting(tmp_path), evaluate=judged_by_size, source="nets:mlp", forecast=False
    )
    page, document = (out / "README.md").read_text(), json.loads((out / "sweep.json").read_text())
    assert "# Sweep of `nets:mlp`" in page
    for point in swept.points:
        share = point.parameters[1] / point.parameters[0]  # pyright: ignore[reportOptionalSubscript]
        assert f"| params={point.budget['params']} |" in page
        assert f"| {share:.1%} |" in page
        assert f"| {point.accuracy:.4g} |" in page
    assert "![" in page
    assert "<svg" in (out / "pareto.svg").read_text()
    assert "accuracy" in (out / "pareto.svg").read_text()
    assert [point["name"] for point in document["points"]] == [point.name for point in swept.points]
    assert swept.unpruned == document["unpruned"] == judged_by_size(model)
    console = Console(width=80)
    with console.capture() as printed:
        console.print(swept)
    assert re.search(r"params=0\.8 .* params-0\.8", printed.get())
    assert len(swept.plot().axes) == 2


def test_a_finished_sweep_does_nothing(tmp_path: Path) -> None:
    (model, x), out, log = net(), tmp_path / "out", tmp_path / "log"

    def judge(model: nn.Module) -> float:
        note(log, "judged")
        return judged_by_size(model)

    first = lbyl.sweep(model, x, WIDE, out, restore=counting(tmp_path), evaluate=judge)
    assert sorted(lines(log)) == ["judged", "judged", "judged", "probes"]
    before = snapshot(out)
    stages: list[str] = []
    again = lbyl.sweep(
        model, x, WIDE, out, restore=counting(tmp_path), evaluate=judge, progress=lambda *at: stages.append(at[0])
    )
    assert again == first
    assert snapshot(out) == before
    assert len(lines(log)) == 4
    assert stages == []


def test_more_budgets_and_a_judge_are_added_without_doing_anything_again(tmp_path: Path) -> None:
    (model, x), out, restore = net(), tmp_path / "out", counting(tmp_path)
    lbyl.sweep(model, x, WIDE[:1], out, restore=restore)
    before = snapshot(out / "params-0.8") | snapshot(out / ANALYSIS)
    more = lbyl.sweep(model, x, WIDE[1:], out, restore=restore, evaluate=judged_by_size)
    assert [point.name for point in more.made] == ["params-0.8", "params-0.6"]
    assert [point.accuracy for point in more.made] == [
        judged_by_size(lbyl.load(out / point.name, model)) for point in more.made
    ]
    assert lines(tmp_path / "log") == ["probes"]
    assert snapshot(out / "params-0.8") | snapshot(out / ANALYSIS) == before


def test_points_that_were_made_without_a_forecast_get_one_later(tmp_path: Path) -> None:
    (model, x), out, restore = net(), tmp_path / "out", counting(tmp_path)
    first = lbyl.sweep(model, x, WIDE, out, restore=restore, forecast=False)
    weights = snapshot(out / "params-0.8")["model.safetensors"]
    assert [point.agreement for point in first.made] == [None, None]
    later = lbyl.sweep(model, x, WIDE, out, restore=restore)
    wanted = lbyl.sweep(model, x, WIDE, tmp_path / "at once", restore=restore)
    for point, other in zip(later.made, wanted.made, strict=True):
        assert (point.agreement, point.low, point.high) == (other.agreement, other.low, other.high) != (None,) * 3
        saved, made = (read_manifest(place / point.name).report for place in (out, tmp_path / "at once"))
        assert saved.forecast == made.forecast
        assert f"{round(100 * point.agreement)} of 100" in (out / point.name / "report.html").read_text()  # pyright: ignore
        assert json.loads((out / point.name / "report.json").read_text())["report"]["forecast"]["agreement"]
    assert snapshot(out / "params-0.8")["model.safetensors"] == weights
    assert lines(tmp_path / "log") == ["probes"] * 2


def test_budgets_of_the_same_amount_with_other_widths_get_folders_of_their_own(tmp_path: Path) -> None:
    model, x = net()
    budgets = [lbyl.Budget(params=0.6), lbyl.Budget(params=0.6, max_ratio=0.6)]
    swept = lbyl.sweep(model, x, budgets, tmp_path / "out", restore="prune")
    assert [point.name for point in swept.made] == ["params-0.6", "params-0.6-2"]


class Crash(BaseException):
    """What a process meets when it dies."""


def renames(monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> list[str]:
    """Die at the n-th rename, of a file or of a folder: before it or after it. Returns what is given its name."""
    names: list[str] = []

    def dying(rename: Callable[..., Any]) -> Callable[..., Any]:
        def counted(source: Any, target: Any) -> Any:
            names.append(Path(target).name)
            if len(names) == at and not after:
                raise Crash
            done = rename(source, target)
            if len(names) == at:
                raise Crash
            return done

        return counted

    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(os, "rename", dying(os.rename))
    return names


@pytest.mark.usefixtures("plain_pages")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_at_any_write_costs_at_most_what_was_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    (model, x), log = net(), tmp_path / "log"
    restore = counting(tmp_path)

    def judge(model: nn.Module) -> float:
        note(log, f"judged {judged_by_size(model):.0f}")
        return judged_by_size(model)

    def progress(stage: str, done: int, total: int) -> None:
        if "solving" in stage and done == total:
            note(log, stage.partition(" ")[0])

    def run(out: Path) -> lbyl.Sweep:
        return lbyl.sweep(model, x, WIDE, out, restore=restore, evaluate=judge, progress=progress, forecast=False)

    expected = run(tmp_path / "whole")
    ideal, crashes = lines(log), list[str]()
    for at in range(1, 40):
        log.unlink()
        out = tmp_path / f"{at}"
        with monkeypatch.context() as patch:
            names = renames(patch, at, after)
            try:
                run(out)
            except Crash:
                crashes.append(names[-1])
            else:
                break
        found = run(out)
        twice = list(lines(log))
        for line in ideal:
            twice.remove(line)  # nothing was left out
        assert len(twice) <= (0 if after else 1)
        assert not [entry.name for entry in out.rglob(".*") if entry.name != ".lock"]
        assert [point.accuracy for point in found.points] == [point.accuracy for point in expected.points]
        for point in found.points:
            ours, theirs = (lbyl.load(folder / point.name, model) for folder in (out, tmp_path / "whole"))
            assert same(ours, theirs)
    # It died at whatever a whole sweep leaves: files of its own, those of the analysis, and the points' folders.
    whole = tmp_path / "whole"
    written = [file for file in [*whole.iterdir(), *(whole / ANALYSIS).rglob("*")] if file.is_file()]
    assert {file.name for file in written if file.name != ".lock"} | {"params-0.8", "params-0.6"} == set(crashes)
    assert crashes.count("sweep.json") > 2 * len(WIDE)  # once before them, and with each when it is made and judged


FACTORY = """
    import os, pathlib, time, torch
    from torch import nn

    here = pathlib.Path(__file__).parent

    def net():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 48, 3, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
            nn.Conv2d(48, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
        )

    def judge(model):
        size = sum(p.numel() for p in model.parameters())
        with (here / "log").open("a") as file:
            file.write(f"{size}\\n")
        if (here / "log").read_text().count("\\n") == 3 and not (here / "go").exists():
            (here / "waiting").touch()
            time.sleep(600)
        return size

    def broken(model):
        raise RuntimeError("no data")

    def unsure(model):
        return float("nan")
"""
COMMAND = ("--input", "1x3x6x6", "--moments", "noise", "--scope", "all")


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "tiny.py").write_text(textwrap.dedent(FACTORY))
    return f"{tmp_path / 'tiny.py'}:net"


def command(source: str, out: Path, *args: object):
    return CliRunner().invoke(app, ["sweep", source, "-o", str(out), *COMMAND, *map(str, args)])


def test_a_killed_process_is_gone_on_with(source: str, tmp_path: Path) -> None:
    """The second point's judge is killed; nothing but that judgment is done again, and the outcome is the same."""
    out, log = tmp_path / "out", tmp_path / "log"
    args = ["--budget", "macs=0.8,0.6,0.01", "--budget", "params=0.5", "--eval", source.replace(":net", ":judge")]
    call = [sys.executable, "-m", "lbyl", "sweep", source, "-o", str(out), *COMMAND, *args]
    with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "waiting").exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        process.kill()
    done = {name: stat for name, stat in snapshot(out).items() if re.match(rf"macs-|{ANALYSIS}", name)}
    assert {name.partition("/")[0] for name in done} == {"macs-0.8", "macs-0.6", ANALYSIS}
    judged = lines(log)
    # What a kill in the middle of a write leaves behind.
    (out / ".params-0.5-abcd1234").mkdir()
    (out / ".params-0.5-abcd1234" / "model.safetensors").write_bytes(b"half")
    (out / ANALYSIS / "0" / ".tmp-x").write_bytes(b"half")
    (out / ".mine").write_text("a file of the user's")

    (tmp_path / "go").touch()
    result = command(source, out, *args, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    after = snapshot(out)
    assert {name: after[name] for name in done} == done
    assert not (out / ".params-0.5-abcd1234").exists()
    assert not (out / ANALYSIS / "0" / ".tmp-x").exists()
    assert (out / ".mine").exists()
    # Unpruned, first point, second point (killed); then the second again and the last.
    assert lines(log) == [*judged, judged[2], f"{document['points'][3]['parameters'][1]}"]
    assert [point["made"] for point in document["points"]] == [True, True, False, True]
    assert "nearest" in document["points"][2]["reason"] or "can't be reached" in document["points"][2]["reason"]

    whole = command(source, tmp_path / "whole", *args, "--json")
    points = json.loads(whole.stdout)["points"]
    for ours, theirs in zip(document["points"], points, strict=True):
        assert {**ours, "seconds": None} == {**theirs, "seconds": None}


def test_points_out_of_reach_do_not_stop_the_others(source: str, tmp_path: Path) -> None:
    result = command(source, tmp_path / "out", "--budget", "macs=0.01,0.7", "--restore", "auto")
    assert result.exit_code == 0, result.output
    assert "macs=0.01 could not be made: the budget" in result.stdout
    assert "not made" in result.stdout
    assert "could not be made" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(p.name for p in (tmp_path / "out").glob("macs-*")) == ["macs-0.7"]
    none = command(source, tmp_path / "none", "--budget", "macs=0.01")
    assert none.exit_code == 1
    assert none.stderr.splitlines()[-1].startswith("error: no point could be made (macs=0.01: the budget")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--budget", "macs"), 2, "macs=0.5"),
        (("--budget", "macs=0.9,x"), 2, "macs=0.5"),
        (("--budget", "macs=0.9,0.9"), 2, "given twice"),
        (("--budget", "macs=1.5"), 2, "must lie above 0"),
        ((), 2, "--budget"),
        (("--budget", "macs=0.8", "--eval", "judge"), 1, "names no function"),
        (("--budget", "macs=0.8", "--eval", "TMP/tiny.py:nobody"), 1, "has no function 'nobody'"),
        (
            ("--budget", "macs=0.8", "--eval", "TMP/tiny.py:broken"),
            1,
            "the unpruned network: RuntimeError: no data",
        ),
        (("--budget", "macs=0.8", "--eval", "TMP/tiny.py:unsure"), 1, "returned nan"),
        (("--budget", "macs=0.8", "--restore", "coreset"), 2, "leave out either"),
    ],
)
def test_wrong_commands_write_nothing(source: str, tmp_path: Path, args: Any, code: int, message: str) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    result = command(source, tmp_path / "out", *(arg.replace("TMP", str(tmp_path)) for arg in args))
    assert result.exit_code == code, result.output
    assert message in " ".join(re.sub("[│\n]", " ", result.stderr).split())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before


def test_a_sweep_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (model, x), out = net(), tmp_path / "out"
    lbyl.sweep(model, x, WIDE[:1], out, restore="prune")
    before = snapshot(out)
    other = mlp(6, 32, 32)
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-3  # pyright: ignore
    for changed, arguments, message in [
        (other, {}, "weights differ"),
        (model, {"seed": 3}, "seed was 0, now it is 3"),
        (model, {"restore": "merge"}, r"restore was Prune\(\), now it is Merge\("),
        (model, {"scope": "all"}, "scope was inner, now it is all"),
    ]:
        with pytest.raises(lbyl.InputError, match=f"another sweep: {message}.*another folder"):
            lbyl.sweep(changed, x, WIDE, out, **{"restore": "prune", **arguments})
    with pytest.raises(lbyl.InputError, match="inputs differ"):
        lbyl.sweep(model, images(2, 6, seed=5), WIDE, out, restore="prune")
    assert snapshot(out) == before


def test_foreign_folders_and_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    model, x = net()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in [
        ("full", "does not hold a sweep"),
        ("file", "is not a folder"),
        ("link", "is not a folder"),
        ("absent/out", "is not a folder; create it first"),
    ]:
        with pytest.raises(lbyl.InputError, match=message):
            lbyl.sweep(model, x, WIDE, tmp_path / name, restore="prune")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "link", "thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert lbyl.sweep(model, x, WIDE[:1], tmp_path / "empty", restore="prune").made


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (model, x), out, restore = net(), tmp_path / "out", counting(tmp_path)
    lbyl.sweep(model, x, WIDE[:1], out, restore=restore)
    state = (out / "sweep.json").read_text()
    for text in (state[:-40], "[]", state.replace('"params-0.8"', '"../elsewhere"'), state.replace("0.8", '"x"')):
        (out / "sweep.json").write_text(text)
        with pytest.raises(lbyl.LbylError, match=r"sweep\.json is damaged|another sweep"):
            lbyl.sweep(model, x, WIDE, out, restore=restore)
    (out / "sweep.json").write_text(state.replace('"version": 1', '"version": 7'))
    with pytest.raises(lbyl.ArtifactError, match="version 7 is unknown"):
        lbyl.sweep(model, x, WIDE, out, restore=restore)
    (out / "sweep.json").write_text(state)
    curves = next(out.rglob("curves.safetensors"))
    curves.write_bytes(curves.read_bytes()[:-8])
    with pytest.raises(lbyl.ArtifactError, match=r"curves\.safetensors is damaged.*delete it"):
        lbyl.sweep(model, x, WIDE, out, restore=restore)
    curves.unlink()
    assert len(lbyl.sweep(model, x, WIDE, out, restore=restore).made) == 2
    assert lines(tmp_path / "log") == ["probes"]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    model, x = net()
    with (
        occupied(tmp_path / "out"),
        pytest.raises(lbyl.InputError, match="another process"),
    ):
        lbyl.sweep(model, x, WIDE, tmp_path / "out", restore="prune")
    assert lbyl.sweep(model, x, WIDE[:1], tmp_path / "out", restore="prune").made


def test_wrong_arguments(tmp_path: Path) -> None:
    model, x = net()
    for budgets, options, message in [
        ([], {}, "at least one budget"),
        ([0.5], {}, r"budgets\[0\] is a float"),
        ([WIDE[0], WIDE[0]], {}, "given twice"),
        (WIDE, {"restore": "coreset"}, "chooses channels by itself"),
        (WIDE, {"restore": "nothing"}, "unknown restorer"),
        (WIDE, {"scope": "some"}, "scope="),
    ]:
        with pytest.raises(lbyl.InputError, match=message):
            lbyl.sweep(model, x, budgets, tmp_path / "out", **{"restore": "prune", **options})
    assert not list(tmp_path.iterdir())


def test_numbers_of_two_judges_do_not_meet_in_one_table(tmp_path: Path) -> None:
    model, x = net()
    lbyl.sweep(model, x, WIDE[:1], tmp_path / "out", restore="prune", evaluate=judged_by_size)
    with pytest.raises(lbyl.InputError, match=r"evaluated by test_sweep:judged_by_size, but now .*<lambda> is given"):
        lbyl.sweep(model, x, WIDE, tmp_path / "out", restore="prune", evaluate=lambda model: 1.0)


def test_the_judge_can_not_harm_the_network_or_what_is_saved(tmp_path: Path) -> None:
    model, x = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def vandal(model: nn.Module) -> float:
        assert not model.training
        for parameter in model.parameters():
            parameter.zero_()
        return 1.0

    lbyl.sweep(model, x, WIDE[:1], tmp_path / "out", restore="prune", evaluate=vandal)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    saved = lbyl.load(tmp_path / "out" / "params-0.8", model)
    assert same(saved, lbyl.compress(model, x, budget=WIDE[0], restore="prune").model)


def test_the_users_data_is_not_kept_but_must_be_the_same(tmp_path: Path) -> None:
    (model, x), out = net(), tmp_path / "out"

    def data(seed: int) -> lbyl.LeastSquares:
        return lbyl.LeastSquares(moments=lbyl.Data([images(16, 6, seed=seed), images(16, 6, seed=seed + 1)]))

    lbyl.sweep(model, x, WIDE[:1], out, restore=data(1))
    assert not list(out.rglob("probes*"))
    with pytest.raises(lbyl.InputError, match="the data has changed since"):
        lbyl.sweep(model, x, WIDE, out, restore=data(7))
    assert len(lbyl.sweep(model, x, WIDE, out, restore=data(1)).made) == 2


def test_a_submodule_is_swept_and_what_can_not_be_cut_is_told_in_every_point(tmp_path: Path) -> None:
    model, x = settle(nn.Sequential(HardCoded(), nn.Linear(3, 2))), images(2, 6)
    budgets = lbyl.Budget(params=0.9), lbyl.Budget(params=0.8)
    swept = lbyl.sweep(model, x, budgets, tmp_path / "out", submodule="0", restore="prune")
    assert len(swept.made) == 2
    for point in swept.made:
        alone = lbyl.compress(
            model, x, budget=lbyl.Budget(params=point.budget["params"]), submodule="0", restore="prune"
        )
        assert same(lbyl.load(tmp_path / "out" / point.name, model), alone.model)
        page = (tmp_path / "out" / point.name / "README.md").read_text()
        assert "second is not pruned" in page
    assert len(list((tmp_path / "out" / ANALYSIS).iterdir())) == 1


def test_probes_and_curves_come_back_to_the_bit(tmp_path: Path) -> None:
    model, x = settle(Residual(8)), ExampleInputs((), {"x": images(2, 3, 8, 8)})
    graph = lbyl.inspect(model, x).graph
    made = lbyl.Dream(images=4, steps=1).probes(model, x, torch.Generator().manual_seed(0), None)
    curves = Curves((Curve(1, (2, 0, 1), torch.tensor([1.0, 1 / 3, 0.1, 0.0]).double()),), ("a note",))
    cuttable = Cuttable((0, 1), ("another",))

    def cache() -> FolderCache:
        return FolderCache(tmp_path / "cache", graph, x, private=False)

    def never() -> Any:
        raise AssertionError("it is there already")

    assert cache().cuttable(lambda: cuttable) == cache().cuttable(never) == cuttable
    assert cache().probes(lambda: made) is made
    found = cache().probes(never)
    for ours, theirs in zip((*found.batches, found.held_out), (*made.batches, made.held_out), strict=True):
        assert torch.equal(ours.kwargs["x"], theirs.kwargs["x"])
        assert ours.kwargs["x"].stride() == theirs.kwargs["x"].stride()
    assert (found.batch_statistics, found.note, found.recalibration_batches) == (
        True,
        made.note,
        made.recalibration_batches,
    )
    cache().curves(lambda: curves)
    again = cache().curves(never)
    assert again.notes == curves.notes
    assert torch.equal(again.curves[0].error, curves.curves[0].error)
    assert again.curves[0].order == (2, 0, 1)
    consumer_moments = measure(model, graph, {0, 1}, made, lbyl.LeastSquares(), 0, 2**20)
    assert consumer_moments
    assert cache().consumer_moments(lambda: consumer_moments) is consumer_moments
    back = cache().consumer_moments(never)
    assert back.keys() == consumer_moments.keys()
    for name, reading in consumer_moments.items():
        for ours, theirs in zip(back[name].blocks, reading.blocks, strict=True):
            assert ours.count == theirs.count
            assert all(torch.equal(getattr(ours, part), getattr(theirs, part)) for part in ("p", "pp", "pr", "r", "rr"))
        assert all(map(torch.equal, back[name].output, reading.output))


def points() -> Iterator[Point]:
    for name, macs, parameters, error in [
        ("a", 90, 90, 0.1),
        ("b", 80, 95, 0.2),
        ("c", 70, 70, 0.2),
        ("d", 60, 60, 0.5),
    ]:
        yield Point(name, {"macs": 0.5}, True, "", (100, parameters), (100, macs), 0.9, error)


def test_the_front_has_what_no_other_point_beats() -> None:
    found = list(points())
    assert front(found) == ("a", "c", "d")
    assert [point.name for point in by_cost([*found, Point("e", {"macs": 0.1}, reason="no")])] == [*"abcde"]
    judged = [Point(**{**vars(p), "accuracy": accuracy}) for p, accuracy in zip(found, (80, 85, 70, 75), strict=True)]
    assert front(judged) == ("a", "b", "d")
    assert front([Point("a", {}, True, "", (2, 1))]) == ()


def test_the_ledger_comes_back_as_it_was_written(tmp_path: Path) -> None:
    state = SweepState({"seed": 0}, tuple(points()), "nets:mlp", "m:f", 0.5, {"probe": 1.5})
    state.write(tmp_path)
    assert SweepState.read(tmp_path) == state


CURVES: dict[str, tuple[tuple[float, ...], float | None, str | None]] = {
    "bends": ((0.99, 0.98, 0.96, 0.6, 0.1), None, "macs-0.7"),
    "straight": ((0.9, 0.8, 0.7, 0.6, 0.5), None, None),
    "two points": ((0.99, 0.2), None, None),
    "measured": ((0.93, 0.92, 0.91, 0.3, 0.1), 0.94, "macs-0.7"),
    "nothing lost": ((1.0, 1.0, 1.0), None, None),
}


@pytest.mark.parametrize("name", CURVES)
def test_the_knee_is_where_quality_begins_to_fall(name: str) -> None:
    values, unpruned, expected = CURVES[name]
    points = []
    for number, value in enumerate(values, 1):
        kept = 100 - 10 * number
        seen = (
            {"accuracy": value} if unpruned else {"agreement": value, "low": 0.9 * value, "high": min(1.0, 1.1 * value)}
        )
        budget = {"macs": kept / 100}
        points.append(Point(f"macs-{kept / 100:g}", budget, True, "", (100, kept), (100, kept), **seen))
    assert knee(points, unpruned) == expected
    assert any(line.startswith("Knee: macs=") for line in told(points, unpruned)) == bool(expected)
    shown = {text.get_text() for text in plot(points, unpruned).axes[0].get_legend().get_texts()}  # type: ignore[union-attr]
    assert ("knee" in shown) == bool(expected)
    assert ("9 times in 10" in shown) == (unpruned is None)
