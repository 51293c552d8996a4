"""Mixtures of experts: every expert keeps neurons of its own, restored on the tokens that its router gives it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import lbyl
from lbyl.graph.experts import by_expert
from lbyl.io import artifact
from lbyl.runtime.grouped import grouped_product
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.macs import count_macs
from lbyl.selection import view

HIDDEN, EXPERTS, LAYERS = 32, 4, 2
SIZES = {
    **{"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False},
    **{"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_experts_per_tok": 2},
    "max_position_embeddings": 16,
}
NEURONS = {"mixtral": 48, "qwen2": 16, "olmoe": 48, "gptoss": 48}
SAID = {"mixtral": "intermediate_size", "qwen2": "moe_intermediate_size", "olmoe": "intermediate_size"}
ONLY = {"*mlp.experts": 0.5}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def build(name: str, **changes: Any) -> Any:
    hf: Any = transformers
    few, sizes = {"num_key_value_heads": 2}, {**SIZES, **changes}
    makers: dict[str, Callable[[], nn.Module]] = {
        "mixtral": lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(intermediate_size=48, num_local_experts=EXPERTS, **few, **sizes)
        ),
        "qwen2": lambda: hf.Qwen2MoeForCausalLM(
            hf.Qwen2MoeConfig(
                moe_intermediate_size=16, num_experts=EXPERTS, **few, **{"shared_expert_intermediate_size": 24, **sizes}
            )
        ),
        "qwen3": lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(moe_intermediate_size=16, num_experts=EXPERTS, head_dim=8, **few, **sizes)
        ),
        "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(intermediate_size=48, num_experts=EXPERTS, **sizes)),
        "gptoss": lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(intermediate_size=48, num_local_experts=EXPERTS, head_dim=8, **few, **sizes)
        ),
    }
    torch.manual_seed(0)
    model = makers[name]().eval()
    with torch.no_grad():  # weights as initialized give tokens almost equal outputs
        for name, parameter in model.named_parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
            if "bias" in name:
                parameter.normal_()
    return model


def tokens(seed: int = 0, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))}


def logits(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**x).logits


def kept_by_expert(result: lbyl.Result, layer: int, neurons: int) -> list[list[int]]:
    """The neurons that each expert keeps, from the plan."""
    (group,) = (g for g in result.plan.groups if g.name == f"model.layers.{layer}.mlp.experts")
    return [[k - e * neurons for k in group.keep if e * neurons <= k < (e + 1) * neurons] for e in range(EXPERTS)]


def masked(model: Any, result: lbyl.Result, neurons: int) -> Any:
    """The whole model with the cut one's output matrices, and zeros for the neurons that an expert lost."""
    twin, small = copy.deepcopy(model), result.model
    with torch.no_grad():
        for name, tensor in small.state_dict().items():
            if tensor.shape == twin.state_dict()[name].shape:  # biases elsewhere may have been recalibrated
                twin.state_dict()[name].copy_(tensor)
        for number in range(LAYERS):
            whole = twin.model.layers[number].mlp.experts
            cut: Any = small.model.layers[number].mlp.experts  # pyright: ignore
            whole.down_proj.zero_()
            for expert, keep in enumerate(kept_by_expert(result, number, neurons)):
                assert cut.down_proj[expert].shape == (HIDDEN, len(keep))
                whole.down_proj[expert][:, keep] = cut.down_proj[expert]
                both = [*keep, *(k + neurons for k in keep)]  # a gate and what it multiplies
                assert torch.equal(cut.gate_up_proj[expert], whole.gate_up_proj[expert][both])
    return twin


