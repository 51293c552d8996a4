"""Whole experts of mixtures are dropped: the others are chosen by their outputs, solved, saved and loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Block, settle
from test_experts import EXPERTS, HIDDEN, LAYERS, build, logits, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.errors import BudgetError, InputError, VerificationError
from lbyl.graph.mixtures import find_mixtures
from lbyl.moments.mixtures import Tokens, expert_scores
from lbyl.restore.experts import find_products, solve_experts, weight_change
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.routed import Routed
from lbyl.selection.experts import lowest_shares, same_share
from lbyl.surgery.cuts import Cut, cut_copy
from lbyl.surgery.experts import expert_attributes, plan_experts, verify_experts, without_experts
from lbyl.surgery.plan import Plan

PATHS = [f"model.layers.{number}.mlp.experts" for number in range(LAYERS)]
SAID = {"mixtral": "num_local_experts", "qwen3": "num_experts", "olmoe": "num_experts", "gptoss": "num_local_experts"}
THREE = lbyl.Budget(params=0.9, experts=True)
"""Three of four experts stay."""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def text(ridge: float = 0.1, batches: int = 2) -> lbyl.LeastSquares:
    """Restoration on few texts; with a huge ridge, nothing but a choice of experts on them."""
    return lbyl.LeastSquares(moments=lbyl.Data([tokens(seed, 8, 16) for seed in range(batches)]), ridge=ridge)


CHOSEN = text(ridge=1e15)


def without(model: Any, x: dict[str, Tensor], restore: Any = CHOSEN, **settings: Any) -> lbyl.Result:
    return lbyl.compress(model, x, budget=THREE, restore=restore, forecast=False, **settings)


def kept_in(result: lbyl.Result) -> list[tuple[int, ...]]:
    return [group.keep for group in result.plan.groups]


@pytest.mark.parametrize("name", SAID)
def test_the_cut_model_computes_what_the_original_does_whose_router_is_masked(name: str, tmp_path: Path) -> None:
    model, x = fresh(name), tokens()
    result = without(model, x)
    gone = [next(iter({*range(EXPERTS)} - {*keep})) for keep in kept_in(result)]
    assert [len(keep) for keep in kept_in(result)] == [EXPERTS - 1] * LAYERS
    wanted = masked_logits(model, gone, tokens(1))
    torch.testing.assert_close(logits(result.model, tokens(1)), wanted, rtol=1e-4, atol=1e-4)
    assert float((wanted - logits(model, tokens(1))).abs().max()) > 0.1
    config: Any = result.model.config
    assert (getattr(config, SAID[name]), getattr(model.config, SAID[name])) == (EXPERTS - 1, EXPERTS)
    result.save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {value for key, value in written.items() if key.endswith("_experts")} == {EXPERTS - 1}
    for loaded in (lbyl.load(tmp_path / "out", fresh(name)), type(model).from_pretrained(tmp_path / "out")):
        assert torch.equal(logits(loaded, x), logits(result.model, x))
    result.model.save_pretrained(tmp_path / "theirs")  # pyright: ignore
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "theirs"), x), logits(result.model, x))


def fresh(name: str) -> Any:
    model = build(name)
    with torch.no_grad():
        for layer in model.model.layers if name == "gptoss" else ():
            layer.mlp.router.bias.zero_()  # else two experts get every token
    return model


def masked_logits(model: Any, gone: list[int], x: dict[str, Tensor]) -> Tensor:
    """The original's logits where the scores of one expert of each layer are minus infinity."""
    plain = F.linear
    layers = [next(m for n, m in layer.mlp.named_children() if n in ("gate", "router")) for layer in model.model.layers]
    names = {id(router.weight): expert for router, expert in zip(layers, gone, strict=True)}

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = plain(x, weight, bias)
        return out if id(weight) not in names else out.index_fill(-1, torch.tensor([names[id(weight)]]), -torch.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", linear)
        return logits(model, x)


def outputs_of(experts: Any, expert: int, states: Tensor) -> Tensor:
    gate, up = F.linear(states, experts.gate_up_proj[expert]).chunk(2, -1)
    return F.linear(experts.act_fn(gate) * up, experts.down_proj[expert])


def test_scores_are_the_mean_norms_of_weighted_outputs() -> None:
    model, x = build("mixtral"), ExampleInputs.of(tokens(3, 4, 12))
    mixtures, others = find_mixtures(model, x)
    assert ([each.experts for each in mixtures], others) == (PATHS, {})
    assert {(each.count, each.chosen, each.router) for each in mixtures[:1]} == {(4, 2, "model.layers.0.mlp.gate")}
    calls: list[Any] = []
    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    found = expert_scores(model, mixtures, [x, x])[PATHS[0]]
    hook.remove()
    states, chosen, weights = calls[0]
    for expert in range(EXPERTS):
        token, place = torch.where(chosen == expert)
        norms = outputs_of(model.model.layers[0].mlp.experts, expert, states[token]).norm(dim=1) * weights[token, place]
        torch.testing.assert_close(found[expert], norms.mean().double(), rtol=1e-4, atol=1e-5)
    keep = kept_in(without(model, dict(x.kwargs), text()))[0]
    assert len(keep) == 3


def test_counts_for_a_budget() -> None:
    counts, one = {"a": 8, "b": 4}, {"a": 1.0, "b": 1.0}
    assert same_share(counts, {"a": 2, "b": 2}, one, 3) == {"a": 6, "b": 3}
    assert same_share(counts, {"a": 7, "b": 4}, one, 3) == {"a": 7, "b": 4}  # the caller sees that it is too little
    scores = {"a": torch.tensor([1.0, 1.0, 8.0]), "b": torch.tensor([3.0, 3.0, 4.0])}
    assert lowest_shares(scores, {"a": 2, "b": 1}, one, 2) == {"a": 2, "b": 2}
    assert lowest_shares(scores, {"a": 1, "b": 1}, one, 0) == {"a": 3, "b": 3}


@pytest.mark.parametrize("rows", [5, 40])
def test_a_change_of_weights_is_the_ridge_solution(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    z, r = (torch.randn(rows, n, generator=generator).double() for n in (12, 3))
    z *= torch.logspace(-2, 2, 12).double()
    wanted = torch.linalg.solve(z.T @ z + 0.1 * torch.diag(z.square().sum(0)), z.T @ r)
    torch.testing.assert_close(weight_change(z, r, 0.1), wanted)
    assert float(weight_change(z, r, 1e9).abs().max()) < 1e-6


class Mixed(nn.Module):
    """Two linear experts with biases, in the form of transformers' experts."""

    def __init__(self, squared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(2, 4, 6))
        self.down, self.bias = nn.Parameter(torch.randn(2, 6, 3)), nn.Parameter(torch.randn(2, 3))
        self.squared = squared

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        for expert in range(2):
            token, place = torch.where(chosen == expert)
            factor = weights[token, place, None].square() if self.squared else weights[token, place, None]
            made = (x[token] @ self.up[expert]).relu() @ self.down[expert] + self.bias[expert]
            out.index_add_(0, token, made * factor)
        return out


def calls_of(seed: int, count: int = 60) -> Routed:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, 2, generator=generator)
    return Routed(torch.randn(count, 4, generator=generator), torch.tensor([[0, 1]] * count), weights, (0, 2, 1))


def test_experts_with_biases_find_what_gives_the_wanted_outputs() -> None:
    module, other, routed = Mixed(), Mixed(), calls_of(1)
    products = find_products(module, routed)
    assert not isinstance(products, str)
    assert (products.weight, products.bias, products.transposed) == ("down", "bias", True)
    with torch.no_grad():
        other.down.add_(torch.randn(2, 6, 3))
        other.bias.add_(torch.randn(2, 3))
        wanted = other(*routed.arguments).detach()
    values, (before, after) = solve_experts(module, products, Tokens(routed, wanted), 1e-4)
    assert after < 0.25 * before
    solved = torch.func.functional_call(module, values, routed.arguments).detach()
    torch.testing.assert_close(float((solved - wanted).norm() / wanted.norm()), after, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), Mixed().parameters(), strict=True))


