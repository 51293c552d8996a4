"""Forecasts: what is said of a smaller network without data, and networks that are looked for by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import images, mlp, residual
from torch import Tensor, nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.io.artifact import CARD, PAGE, read_manifest
from lbyl.io.report.words import expectation
from lbyl.moments.forecast_probes import forecast_probes
from lbyl.runtime.forecast import MAPS, Forecast, foretell_agreement, scores_error, with_real_answers
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.output_error import outputs_error

X = images(2, 6)


class Positions(nn.Module):
    """Scores of five classes at each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class Unit(nn.Module):
    """Embeddings of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.last(torch.relu(self.first(x))), dim=1)


class Constant(nn.Module):
    """A classifier that prefers one class whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.net(x)
        return scores + 100 * (torch.arange(scores.shape[1]) == 1)


class Tokens(nn.Module):
    """A classifier of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(20, 6), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(self.table(ids).mean(1))))


def bounded(forecast: Forecast) -> bool:
    """Whether there is a value, and within its bounds."""
    low, value, high = forecast.low, forecast.value, forecast.high
    return low is not None and value is not None and high is not None and low <= value <= high


# -- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dreamed", "photographs", "sure"])
def test_more_agreement_and_less_error_on_probes_promise_more(kind: str) -> None:
    shares = [foretell_agreement(share, [0.3], 100, MAPS[kind]).agreement for share in (0.2, 0.6, 0.9, 1.0)]
    errors = [foretell_agreement(0.9, [error], 100, MAPS[kind]).agreement for error in (1.0, 0.5, 0.2, 0.0)]
    assert shares == sorted(shares, key=lambda share: share or 0.0)
    assert errors == sorted(errors, key=lambda share: share or 0.0)
    assert all(bounded(foretell_agreement(share, [0.3], 100, MAPS[kind])) for share in (0.0, 0.5, 1.0))


def test_few_probes_leave_more_open() -> None:
    few, many = (foretell_agreement(0.9, [0.3], count, MAPS["sure"]) for count in (10, 1000))
    assert few.low is not None
    assert many.low is not None
    assert few.low < many.low


def test_each_batch_of_probes_counts() -> None:
    alike, apart = (foretell_agreement(0.9, errors, 100, MAPS["sure"]) for errors in ([0.1, 0.1], [0.1, 0.6]))
    assert alike.agreement is not None
    assert apart.agreement is not None
    assert apart.agreement < alike.agreement - 0.02


def test_noise_is_looked_at_before_and_after_it_is_optimized() -> None:
    net = mlp().eval()
    made = forecast_probes(net, ExampleInputs.of(torch.zeros(1, 6)), torch.Generator().manual_seed(0))
    after, before = (batch.tensors()[0] for batch in made.batches)
    assert made.kind == "sure"
    assert made.wanted is not None
    reached = [float((net(x).argmax(1) == made.wanted).double().mean()) for x in (before, after)]
    assert reached[0] + 0.1 < reached[1]


def test_real_answers_weigh_the_more_the_more_there_are() -> None:
    prior = foretell_agreement(0.5, [1.0], 100, MAPS["sure"])
    assert prior.agreement is not None
    few, many = (with_real_answers(prior, 0.99, count) for count in (5, 5000))
    assert few.agreement is not None
    assert prior.agreement < few.agreement < 0.95
    assert many.agreement == pytest.approx(0.99, abs=0.005)
    assert bounded(few)
    assert bounded(with_real_answers(Forecast(), 1.0, 12))


def test_the_error_of_scores_counts_what_changes_answers_and_nothing_else() -> None:
    scores = images(50, 4)
    assert scores_error(scores, 3 * scores + images(50, 1)) == pytest.approx(0.0, abs=1e-6)
    assert scores_error(scores, scores + torch.tensor([2.0, 0, 0, 0])) > 0.3
    assert scores_error(scores, torch.zeros(50, 4)) == pytest.approx(1.0, abs=0.1)


# -- words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forecast", "tone", "words"),
    [
        (Forecast("agreement", agreement=0.97, low=0.94, high=0.98), "good", "about 97 of 100 inputs (94 to 98)"),
        (Forecast("agreement", agreement=0.9, low=0.8, high=1.0), "fair", "about 90 of 100 inputs (80 to 100)"),
        (Forecast("agreement", agreement=0.3, low=0.1, high=0.5), "bad", "about 30 of 100 inputs (10 to 50)"),
        (Forecast("positions", agreement=0.9, low=0.8, high=0.95), "fair", "at about 90 of 100 positions"),
        (Forecast("perplexity", perplexity=1.05, low=1.0, high=1.1), "good", "about 1.05 times the original's"),
        (Forecast("cosine", cosine=0.9, low=0.8, high=0.95), "fair", "about 0.90 (0.80 to 0.95)"),
        (Forecast("error", error=0.5, low=0.2, high=0.9), "bad", "about 50% (20% to 90%)"),
        (Forecast(why="no reason"), "none", "not known: no reason"),
        (None, "none", "What was lost is not known."),
    ],
)
def test_the_forecast_in_plain_words(forecast: Forecast | None, tone: str, words: str) -> None:
    told = expectation(forecast)
    assert told.tone == tone
    assert words in told.headline
    assert "destroyed" not in told.text


def test_every_way_to_show_a_report_leads_with_the_forecast(tmp_path: Path) -> None:
    result = lbyl.compress(mlp(), X, ratio=0.25, restore="lbyl", evaluate=lambda net: 0.5)
    headline = expectation(result.report.forecast).headline
    assert result.report.summary()[0].startswith(headline)
    assert result.report.summary()[1].startswith("Measured by")
    folder = result.save(tmp_path / "small")
    assert headline in (folder / CARD).read_text(encoding="utf-8")
    assert headline in (folder / PAGE).read_text(encoding="utf-8")
    assert read_manifest(folder).report.forecast == result.report.forecast


# -- what is foretold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", ["prune", "lbyl", lbyl.LeastSquares(moments=lbyl.Noise(images=8))])
def test_classifiers_are_told_their_agreement_whatever_restores_them(restore: Any) -> None:
    slight, strong = (lbyl.compress(residual(), images(2, 3, 8, 8), ratio=r, restore=restore) for r in (0.05, 0.8))
    for result in (slight, strong):
        assert result.report.forecast
        assert result.report.forecast.measure == "agreement"
        assert bounded(result.report.forecast)
    assert (slight.report.forecast.agreement or 0) > (strong.report.forecast.agreement or 0)  # pyright: ignore


@pytest.mark.parametrize(
    ("net", "x", "measure"),
    [
        (Positions, images(1, 3, 8, 8), "positions"),
        (Unit, X, "cosine"),
        (lambda: mlp(6, 12, classes=1), X, "error"),
        (lambda: nn.Sequential(mlp(6, 12, classes=8), nn.ReLU()), X, "error"),
        (Tokens, torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(0)), "unknown"),
    ],
    ids=["positions", "cosine", "error", "features", "tokens"],
)
def test_other_networks_are_told_what_can_be_said_of_them(net: Any, x: Tensor, measure: str) -> None:
    torch.manual_seed(0)
    forecast = lbyl.compress(net().eval(), x, ratio=0.25, restore="lbyl").report.forecast
    assert forecast
    assert forecast.measure == measure
    assert bounded(forecast) == (measure != "unknown")
    assert (forecast.agreement is None) == (measure != "positions")
    assert bool(forecast.why) == (measure == "unknown")


def test_an_unchanged_network_is_foretold_to_answer_the_same() -> None:
    forecast = lbyl.compress(mlp(6, 40), X, ratio=0.01, restore="lbyl").report.forecast
    assert forecast
    assert forecast.agreement is not None
    assert forecast.agreement > 0.99


def test_the_user_s_own_held_out_inputs_count() -> None:
    batches = list(images(60, 6).split(20))
    told = lbyl.compress(mlp(), X, ratio=0.25, restore=lbyl.LeastSquares(moments=lbyl.Data(batches))).report.forecast
    assert told
    assert told.real
    assert told.inputs == 20
    for given, held in ((batches[0], 5), (batches[0][:7], 0)):
        single = lbyl.LeastSquares(moments=lbyl.Data([given]))
        alone = lbyl.compress(mlp(), X, ratio=0.25, restore=single).report.forecast
        assert alone
        assert (alone.real, alone.inputs == held) == (bool(held), bool(held))


def test_forecasts_can_be_left_out_and_depend_on_the_seed_alone() -> None:
    assert lbyl.compress(mlp(), X, ratio=0.25, restore="lbyl", forecast=False).report.forecast is None
    first, second = (lbyl.compress(mlp(), X, ratio=0.25, restore="lbyl").report.forecast for _ in range(2))
    assert first == second


class Refusing(nn.Module):
    """A classifier that says which inputs it takes."""

    def __init__(self, takes: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.net, self.takes = mlp(), takes

    def forward(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            raise ValueError("not these, please")
        return self.net(x)


def test_a_network_that_fails_on_probes_is_not_called_destroyed() -> None:
    net = Refusing(lambda x: bool((x == X).all()))
    result = lbyl.compress(net.eval(), X, ratio=0.25, restore="lbyl")
    assert result.report.forecast
    assert "not these, please" in result.report.forecast.why
    assert "not known" in result.report.summary()[0]


@pytest.mark.parametrize(
    "takes",
    [lambda x: len(x) == 2, lambda x: bool((x >= 0).all() and (x <= 1).all())],
    ids=["two at a time", "between 0 and 1"],
)
@pytest.mark.parametrize("restore", [None, "prune"])
def test_probes_are_such_as_the_network_takes(takes: Callable[[Tensor], bool], restore: str | None) -> None:
    torch.manual_seed(0)
    settings = {} if restore is None else {"restore": restore}
    report = lbyl.compress(Refusing(takes).eval(), torch.rand(2, 6), ratio=0.25, **settings).report
    assert report.forecast
    assert report.forecast.agreement is not None
    assert not any("was taken instead" in note for note in report.notes)


@pytest.mark.parametrize(
    ("net", "x", "measure"),
    [(Unit, X, "cosine"), (lambda: mlp(6, 12, classes=1), X, "error"), (Constant, X, "agreement")],
    ids=["embeddings", "regression", "one answer"],
)
def test_agreement_means_something_for_all_outputs(net: Callable[[], nn.Module], x: Tensor, measure: str) -> None:
    torch.manual_seed(0)
    report = lbyl.compress(net().eval(), x, budget=lbyl.Budget(agreement=0.6), restore="lbyl").report
    assert report.forecast
    assert report.forecast.measure == measure
    assert report.forecast.kept is not None
    assert report.forecast.kept >= 0.6
    assert report.macs
    assert report.macs[1] < report.macs[0]


def test_sizes_between_those_that_exist_are_no_reason_to_give_up() -> None:
    """One group of eight channels: shares of the cost are eighths, and most budgets can't be met within 2 %."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    whole = lbyl.compress(net, X, ratio=0.13, restore="lbyl").report
    assert whole.forecast
    assert whole.forecast.kept
    result = lbyl.compress(net, X, budget=lbyl.Budget(agreement=whole.forecast.kept - 1e-6), restore="lbyl")
    assert result.model[0].out_features < 8