@pytest.mark.parametrize("restore", [None, "prune"])
@pytest.mark.parametrize("name", SAID)
def test_the_cut_model_computes_what_the_masked_one_does(name: str, restore: str | None) -> None:
    model, x = build(name), tokens()
    options: Any = {} if restore is None else {"restore": restore}
    result = lbyl.compress(model, x, ratio=ONLY, forecast=False, strict=True, **options)
    neurons = NEURONS[name]
    kept = kept_by_expert(result, 0, neurons)
    assert [len(keep) for keep in kept] == [neurons // 2] * EXPERTS
    assert len({tuple(keep) for keep in kept}) > 1  # not the same ones for all
    assert result.model.model.layers[0].mlp.experts.intermediate_dim == neurons // 2  # pyright: ignore
    for seed in (0, 1):
        wanted = logits(masked(model, result, neurons), tokens(seed))
        torch.testing.assert_close(logits(result.model, tokens(seed)), wanted, rtol=1e-4, atol=1e-4)
        assert float((wanted - logits(model, tokens(seed))).abs().max()) > 0.1


def test_biases_and_alternating_gates_follow() -> None:
    model, x = build("gptoss"), tokens()
    result = lbyl.compress(model, x, ratio=ONLY, restore="prune", forecast=False, strict=True)
    (keep, *_), old, new = kept_by_expert(result, 0, 48), model.model.layers[0].mlp, result.model.model.layers[0].mlp  # pyright: ignore
    pairs = [place for k in keep for place in (2 * k, 2 * k + 1)]
    assert torch.equal(new.experts.gate_up_proj_bias[0], old.experts.gate_up_proj_bias[0][pairs])
    assert torch.equal(new.experts.gate_up_proj[0], old.experts.gate_up_proj[0][:, pairs])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for number in range(LAYERS):
            for expert, kept in enumerate(kept_by_expert(result, number, 48)):
                gone = [k for k in range(48) if k not in kept]
                twin.model.layers[number].mlp.experts.down_proj[expert][gone] = 0
    torch.testing.assert_close(logits(result.model, x), logits(twin, x), rtol=1e-4, atol=1e-4)


def test_a_shared_expert_stays_a_multiple_of_the_others() -> None:
    model, x = build("qwen2", shared_expert_intermediate_size=32), tokens()
    result = lbyl.compress(model, x, ratio=0.4, restore="prune", forecast=False)
    small: Any = result.model.model.layers[0].mlp  # pyright: ignore
    # 9.6 neurons are 8 as a multiple of 8, so the shared expert keeps 16 and not 19.
    assert (small.experts.down_proj.shape[2], small.shared_expert.down_proj.in_features) == (8, 16)
    apart = lbyl.compress(model, x, ratio={"*.shared_expert*": 0.4}, restore="prune", forecast=False)
    assert apart.model.model.layers[0].mlp.shared_expert.down_proj.in_features == 19  # pyright: ignore


def test_the_stream_keeps_rows_that_grouped_products_take() -> None:
    model, x = build("mixtral"), tokens()
    width = model.config.hidden_size
    result = lbyl.compress(model, x, ratio=0.3, scope="all", restore="prune", strict=True, forecast=False)
    kept = {row.group: row.after for row in result.report.rows}["model.embed_tokens"]
    assert kept % 8 == 0
    assert kept < width


def test_what_is_cut_together_and_counted() -> None:
    model, x = build("mixtral"), tokens()
    graph = lbyl.inspect(model, x).graph
    group = graph.group("model.layers.0.mlp.experts")
    assert (group.width, len(set(group.blocks)), group.multiple) == (EXPERTS * 48, EXPERTS, 8)
    result = lbyl.compress(model, x, ratio={"*mlp.experts": 0.4}, restore="prune", forecast=False)
    # 28.8 neurons are 32 as a multiple of 8, so that rows have the alignment that grouped products need.
    assert result.model.model.layers[0].mlp.experts.down_proj.shape == (EXPERTS, HIDDEN, 32)  # pyright: ignore
    rows, cut = 2 * 9 * 2, 3 * HIDDEN * (48 - 32)  # two experts for each token
    before, after = result.report.macs
    assert before - after == LAYERS * rows * cut
    assert (before, after) == tuple(count_macs(net, ExampleInputs.of(x)) for net in (model, result.model))
    assert result.report.verified is not None
    assert result.report.verified < 1e-6


@pytest.mark.parametrize("name", SAID)
def test_a_saved_folder_is_loaded_by_transformers(name: str, tmp_path: Path) -> None:
    model, x = build(name), tokens()
    # OLMoE has no number for the size of a head, so its heads stay.
    ratio = {"*mlp*": 0.5} if name == "olmoe" else 0.5
    result = lbyl.compress(model, x, ratio=ratio, restore="prune", forecast=False)
    result.save(tmp_path / "out")
    notes = artifact.read_manifest(tmp_path / "out").report.notes
    assert any("loads this folder as well" in note for note in notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[SAID[name]] == NEURONS[name] // 2
    loaded = lbyl.load(tmp_path / "out", build(name))
    assert torch.equal(logits(loaded, x), logits(result.model, x))
    again = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, x), logits(result.model, x))