def test_a_mixture_that_is_no_weighted_sum_is_left_as_it_is() -> None:
    assert find_products(Mixed(squared=True), calls_of(1)) == "its output is no sum of its experts' outputs"


def test_restoration_lowers_the_error_and_is_told() -> None:
    model, x = build("qwen2"), tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    restored = without(model, x, text(0.3, batches=5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert restored.report.assessment is not None
    assert restored.report.assessment.restored < restored.report.assessment.pruned
    rows = restored.report.rows
    assert [(row.group, row.before, row.after) for row in rows] == [
        (f"model.layers.{i}.mlp.gate", 4, 3) for i in (0, 1)
    ]
    assert all("the others restored (ridge 0.3)" in row.note for row in rows)
    assert all(row.errors is not None and row.errors[1] < row.errors[0] for row in rows)
    assert any(note.startswith("whole experts: 2 of 8 are dropped") for note in restored.report.notes)
    assert restored.report.verified is not None
    again = without(model, x, text(0.3, batches=5))
    assert all(torch.equal(a, b) for a, b in zip(restored.model.parameters(), again.model.parameters(), strict=True))


def test_experts_and_neurons_in_turn_load_from_the_first_model(tmp_path: Path) -> None:
    model, x = build("mixtral"), tokens()
    result = without(model, x)
    for number in range(3):
        settings: Any = (
            {"ratio": {"*mlp.experts": 0.3}} if number != 1 else {"budget": lbyl.Budget(params=0.9, experts=True)}
        )
        restore: Any = "prune" if "ratio" in settings else CHOSEN
        result = lbyl.compress(result.model, x, restore=restore, forecast=False, **settings)
    assert result.model.model.layers[0].mlp.experts.down_proj.shape == (2, HIDDEN, 24)  # pyright: ignore
    result.save(tmp_path / "out")
    loaded = lbyl.load(tmp_path / "out", build("mixtral"))
    assert torch.equal(logits(loaded, x), logits(result.model, x))
    assert Plan.from_json(result.plan.to_json()).cuts == result.plan.cuts


def test_layers_get_narrower_where_experts_can_not_save_enough(tmp_path: Path) -> None:
    model, x = build("mixtral"), tokens()
    budget = lbyl.Budget(params=0.42, experts=True)
    result = lbyl.compress(model, x, budget=budget, restore=text(), forecast=False)
    experts = [layer.mlp.experts for layer in result.model.model.layers]  # pyright: ignore
    assert {each.down_proj.shape[0] for each in experts} == {2}
    assert {each.down_proj.shape[2] < build("mixtral").config.intermediate_size for each in experts} == {True}
    before, after = result.report.parameters
    assert 0.4 < after / before <= 0.42
    assert {row.group for row in result.report.rows} > {f"model.layers.{i}.mlp.gate" for i in (0, 1)}
    assert (before, result.report.macs) != (after, None)
    result.save(tmp_path / "out")
    for loaded in (lbyl.load(tmp_path / "out", build("mixtral")), type(model).from_pretrained(tmp_path / "out")):
        assert torch.equal(logits(loaded, x), logits(result.model, x))


def test_blocks_experts_and_channels_are_weighed_against_each_other(tmp_path: Path) -> None:
    model, x = build("mixtral", num_hidden_layers=3), tokens()
    budget = lbyl.Budget(params=0.6, experts=True, depth=True)
    result = lbyl.compress(model, x, budget=budget, restore=text(), forecast=False)
    (told,) = [note for note in result.report.notes if note.startswith("depth against experts and width")]
    for way in (r"without 0 blocks and with narrower layers", r"without \d+ experts?", r"without \d+ blocks?(,|$)"):
        assert re.search(way, told), told
    effects = [float(found) for found in re.findall(r"([\d.e-]+) without", told)]
    assert effects == sorted(effects)
    assert result.report.parameters[1] <= 0.6 * result.report.parameters[0]
    result.save(tmp_path / "out")
    loaded = lbyl.load(tmp_path / "out", build("mixtral", num_hidden_layers=3))
    assert torch.equal(logits(loaded, x), logits(result.model, x))


def test_layers_may_keep_different_numbers() -> None:
    model, x = build("mixtral"), tokens()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:2].mul_(1e-3)
    budget = replace(THREE, params=0.8, uniform_layers=False)
    result = lbyl.compress(model, x, budget=budget, restore=CHOSEN, forecast=False)
    assert kept_in(result) == [(2, 3)] or [len(keep) for keep in kept_in(result)] != [3, 3]
    assert any("it can't express the new ones" in note for note in result.report.notes)
    stays = lbyl.compress(model, x, budget=replace(THREE, exclude=("*layers.0*",)), restore=CHOSEN, forecast=False)
    assert [group.name for group in stays.plan.groups] == ["model.layers.1.mlp.gate"]


def test_a_network_that_computes_something_else_is_refused() -> None:
    model, x = build("mixtral"), ExampleInputs.of(tokens())
    mixtures, _ = find_mixtures(model, x)
    kept = dict.fromkeys(PATHS, (0, 1, 2))
    cuts, numbers = plan_experts(mixtures, kept), expert_attributes(model, mixtures, kept)
    assert verify_experts(model, cut_copy(model, cuts, numbers), x, mixtures, kept) < 1e-5
    wrong = [replace(cut, keep=(1, 2, 3)) if "gate.weight" in cut.parameter else cut for cut in cuts]
    with pytest.raises(VerificationError, match="without 2 experts the network computes something else"):
        verify_experts(model, cut_copy(model, wrong, numbers), x, mixtures, kept)
    with without_experts(model, mixtures, kept) as work:
        assert float((work(**x.kwargs).logits - logits(model, dict(x.kwargs))).detach().abs().max()) > 0.1


def test_cuts_within_experts_are_composed_with_dropped_ones() -> None:
    empty = Plan((), (), {}, {}, None, "", "")
    first = replace(empty, cuts=(Cut("w", 0, 3, (0, 2), experts=True),))
    then = replace(empty, cuts=(Cut("w", 1, 8, (1, 2, 4, 7), blocks=2),))
    both = then.after(first)
    assert both is not None
    module = nn.Module()
    module.w = nn.Parameter(torch.arange(24.0).reshape(3, 4, 2))
    wanted = torch.stack([module.w[0, [1, 2]], module.w[2, [0, 3]]])
    assert torch.equal(cut_copy(module, both.cuts).w, wanted)  # pyright: ignore


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "fewer than a token needs": (
        lambda: without_few(lbyl.Budget(params=0.1, experts=True)),
        r"layers.0.mlp.experts: 2 of 4 experts must stay \(2 for each token.*can't",
    ),
    "macs": (lambda: lbyl.Budget(macs=0.5, experts=True), "each token gets as many experts as before"),
    "heads": (lambda: lbyl.Budget(params=0.5, experts=True, head_dim=True), "give head_dim or experts, but not both"),
    "a number": (lambda: lbyl.Budget(params=0.5, experts=2), r"Budget\(experts=2\)"),  # pyright: ignore
    "criterion": (lambda: without_few(THREE, criterion="l2"), "leave out criterion"),
    "submodule": (lambda: without_few(THREE, submodule="model"), "give only one"),
    "analysis": (lambda: without_few(THREE, analysis="kept"), "leave out analysis"),
    "no mixture": (
        lambda: lbyl.compress(nn.Linear(4, 4), torch.ones(1, 4), budget=THREE),
        "Linear has no mixture of experts that could lose some .*leave out experts",
    ),
    "no mixture, with depth": (
        lambda: lbyl.compress(
            settle(nn.Sequential(*(Block(4, 4) for _ in range(3)))),
            torch.ones(2, 4, 6, 6),
            budget=replace(THREE, depth=True),
        ),
        "Sequential has no mixture of experts that could lose some .*leave out experts",
    ),
    "all excluded": (lambda: without_few(replace(THREE, exclude=("*",))), "exclude matches all of them"),
}


def without_few(budget: lbyl.Budget, **settings: Any) -> Any:
    return lbyl.compress(build("mixtral"), tokens(), budget=budget, forecast=False, **{"restore": CHOSEN, **settings})


@pytest.mark.parametrize("name", BAD)
def test_what_can_not_be_is_refused(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(InputError, match=message) as found:
        call()
    assert "\n" not in str(found.value)
    assert isinstance(found.value, BudgetError) == (name == "fewer than a token needs")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "macs=0.5"], "budget of size"),
        (["--ratio", "0.5"], "budget of size"),
        (["--budget", "params=0.5", "--head-dim"], "give --experts or --head-dim"),
        (["--budget", "params=0.5", "--low-memory"], "--experts"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compress", "hf:nowhere", "--experts", *options, "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
