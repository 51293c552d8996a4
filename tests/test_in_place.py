"""A language model in memory becomes smaller itself, one layer at a time, to what `compress` makes of a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_folder import PLAIN, SIZES, batches, close, in_memory, same, write
from torch import nn

import lbyl
from lbyl.pipeline.layerwise import run

HF: Any = transformers


def loaded(folder: Path) -> Any:
    return HF.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    write(place)
    return place


@pytest.mark.parametrize(
    ("kind", "dtype", "more", "within"),
    [
        ("Llama", torch.float32, {"tie_word_embeddings": True}, 0.0),
        ("Mistral", torch.bfloat16, {}, 0.0),
        ("Qwen3", torch.float32, {"head_dim": 16}, 1e-5),
        ("Mixtral", torch.float32, {"num_local_experts": 4, "intermediate_size": 96}, 1e-5),
    ],
)
def test_the_same_as_beside_the_model(
    kind: str, dtype: torch.dtype, more: dict[str, Any], within: float, tmp_path: Path
) -> None:
    write(tmp_path / "whole", kind, dtype, num_hidden_layers=2, **more)
    expected = in_memory(tmp_path / "whole", lbyl.LeastSquares(renorm=False, sequential=False), ratio=0.25)
    model = loaded(tmp_path / "whole")
    head, layer = model.lm_head.weight, model.model.layers[0]
    result = lbyl.compress_in_place(
        model, ratio=0.25, data=batches(), restore=lbyl.LeastSquares(renorm=False, sequential=False)
    )
    assert result.model is model
    assert model.lm_head.weight is head
    assert model.model.layers[0] is layer
    assert close(model.state_dict(), expected.model.state_dict(), within)
    assert result.plan.groups == expected.plan.groups
    assert result.report.parameters == expected.report.parameters
    assert all(parameter.requires_grad for parameter in model.parameters())
    ids = batches()[0]["input_ids"]
    torch.testing.assert_close(model(ids).logits, expected.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_it_is_saved_like_any_other(llama: Path, tmp_path: Path) -> None:
    model = loaded(llama).train()
    result = lbyl.compress_in_place(model, budget=lbyl.Budget(params=0.8), data=batches())
    assert 0.78 < result.report.parameters[1] / result.report.parameters[0] <= 0.8
    assert sum(p.numel() for p in model.parameters()) == result.report.parameters[1]
    assert model.training
    model.eval()
    assert any("hidden neurons" in note for note in result.report.notes)
    model.save_pretrained(tmp_path / "theirs")
    result.save(tmp_path / "ours")
    ids = batches()[0]["input_ids"]
    for again in (loaded(tmp_path / "theirs"), lbyl.load(tmp_path / "ours", loaded(llama))):
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert model.generate(ids[:2], max_new_tokens=3, do_sample=False).shape == (2, 35)


def test_a_second_time_the_plan_starts_from_the_unpruned_model(llama: Path) -> None:
    model = loaded(llama)
    lbyl.compress_in_place(model, ratio=0.25, data=batches())
    second = lbyl.compress_in_place(model, ratio={"*.mlp.*": 0.25}, data=batches())
    assert any("starts from its unpruned architecture" in note for note in second.report.notes)
    assert second.plan.architecture["model.layers.0.mlp.down_proj.weight"] == (64, 160)
    assert model.config.intermediate_size == 90


def test_without_data_the_model_writes_text_itself(llama: Path) -> None:
    model = loaded(llama)
    result = lbyl.compress_in_place(model, ratio={"*.mlp.*": 0.25})
    assert any("that the model wrote itself" in note for note in result.report.notes)
    assert model.config.intermediate_size == 120


def test_an_error_on_the_way_says_which_layers_are_smaller(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inner = loaded(llama), run.compress

    def second_fails(network: nn.Module, *args: Any, **kwargs: Any) -> lbyl.Result:
        if "model.layers.1.mlp.up_proj" in dict(network.named_modules()):
            raise lbyl.SurgeryError("no room")
        return inner(network, *args, **kwargs)

    monkeypatch.setattr(run, "compress", second_fails)
    with pytest.raises(lbyl.SurgeryError, match=r"no room\. These layers of the model are smaller already: 0"):
        lbyl.compress_in_place(model, ratio=0.25, data=batches())
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert widths == [120, 160, 160]
    assert model(batches()[0]["input_ids"]).logits.isfinite().all()


def shared(model: Any) -> Any:
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def moved(model: Any) -> Any:
    model.model.layers[0]._hf_hook = object()
    return model


def not_finite(model: Any) -> Any:
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (shared, {"ratio": 0.25}, "up_proj\\.weight is also a weight of layer 0"),
        (moved, {"ratio": 0.25}, "accelerate moves weights"),
        (not_finite, {"ratio": 0.25}, "holds NaN"),
        (None, {}, "either a ratio or a budget"),
        (None, {"ratio": 0.25, "data": batches()[:1]}, "at least two batches"),
        (None, {"ratio": 0.25, "data": 3}, "data is"),
        (None, {"ratio": 0.25, "restore": "lbyl"}, "restore is"),
        (None, {"budget": lbyl.Budget(macs=0.5)}, "layer by layer, a budget is"),
    ],
)
def test_what_does_not_go_is_said_before_anything_changes(
    change: Any, settings: dict[str, Any], words: str, llama: Path
) -> None:
    model = loaded(llama)
    model = change(model) if change else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(lbyl.InputError, match=words):
        lbyl.compress_in_place(model, **{"data": batches(), **settings})
    assert same(
        {name: tensor.nan_to_num(9) for name, tensor in model.state_dict().items()},
        {name: tensor.nan_to_num(9) for name, tensor in before.items()},
    )


def test_other_networks_are_refused() -> None:
    with pytest.raises(lbyl.InputError, match=r"lbyl\.compress takes it as a whole"):
        lbyl.compress_in_place(nn.Sequential(nn.Linear(4, 4)), ratio=0.5)
    sizes = {name: size for name, size in SIZES.items() if name in ("vocab_size", "bos_token_id", "eos_token_id")}
    with pytest.raises(lbyl.InputError, match=r"lbyl\.compress takes it as a whole"):
        lbyl.compress_in_place(HF.GPT2LMHeadModel(HF.GPT2Config(n_embd=32, n_layer=1, n_head=2, **sizes)), ratio=0.5)


def test_the_defaults_are_those_of_least_squares(llama: Path) -> None:
    first, second = loaded(llama), loaded(llama)
    lbyl.compress_in_place(first, ratio=0.25, data=batches(), restore=PLAIN)
    lbyl.compress_in_place(second, ratio=0.25, data=batches())
    assert same(first.state_dict(), second.state_dict())