@contextmanager
def seen_by_experts(model: Any, layer: int) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """What the experts of a layer are given while the model runs: states, chosen experts, router's weights."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    hook = model.model.layers[layer].mlp.experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    yield calls
    hook.remove()


def neurons_of(experts: Any, expert: int, calls: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The neurons of one expert on its own tokens, times the router's weights, in float64."""
    found = []
    for states, chosen, weights in calls:
        token, place = torch.where(chosen == expert)
        gate, up = F.linear(states[token].double(), experts.gate_up_proj[expert].double()).chunk(2, -1)
        found.append(experts.act_fn(gate) * up * weights[token, place, None].double())
    return torch.cat(found)


@pytest.mark.parametrize("ridge", [1e-6, None])
def test_experts_are_chosen_and_solved_on_their_own_tokens(ridge: float | None) -> None:
    model, x = build("mixtral"), tokens()
    batches = [tokens(seed, 8, 16) for seed in range(5)]
    restore = lbyl.LeastSquares(moments=lbyl.Data(batches, batches=5), ridge=ridge)
    result = lbyl.compress(model, x, ratio=ONLY, restore=restore, criterion="energy", forecast=False)
    assert not any("of the restoration kept" in note for note in result.report.notes)
    with seen_by_experts(model, 0) as calls:
        for batch in batches[:-1]:  # the last one is held out
            logits(model, batch)
    old, new = (net.model.layers[0].mlp.experts for net in (model, result.model))  # pyright: ignore
    for expert, keep in enumerate(kept_by_expert(result, 0, 48)):
        a, u = neurons_of(old, expert, calls), old.down_proj[expert].double()
        energy = a.square().mean(0) * u.square().sum(0)
        assert sorted(energy.argsort(descending=True)[:24].tolist()) == keep
        gram, drop = a.T @ a / len(a), [k for k in range(48) if k not in keep]
        part = gram[keep][:, keep]
        # Experts with few tokens are pulled towards plain pruning.
        strength = (0.03 * (1 + len(keep) / len(a)) if ridge is None else ridge) * part.diagonal().mean()
        s = torch.linalg.solve(part + strength * torch.eye(len(keep)).double(), gram[keep][:, drop])
        torch.testing.assert_close(new.down_proj[expert].double(), u[:, keep] + u[:, drop] @ s.T, rtol=1e-3, atol=1e-3)


def test_half_precision() -> None:
    model, x = build("mixtral").bfloat16(), tokens()
    data = lbyl.Data([tokens(seed, 8, 16) for seed in range(3)])
    result = lbyl.compress(model, x, ratio=ONLY, restore=lbyl.LeastSquares(moments=data), forecast=False)
    assert result.report.assessment is not None
    assert result.report.assessment.restored < result.report.assessment.pruned
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