# -- budgets of quality -------------------------------------------------------------------------------------


def test_a_budget_of_agreement_keeps_it_and_is_the_default() -> None:
    net, x = residual(), images(2, 3, 8, 8)
    asked = lbyl.compress(net, x, budget=lbyl.Budget(agreement=0.95), restore="lbyl")
    assert asked.report.forecast
    assert asked.report.forecast.agreement is not None
    assert asked.report.forecast.agreement >= 0.95
    assert asked.plan.settings["budget"]["agreement"] == 0.95
    assert asked.report.macs
    assert asked.report.macs[1] < asked.report.macs[0]
    default = lbyl.compress(net, x, restore="lbyl")
    assert default.plan.groups == asked.plan.groups


class Chaotic(nn.Module):
    """Its answers change with every small change of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (1e4 * self.b(self.a(x).relu())).sin()


def test_by_default_the_gentlest_cut_is_returned_where_no_cut_keeps_enough() -> None:
    torch.manual_seed(0)
    net = Chaotic().eval()
    result = lbyl.compress(net, X, restore="prune")
    assert result.report.parameters[1] < result.report.parameters[0]
    assert "agreement=0.95 can't be kept" in result.report.notes[0]
    with pytest.raises(lbyl.InputError, match=r"agreement=0\.95 can't be kept.*lower this budget"):
        lbyl.compress(net, X, budget=lbyl.Budget(agreement=0.95), restore="prune")
    with pytest.raises(lbyl.InputError, match=r"best_effort=True.*macs is a cost"):
        lbyl.Budget(macs=0.5, best_effort=True)


def test_more_is_kept_where_more_is_asked_for() -> None:
    net, x = residual(), images(2, 3, 8, 8)
    sizes = []
    for agreement in (0.8, 0.98):
        result = lbyl.compress(net, x, budget=lbyl.Budget(agreement=agreement, minimize="params"), restore="lbyl")
        sizes.append(result.report.parameters[1])
    assert sizes[0] < sizes[1]


def test_a_budget_of_accuracy_asks_the_user_s_function() -> None:
    net, calls, judged = mlp(6, 40, 40), [], []
    whole = sum(p.numel() for p in net.parameters())

    def judge(model: nn.Module) -> float:
        judged.append(model)
        calls.append(sum(p.numel() for p in model.parameters()))
        return calls[-1] / whole

    budget = lbyl.Budget(accuracy_drop=0.3)
    result = lbyl.compress(net, X, budget=budget, restore="lbyl", evaluate=judge, forecast=False)
    assert result.report.evaluation
    assert result.report.evaluation.before == 1
    assert 0.7 <= result.report.evaluation.after < 0.8
    assert len(calls) < 12
    assert calls.count(whole) == 1, "the unpruned network is judged once"
    assert len({id(model) for model in judged}) == len(judged), "and so is every smaller one"
    assert net not in judged


@pytest.mark.parametrize(
    ("net", "x", "settings", "says"),
    [
        (mlp, X, {"forecast": False}, "switched off"),
        (mlp, X, {"budget": lbyl.Budget(accuracy_drop=0.1)}, "needs evaluate"),
        (Tokens, torch.ones(2, 5, dtype=torch.long), {}, "give a ratio or a budget"),
        (mlp, X, {"restore": "coreset"}, "give a ratio"),
        (mlp, X, {"evaluate": 3}, "pass a function"),
    ],
    ids=["off", "no function", "tokens", "coreset", "no callable"],
)
def test_what_can_t_be_foretold_asks_for_a_ratio_or_a_budget(
    net: Any, x: Tensor, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(lbyl.InputError, match=says):
        lbyl.compress(net().eval(), x, **{"restore": "lbyl", **settings})


class Answers(nn.Module):
    """Returns whole numbers in place of the scores of a small network."""

    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.scores, self.answer = mlp(), answer

    def forward(self, x: Tensor) -> object:
        return self.answer(self.scores(x))


@pytest.mark.parametrize(
    "answer",
    [lambda y: y.argmax(1), lambda y: (y.topk(2).indices, 3), lambda y: {"label": y.argmax(1).int()}],
    ids=["class", "best two", "by name"],
)
def test_errors_of_whole_numbers_are_the_share_that_differs(answer: Callable[[Tensor], object]) -> None:
    net = Answers(answer).eval()
    with pytest.raises(lbyl.InputError, match=r"answers in whole numbers.*give a ratio or a budget"):
        lbyl.compress(net, X)
    made = lbyl.compress(net, X, ratio=0.8, restore="prune").model
    inputs = torch.randn(256, *X.shape[1:], generator=torch.Generator().manual_seed(3))
    theirs, ours = (output_tensors(each(inputs))[0] for each in (net, made))
    assert outputs_error(net(inputs), made(inputs)) == float((theirs != ours).double().mean()) > 0.05
    held = lbyl.LeastSquares(lbyl.Data(list(inputs.split(64))))
    told = lbyl.compress(net, X, ratio=0.8, restore=held).report
    assert told.assessment is not None
    assert told.assessment.pruned > 0
    assert told.forecast is not None
    assert told.forecast.real
    assert told.forecast.agreement == pytest.approx(1 - told.assessment.restored)


@pytest.mark.parametrize("answer", [lambda y: (y > 0).nonzero(), lambda y: [row[row > 0] for row in y]])
def test_outputs_of_other_sizes_are_not_compared(answer: Callable[[Tensor], object]) -> None:
    net = Answers(answer).eval()
    (cell,) = lbyl.compare(net, X, restores=["prune"], ratios=[0.9]).rows
    assert cell.output_error is None
    assert "can't be compared" in cell.why
    assert cell.parameters is not None
    assert cell.parameters < 1


def test_both_parts_of_complex_numbers_are_amounts() -> None:
    a, b = torch.randn(2, 40, 6, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    assert outputs_error(a, a) < 1e-6
    assert outputs_error(a, a + 0.1 * b) == pytest.approx(0.1, abs=0.02)
    net = Answers(lambda y: torch.fft.fft(y, dim=-1)).eval()
    report = lbyl.compress(net, X, ratio=0.5, restore="lbyl").report
    assert report.forecast is not None
    assert report.forecast.measure == "error"


@pytest.mark.parametrize("answer", [lambda y: y > 0, lambda y: (40 * y + 128).clamp(0, 255).byte()])
def test_masks_and_bytes_are_amounts(answer: Callable[[Tensor], Tensor]) -> None:
    report = lbyl.compress(Answers(answer).eval(), X, ratio=0.8, restore="lbyl").report
    assert report.forecast is not None
    assert report.forecast.measure == "error"
    assert report.forecast.error is not None
    assert report.forecast.error > 0.05


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"agreement": 1.0}, "agreement"),
        ({"accuracy_drop": -0.1}, "accuracy_drop"),
        ({"agreement": 0.9, "macs": 0.5}, "exactly one"),
        ({"agreement": 0.9, "minimize": "size"}, "minimize"),
        ({"macs": 0.5, "minimize": "params"}, "minimize"),
    ],
)
def test_wrong_budgets_of_quality(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(lbyl.InputError, match=says):
        lbyl.Budget(**settings)


# -- the command line ---------------------------------------------------------------------------------------


NETWORK = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))

def size(model):
    return sum(p.numel() for p in model.parameters())
"""


