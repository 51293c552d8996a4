"""Latency: medians and margins, whose time it is, what gave no speed, budgets. The clock is a fake one throughout."""

from __future__ import annotations

import itertools
import json
import re
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from nets import Residual, images, mlp, settle
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

import lbyl
from lbyl.budget.costs import Term
from lbyl.budget.latency import shaped
from lbyl.cli.app import app
from lbyl.runtime.bench import Change
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.latency import Runs, interleaved, measure_latencies, waits

Cost = Callable[[Tensor], float]


class Machine(TorchFunctionMode):
    """Time that passes only where a layer computes, as long as ``cost`` says of its weight."""

    def __init__(self, cost: Cost) -> None:
        self.cost, self.time, self.slowdown = cost, 0.0, itertools.cycle([1.0])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, F.linear):
            self.time += self.cost(args[1]) * next(self.slowdown)
        elif func is F.relu:
            self.time += args[0].shape[1] / 100
        return func(*args, **(kwargs or {}))


def in_eights(weight: Tensor) -> float:
    """A start that no cut saves, and time for whole eights of channels only."""
    return 1 + 0.1 * -(-weight.shape[0] // 8) * -(-weight.shape[1] // 8)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(in_eights)
    monkeypatch.setattr(time, "perf_counter", lambda: made.time)
    with made:
        yield made


def test_medians_margins_and_ratios_run_by_run() -> None:
    runs = Runs((4.0, 1.0, 100.0, 3.0, 2.0))
    assert runs.median == 3
    assert runs.quartiles == (2, 4)
    assert runs.margin == pytest.approx(1.57 * 2 / 5**0.5)
    # What slows both down alike is gone from the ratio.
    assert Runs((2.0, 0.5, 50.0, 1.5, 1.0)).over(runs).margin == 0
    assert Runs((1.0,) * 3).over(Runs((0.0,) * 3)).median == 1


def test_calls_take_turns_after_the_warm_up() -> None:
    calls: list[str] = []
    clock = itertools.count().__next__
    first, second = interleaved(
        [lambda: calls.append("A"), lambda: calls.append("B")], [lambda: float(clock())] * 2, runs=3, warm_up=2
    )
    assert "".join(calls) == "AB" * 5
    assert first.values == second.values == (1.0, 1.0, 1.0)


def test_time_goes_to_the_layer_that_takes_it(machine: Machine) -> None:
    model, x = settle(Residual(16)), images(2, 3, 8, 8)
    (found,) = measure_latencies([model], ExampleInputs.of(x), runs=3)
    by_name = {layer.name: layer for layer in found.layers}
    assert by_name["a.conv1"].seconds.values == pytest.approx((1.4,) * 3)
    assert by_name["a.bn1"].seconds.median == 0
    assert by_name["fc"].kind == "Linear"
    assert by_name["fc"].macs == 2 * 32 * 4
    # Calls of relu, whether functional or by a module without parameters, belong to no layer.
    assert found.rest.median == pytest.approx(3 * 0.16 + 2 * 0.32)
    assert found.seconds.median == pytest.approx(found.rest.median + sum(v.seconds.median for v in found.layers))
    assert sum(layer.macs for layer in found.layers) == found.macs
    assert (found.device, found.threads) == ("cpu", torch.get_num_threads())


class Scaled(nn.Module):
    """Holds a parameter of its own, and a layer, which it calls twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(self.inner(x))) * self.scale


def test_a_layer_within_a_layer_and_one_that_runs_twice(machine: Machine) -> None:
    model = nn.Sequential(Scaled(), nn.Linear(4, 2))
    (found,) = measure_latencies([model], ExampleInputs.of(images(1, 4)), runs=3)
    times = {layer.name: layer.seconds.median for layer in found.layers}
    assert times == pytest.approx({"0.inner": 2.2, "0": 0.04, "1": 1.1})
    assert {layer.name: layer.macs for layer in found.layers} == {"0.inner": 32, "0": 0, "1": 8}


def test_measuring_leaves_no_trace_even_where_the_model_fails() -> None:
    model = settle(Residual(8)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lbyl.bench(model, images(2, 3, 8, 8), against=model, runs=3)
    with pytest.raises(lbyl.InputError, match=r"does not run on the example inputs \(float32 2x5x8x8\)"):
        lbyl.bench(model, images(2, 5, 8, 8), against=model, runs=3)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_cut_below_the_next_multiple_gives_no_speed(machine: Machine) -> None:
    model, x = mlp(6, 16, 16), images(1, 6)
    smaller = lbyl.compress(model, x, ratio={"0": 0.25, "2": 0.5}, restore="prune", forecast=False).model
    found = lbyl.bench(smaller, x, against=model, runs=5)
    assert [layer.name for layer in found.no_speed] == ["0"]
    layers = {layer.name: layer for layer in found.layers}
    assert layers["0"].macs_ratio == 0.75
    assert layers["2"].ratio is not None
    assert layers["2"].ratio.median == pytest.approx(1.2 / 1.4)
    assert "cut, but not faster: 0 (MACs 75%, time 100%)" in found.summary()
    document = json.loads(json.dumps(found.to_dict()))
    assert document["no_speed"] == ["0"]
    assert document["layers"][0]["ratio"]["median"] == 1


@pytest.mark.parametrize(
    ("after", "macs", "no_speed"),
    [
        ((1.0, 1.0, 1.0), 50, True),
        ((0.9, 0.9, 0.9), 50, False),
        ((0.9, 0.9, 0.9), 99, False),
        ((0.8, 0.95, 1.0), 50, True),  # within the margin
        ((0.1, 0.5, 3.0), 50, False),  # half the time in the median, however much the runs scatter
        ((1.0, 1.0, 1.0), 0, False),  # gone altogether
    ],
)
def test_what_counts_as_no_speed(after: tuple[float, ...], macs: int, no_speed: bool) -> None:
    change = Change("layer", "Linear", Runs((1.0,) * 3), Runs(after), (100, macs))
    assert change.no_speed is no_speed


def test_layers_that_only_one_of_them_has(machine: Machine) -> None:
    before, after = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    found = lbyl.bench(after, images(1, 4), against=before, runs=3)
    assert [(layer.name, layer.after is None, layer.no_speed) for layer in found.layers] == [
        ("0", False, False),
        ("1", True, False),
    ]
    assert found.layers[1].ratio is None


def test_curves_go_through_samples_and_never_rise_as_less_is_kept() -> None:
    term = Term(8.0, ((0, {0: 1}),), (8,))
    samples = [{0: 8}, {0: 6}, {0: 4}, {0: 2}]
    found = shaped(term, samples, [8.0, 9.0, 5.0, 4.0])  # the second one is noise
    assert [found.at({0: k}) for k in (8, 6, 4, 2)] == pytest.approx([8, 8, 5, 4])
    assert found.at({0: 5}) == pytest.approx(6.5)
    assert found.at({0: 1}) == pytest.approx(3.5)
    flat = shaped(Term(8.0, (), ()), samples, [8.0, 7.0, 6.0, 5.0])
    assert flat.at({0: 2}) == 8


@pytest.mark.parametrize("share", [0.9, 0.8])
def test_latency_budgets_are_met_and_the_note_says_so(machine: Machine, share: float) -> None:
    model, x = settle(Residual(48)), images(2, 3, 8, 8)
    budget = lbyl.Budget(latency=share, round_to=8)
    result = lbyl.compress(model, x, budget=budget, scope="all", restore="prune", verify=False, forecast=False)
    before, after = measure_latencies((model, result.model), ExampleInputs.of(x), runs=3)
    assert after.seconds.median / before.seconds.median == pytest.approx(share, rel=0.02)
    note = next(note for note in result.report.notes if note.startswith("latency:"))
    assert f"asked for {share:.2f}" in note
    assert " ± 0.00), MACs 0." in note
    assert result.plan.settings["budget"]["latency"] == share


def test_below_the_budget_is_within_it_where_no_widths_come_closer(machine: Machine) -> None:
    model, x = mlp(6, 16, 16), images(1, 6)
    machine.cost = lambda weight: 10.0 * (1 + (weight.shape[0] > 8)) if len(weight) > 3 else 1.0
    budget = lbyl.Budget(latency=0.8, max_ratio=0.5)
    result = lbyl.compress(model, x, budget=budget, restore="prune", forecast=False)
    before, after = measure_latencies((model, result.model), ExampleInputs.of(x), runs=3)
    assert after.seconds.median / before.seconds.median < 0.78
    assert any(re.search(r"latency: 0\.\d+ ± 0.000 was reached, asked for 0\.800", n) for n in result.report.notes)


def test_time_is_saved_where_there_is_time_to_be_saved(machine: Machine) -> None:
    """One layer takes all of the time, so the others are not cut for nothing."""
    machine.cost = lambda weight: weight.numel() if weight.shape[0] in range(2, 31) else 0.0
    model = mlp(6, 64, 30, 64)
    result = lbyl.compress(model, images(1, 6), budget=lbyl.Budget(latency=0.7), restore="prune", forecast=False)
    kept = {row.group: row.after for row in result.report.rows}
    assert set(kept) <= {"0", "2"}


def test_a_transformer_with_heads_meets_a_latency(machine: Machine) -> None:
    """Products of activations have no parameters, and so no time of their own."""
    settings: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 16, "patch_size": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **settings).eval()
    result = lbyl.compress(
        model, torch.randn(1, 3, 16, 16), budget=lbyl.Budget(latency=0.75), restore="prune", forecast=False
    )
    assert any(re.search(r"latency: .* asked for 0\.75", note) for note in result.report.notes)
    before, after = (
        measure_latencies((net,), ExampleInputs.of(torch.randn(1, 3, 16, 16)), runs=3)[0].seconds.median
        for net in (model, result.model)
    )
    assert after / before < 0.78


def test_a_latency_that_can_not_be_reached_names_the_nearest(machine: Machine) -> None:
    machine.cost = lambda weight: 10.0
    with pytest.raises(lbyl.InputError, match=r"µs can't be met within 2%: the nearest .* \(0\.9\d\d\); .*max_ratio"):
        lbyl.compress(
            settle(Residual(16)),
            images(2, 3, 8, 8),
            budget=lbyl.Budget(latency=0.5),
            restore="prune",
            verify=False,
            forecast=False,
        )


def test_measurements_that_scatter_meet_no_budget(machine: Machine) -> None:
    # Whole runs are fast or slow by turns of the machine's own, which no pairing takes out.
    machine.slowdown = itertools.cycle([1.0] * 7 + [9.0] * 6 + [2.0] * 5)
    with pytest.raises(lbyl.InputError, match=r"\(0\.\d+ ± \d\.\d+\); the measurements vary too much"):
        lbyl.compress(
            settle(Residual(16)),
            images(2, 3, 8, 8),
            budget=lbyl.Budget(latency=0.5),
            restore="prune",
            verify=False,
            forecast=False,
        )


@pytest.mark.parametrize(("capability", "multiple"), [("AVX512", 16), ("AVX2", 8), ("DEFAULT", 4)])
def test_auto_asks_the_device(monkeypatch: pytest.MonkeyPatch, capability: str, multiple: int) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    budget = lbyl.Budget(macs=0.7, round_to="auto")
    assert budget.on(torch.device("cpu")).round_to == multiple
    assert budget.on(torch.device("cuda")).round_to == 8
    model, x = settle(Residual(128)), images(1, 3, 8, 8)
    result = lbyl.compress(model, x, budget=budget, scope="all", restore="prune", verify=False, forecast=False)
    assert all(row.after % multiple == 0 for row in result.report.rows)
    assert result.plan.settings["budget"]["round_to"] == "auto"


def test_devices_that_work_on_their_own_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr("torch.cuda.synchronize", waited.append)
    monkeypatch.setattr("torch.mps.synchronize", lambda: waited.append("mps"))
    for device in (torch.device("cpu"), torch.device("cuda", 1), torch.device("mps")):
        for wait in waits(device):
            wait()
    assert waited == [torch.device("cuda", 1), "mps"]


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(lbyl.InputError, match="at least 3 runs"):
        lbyl.bench(mlp(), images(1, 6), against=mlp(), runs=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.py"
    file.write_text(
        textwrap.dedent("""
            from torch import nn
            net = lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        """)
    )
    model = settle(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)))
    return lbyl.compress(model, images(1, 6), ratio=0.25, restore="prune", forecast=False).save(tmp_path / "smaller")


def command(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_bench_on_the_command_line(machine: Machine, folder: Path) -> None:
    against = ("--against", f"{folder.parent / 'tiny.py'}:net", "--runs", 3)
    result = command("bench", folder, *against, "--batch", 5, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["inputs"] == ["float32:5x6"]
    assert document["no_speed"] == ["0", "2"]
    assert document["whole"]["macs"] == [5 * 16 * 9, 5 * 12 * 9]
    assert document["whole"]["before"]["median"] == pytest.approx(2.56)
    shown = command("bench", folder, *against, "--input", "2x6", "--model", against[1])
    assert shown.exit_code == 0, shown.output
    assert "not faster" in shown.stdout
    assert "3 runs of each in turns" in shown.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("smaller",), 1, "name it with --against SOURCE"),
        (("smaller", "--against", "tiny.py:net", "--input", "1x7"), 1, "does not run on the example inputs"),
        (("smaller", "--against", "tiny.py:net", "--weights", "none.pth"), 1, "no weights at"),
        (("smaller", "--against", "tiny.py:net", "--runs", "2"), 2, "runs"),
        (("smaller", "--against", "tiny.py:net", "--batch", "0"), 2, "batch"),
        (("nothing", "--against", "tiny.py:net"), 1, "not a folder saved by lbyl"),
    ],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch, folder: Path, args: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(folder.parent)
    result = command("bench", *args)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert not result.stdout


def test_a_latency_budget_on_the_command_line(machine: Machine, folder: Path) -> None:
    out = folder.parent / "timed"
    source = f"{folder.parent / 'tiny.py'}:net"
    args = (
        "--input",
        "1x6",
        "--criterion",
        "l2",
        "--restore",
        "prune",
        "--budget",
        "latency=0.89",
        "--round-to",
        8,
        "--json",
    )
    result = command("compress", source, "-o", out, *args)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [row["after"] for row in document["report"]["rows"]] == [8]
    assert "on cpu with" in document["report"]["notes"][0]