def test_an_expert_without_tokens_is_pruned_and_the_report_says_so() -> None:
    model, x = build("mixtral"), tokens()
    with torch.no_grad():  # this one wins nowhere
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[:3].abs_()
            layer.post_attention_layernorm.weight.zero_()
            layer.post_attention_layernorm.weight[0] = 1
            model.model.embed_tokens.weight[:, 0] = 50
    restore = lbyl.LeastSquares(moments=lbyl.Data([tokens(seed, 8, 16) for seed in range(3)]))
    result = lbyl.compress(model, x, ratio=ONLY, restore=restore, forecast=False)
    notes = [row.note for row in result.report.rows if row.group == "model.layers.0.mlp.experts"]
    assert "experts got fewer tokens than they keep neurons" in notes[0]
    keep = kept_by_expert(result, 0, 48)[3]
    old, new = (net.model.layers[0].mlp.experts for net in (model, result.model))  # pyright: ignore
    assert torch.equal(new.down_proj[3], old.down_proj[3][:, keep])
    size = old.gate_up_proj[3].square().unflatten(0, (2, 48)).sum((0, 2))
    assert keep == sorted(size.argsort(descending=True)[:24].tolist())  # by their own weights


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_experts_may_run_in_any_way_and_keep_it(how: str) -> None:
    model, x = build("mixtral"), tokens()
    model.set_experts_implementation(how)
    before = logits(model, x)
    data = lbyl.Data([tokens(seed, 8, 16) for seed in range(3)])
    result = lbyl.compress(model, x, ratio=ONLY, restore=lbyl.LeastSquares(moments=data), forecast=False)
    (row,) = (row for row in result.report.rows if row.group == "model.layers.0.mlp.experts")
    assert (row.before, row.after, row.note) == (EXPERTS * 48, EXPERTS * 24, "")
    configs = {id(net): net.config for net in (model, result.model)}  # pyright: ignore
    for net in (model, result.model):
        assert {m.config._experts_implementation for m in net.modules() if hasattr(m, "config")} == {how}
        assert all(m.config is configs[id(net)] for m in net.modules() if hasattr(m, "config"))
    assert torch.equal(logits(model, x), before)
    wanted = logits(masked(model, result, 48), x)
    torch.testing.assert_close(logits(result.model, x), wanted, rtol=1e-4, atol=1e-4)


def test_products_of_experts_in_precisions_that_pytorch_lacks() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((10, 8), (3, 8, 16)))
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)
    wanted = torch.cat([x[:4] @ weight[0], x[4:] @ weight[2]])
    for dtype in (torch.float32, torch.float64):
        found = grouped_product(x.to(dtype), weight.to(dtype), offs=ends)
        torch.testing.assert_close(found.float(), wanted)
        assert found.dtype == dtype
    assert grouped_product(x.to("meta"), weight.to("meta"), offs=ends.to("meta")).shape == (10, 16)


class Loop(nn.Module):
    """Experts in a loop, each with a slice of one weight, which is not followed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.experts = nn.Parameter(torch.randn(3, 32, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.inner(x)
        return self.last(x + sum(F.linear(F.linear(x, w).relu(), w.T) for w in self.experts))


def test_weights_that_stay_whole_are_named_with_the_reason() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    report = lbyl.compress(Loop(), x, ratio=0.5, restore="prune", forecast=False).report
    (note,) = (note for note in report.notes if "left whole" in note)
    # The residual connection that they read and write stays whole with them.
    assert note.startswith("77% of the weights are left whole (experts, first.weight and 1 more): linear")
    assert note.endswith("with a weight that the model computes")
    others = lbyl.compress(build("mixtral"), tokens(), ratio=0.5, restore="prune", forecast=False).report
    assert not any("left whole" in note for note in others.notes)


def test_channels_that_other_layers_carry_stay_shared() -> None:
    graph = lbyl.inspect(build("mixtral"), tokens()).graph
    stream = graph.group("model.embed_tokens")
    assert by_expert(graph, {}, {}) == graph
    assert {slot.blocks for slot in (*stream.carriers, *stream.consumers)} == {1}


def test_each_expert_is_ranked_by_its_own_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = view.column_energy
    monkeypatch.setattr(view, "column_energy", lambda slot, source: seen.append(source.numel()) or plain(slot, source))
    data = lbyl.Data([tokens(seed, 8, 16) for seed in range(2)])
    lbyl.compress(
        build("mixtral"), tokens(), ratio=ONLY, restore=lbyl.LeastSquares(moments=data), criterion="energy",
        forecast=False,
    )  # fmt: skip
    assert seen == [HIDDEN * 48] * (LAYERS * EXPERTS)