def test_the_command_line_keeps_nineteen_answers_in_twenty_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NETWORK)
    source, out = f"{tmp_path / 'net.py'}:net", tmp_path / "out"
    options = ["--restore", "lbyl", "--input", "2x6", "--no-latency", "--json"]
    done = CliRunner().invoke(
        app, ["compress", source, "-o", str(out), *options, "--eval", f"{tmp_path / 'net.py'}:size"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["report"]
    assert report["forecast"]["agreement"] >= 0.95
    assert report["evaluation"]["before"] == 243
    assert report["evaluation"]["after"] == report["parameters"][1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "accuracy_drop=0.1"], "--eval"),
        (["--budget", "macs=0.5", "--minimize", "params"], "--minimize"),
        (["--budget", "agreement=high"], "agreement=0.95"),
    ],
)
def test_wrong_options(tmp_path: Path, options: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["compress", "timm:resnet18", "-o", str(tmp_path / "out"), *options])
    assert done.exit_code == 2
    assert says in done.output


def test_a_sweep_takes_budgets_of_quality(tmp_path: Path) -> None:
    budgets = [lbyl.Budget(agreement=0.9), lbyl.Budget(macs=0.8)]
    swept = lbyl.sweep(residual(), images(2, 3, 8, 8), budgets, tmp_path / "out", restore="lbyl")
    assert [point.name for point in swept.made] == ["agreement-0.9", "macs-0.8"]
    assert all(point.agreement is not None for point in swept.made)
    kept = swept.points[0].agreement
    assert kept is not None
    assert kept >= 0.9
    assert replace(swept.points[0], agreement=None).agreement is None
