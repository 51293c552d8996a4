"""Hugging Face models: where the saved report says so, `from_pretrained` loads the folder and computes the same."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nets import images, mlp
from torch import Tensor, nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.io import artifact
from lbyl.io.huggingface import CONFIG, is_pretrained_model
from lbyl.runtime.inputs import ExampleInputs, output_tensors

TOKENS = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
NEURONS = {"bert": "*intermediate*", "gpt2": "*c_fc*"}
"""Groups of hidden neurons, where heads can't be said."""
HALF, QUARTER = ({"*q_proj": ratio, "*gate_proj": ratio} for ratio in (0.5, 0.25))
"""Heads and hidden neurons of decoders; the stream between their layers stays whole."""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def build(name: str, **changes: Any) -> nn.Module:
    hf: Any = transformers
    makers: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(num_attention_heads=4, **SIZES, **TOKENS, **changes)),
        "vit": lambda: hf.ViTForImageClassification(
            hf.ViTConfig(num_attention_heads=4, image_size=16, patch_size=8, **SIZES, **changes)
        ),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=24, n_layer=2, n_head=4, **TOKENS, **changes)),
        "llama": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(num_attention_heads=8, num_key_value_heads=4, **SIZES, **TOKENS, **changes)
        ),
        "qwen2": lambda: hf.Qwen2ForCausalLM(
            hf.Qwen2Config(num_attention_heads=8, num_key_value_heads=4, **SIZES, **TOKENS, **changes)
        ),
        "qwen3": lambda: hf.Qwen3ForCausalLM(
            hf.Qwen3Config(num_attention_heads=8, num_key_value_heads=4, head_dim=4, **SIZES, **TOKENS, **changes)
        ),
    }
    torch.manual_seed(0)
    return makers[name]().eval()


def inputs_of(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": images(2, 3, 16, 16)}
    return {"input_ids": torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))}


def saved(name: str, folder: Path, ratio: Any = 0.25, **changes: Any) -> tuple[lbyl.Result, str]:
    """A pruned model in a folder, and what the saved report says of transformers."""
    result = lbyl.compress(
        build(name, **changes), inputs_of(name), ratio=ratio, scope="all", restore="prune", forecast=False
    )
    result.save(folder)
    (note,) = (n for n in artifact.read_manifest(folder).report.notes if "from_pretrained" in n)
    assert note in (folder / artifact.CARD).read_text().replace("\\", "")  # Markdown is escaped
    return result, note


LOADABLE: dict[str, tuple[str, Any, dict[str, Any], dict[str, int]]] = {
    # model, ratio, other settings, what config.json must say
    "bert, neurons": ("bert", {NEURONS["bert"]: 0.25}, {}, {"intermediate_size": 24, "num_attention_heads": 4}),
    "bert, untied": ("bert", {NEURONS["bert"]: 0.25}, {"tie_word_embeddings": False}, {"intermediate_size": 24}),
    "vit, heads and neurons": (
        "vit", {"*": 0.25, "*patch_embeddings*": 0}, {},
        {"intermediate_size": 24, "num_attention_heads": 3, "head_dim": 8, "hidden_size": 32},
    ),
    "vit, stream too": ("vit", 0.25, {}, {"intermediate_size": 24, "num_attention_heads": 3, "hidden_size": 24}),
    "bert, tied stream too": (
        "bert", 0.25, {}, {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 3},
    ),
    "gpt2, tied stream too": ("gpt2", 0.25, {}, {"n_embd": 18, "n_head": 3}),
    "gpt2, neurons": ("gpt2", {NEURONS["gpt2"]: 0.25}, {}, {"n_inner": 72, "n_head": 4}),
    "llama": ("llama", HALF, {}, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}),
    "llama, tied": (
        "llama", HALF, {"tie_word_embeddings": True}, {"num_attention_heads": 4, "intermediate_size": 16},
    ),
    "llama, stream too": ("llama", 0.25, {}, {"hidden_size": 24, "intermediate_size": 24, "rms_norm_eps": 1e-6 / 0.75}),
    "qwen2": ("qwen2", HALF, {}, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}),
    "qwen3": ("qwen3", QUARTER, {}, {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADABLE)
def test_from_pretrained_loads_and_computes_the_same(case: str, tmp_path: Path) -> None:
    name, ratio, changes, said = LOADABLE[case]
    result, note = saved(name, tmp_path / "out", ratio, **changes)
    assert "loads this folder as well" in note
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert {key: config[key] for key in said} == said
    assert config["architectures"] == [type(result.model).__name__]
    kind: Any = type(result.model)
    again = kind.from_pretrained(tmp_path / "out")
    x = ExampleInputs.of(inputs_of(name))
    with torch.no_grad():
        wanted, found = (output_tensors(x.call(net)) for net in (result.model, again))
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b)
    body = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(body).__name__.endswith("Model")
    loaded = lbyl.load(tmp_path / "out", build(name, **changes))
    with torch.no_grad():
        assert all(map(torch.equal, output_tensors(x.call(loaded)), wanted))


UNSAYABLE: dict[str, tuple[str, Any, str]] = {
    "bert, heads": ("bert", {"*query": 0.25}, "hidden_size is one number"),
    "gpt2, heads": ("gpt2", {"*c_attn": 0.25}, "n_embd is one number"),
    "llama, heads that do not divide": ("llama", QUARTER, "no model with these shapes"),
    "llama, layers apart": (
        "llama", {"*layers.0.mlp*": 0.25, "*layers.1.mlp*": 0.5},
        "intermediate_size is one number for all layers, but layers keep 16 to 24",
    ),
    "vit, one layer": (
        "vit", {"*layers.0.mlp*": 0.25}, "intermediate_size is one number for all layers, but layers keep 24 to 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_no_configuration_says(case: str, tmp_path: Path) -> None:
    name, ratio, words = UNSAYABLE[case]
    _, note = saved(name, tmp_path / "out", ratio)
    assert words in note
    assert "lbyl.load can" in note
    assert not (tmp_path / "out" / CONFIG).exists()


@pytest.mark.parametrize("uniform", [None, True, False])
def test_a_budget_gives_all_layers_one_width(uniform: bool | None, tmp_path: Path) -> None:
    model: Any = build("llama")
    with torch.no_grad():  # the second layer says next to nothing
        model.model.layers[1].mlp.down_proj.weight.mul_(0.01)
    budget = lbyl.Budget(params=0.8, uniform_layers=uniform)
    result = lbyl.compress(model, inputs_of("llama"), budget=budget, restore="prune", forecast=False)
    small: Any = result.model
    widths = {layer.mlp.gate_proj.out_features for layer in small.model.layers}
    assert len(widths) == (2 if uniform is False else 1)
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / CONFIG).exists() == (uniform is not False)


@pytest.mark.parametrize(
    ("limits", "width"),
    [({}, 132), ({"round_to": 1}, 134), ({"round_to": 8}, 136), ({"max_ratio": 0.322}, 138)],
    ids=["by default", "named", "named coarse", "where no multiple meets the budget"],
)
def test_widths_of_language_models_suit_matrix_units(limits: dict[str, Any], width: int) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=201)).eval()
    neurons = model.model.layers[0].mlp.down_proj.weight.numel() * 3
    share = 1 - 0.33 * neurons / model.num_parameters()
    budget = lbyl.Budget(params=share, exclude=("*attn*",), **{"max_ratio": 0.35} | limits)
    result = lbyl.compress(model, inputs_of("llama"), budget=budget, restore="prune", forecast=False)
    assert result.model.config.intermediate_size == width


def test_the_precision_is_that_of_the_weights(tmp_path: Path) -> None:
    model: Any = build("bert").to(torch.float16)
    lbyl.compress(model, inputs_of("bert"), ratio={NEURONS["bert"]: 0.5}, restore="prune", forecast=False).save(
        tmp_path / "out"
    )
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float16"
    assert type(model).from_pretrained(tmp_path / "out").dtype == torch.float16


def test_weights_that_do_not_come_back_are_no_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = transformers.BertForMaskedLM
    load = kind.from_pretrained

    def other(*args: Any, **kwargs: Any) -> nn.Module:
        model = load(*args, **kwargs)
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.bias.add_(1)
        return model

    monkeypatch.setattr(kind, "from_pretrained", other)
    _, note = saved("bert", tmp_path / "out", {NEURONS["bert"]: 0.5})
    assert "bert.encoder.layer.1.output.dense.bias differs after loading" in note
    assert not (tmp_path / "out" / CONFIG).exists()


def test_a_configuration_that_does_not_fit_its_model(tmp_path: Path) -> None:
    model: Any = build("bert")
    model.config.intermediate_size = 30
    result = lbyl.compress(model, inputs_of("bert"), ratio={NEURONS["bert"]: 0.5}, restore="prune", forecast=False)
    note = artifact.read_manifest(result.save(tmp_path / "out")).report.notes[-1]
    assert "a model built from its BertConfig is not the unpruned one" in note


def test_the_configuration_of_the_result_says_its_widths(tmp_path: Path) -> None:
    model: Any = build("llama")
    before = model.config.to_dict()
    result = lbyl.compress(model, inputs_of("llama"), ratio=HALF, restore="prune", forecast=False)
    small: Any = result.model
    assert model.config.to_dict() == before
    assert all(getattr(m, "config", model.config) is model.config for m in model.modules())
    assert (small.config.intermediate_size, small.config.num_key_value_heads) == (16, 2)
    assert all(getattr(m, "config", small.config) is small.config for m in small.modules())
    small.save_pretrained(tmp_path / "own")
    again = type(small).from_pretrained(tmp_path / "own")
    assert all(map(torch.equal, again.state_dict().values(), small.state_dict().values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frequencies_that_were_rounded_are_those_of_the_configuration(dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = build("llama").to(dtype)
    result = lbyl.compress(model, inputs_of("llama"), ratio=HALF, restore="prune", forecast=False)
    result.save(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out", dtype=dtype)
    assert all(map(torch.equal, again.state_dict().values(), result.model.state_dict().values()))


def test_widths_that_no_configuration_says_are_told_of(tmp_path: Path) -> None:
    model: Any = build("llama")
    result = lbyl.compress(model, inputs_of("llama"), ratio={"*layers.0.mlp*": 0.5}, restore="prune", forecast=False)
    (note,) = (note for note in result.report.notes if "model.config" in note)
    assert "intermediate_size is one number for all layers, but layers keep 16 to 32" in note
    small: Any = result.model
    assert small.config.to_dict() == model.config.to_dict()


def test_what_stands_beside_the_weights_is_copied_along(tmp_path: Path) -> None:
    model: Any = build("llama")
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / "base" / name).write_text(f"the text of {name}")
    (tmp_path / "base" / "training.log").write_text("nothing of interest")
    loaded: Any = type(model).from_pretrained(tmp_path / "base")
    folder = lbyl.compress(loaded, inputs_of("llama"), ratio=HALF, restore="prune", forecast=False).save(
        tmp_path / "out"
    )
    assert (folder / "tokenizer.json").read_text() == "the text of tokenizer.json"
    assert (folder / "chat_template.jinja").is_file()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert not (folder / "training.log").exists()


def test_other_models_have_no_configuration(tmp_path: Path) -> None:
    model = mlp(6, 8)
    assert not is_pretrained_model(model)
    assert not is_pretrained_model(torch.nn.Identity())
    model.config = {"intermediate_size": 8}  # pyright: ignore
    result = lbyl.compress(model, images(2, 6), restore="prune", ratio=0.5, forecast=False)
    folder = result.save(tmp_path / "out")
    assert not (folder / CONFIG).exists()
    assert artifact.read_manifest(folder).report == result.report


def test_the_command_line_says_it(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        textwrap.dedent(f"""
            import transformers

            def build():
                return transformers.BertModel(
                    transformers.BertConfig(num_attention_heads=4, **{ {**SIZES, **TOKENS}!r})
                )
        """)
    )
    for number, (ratio, words) in enumerate(
        {"*intermediate*=0.5": "transformers loads this folder as well", "0.5": "can't load this folder"}.items()
    ):
        args = ["compress", f"{tmp_path / 'net.py'}:build", "--input", "int64:1x6", "--restore", "prune"]
        result = CliRunner().invoke(app, [*args, "--ratio", ratio, "-o", str(tmp_path / str(number))])
        assert result.exit_code == 0, result.output
        assert words in re.sub(r"\s+", " ", result.stdout)


def test_encoder_and_decoder_keep_their_own_configurations() -> None:
    shape = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24, "num_layers": 1}
    torch.manual_seed(0)
    net = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape)).eval()
    inputs = {"input_ids": torch.arange(3, 9)[None], "decoder_input_ids": torch.arange(3, 7)[None]}
    model = lbyl.compress(net, inputs, ratio=0.5, restore="prune", forecast=False).model
    for own, before in ((model.decoder, net.decoder), (model.encoder, net.encoder)):
        assert own.config.d_ff == model.config.d_ff == 12
        assert (own.config.is_decoder, own.config.use_cache) == (before.config.is_decoder, before.config.use_cache)
    assert net.decoder.config.d_ff == 24
    assert model(**inputs).logits.shape == (1, 4, 32)
    assert model.generate(inputs["input_ids"], max_new_tokens=3, decoder_start_token_id=0).shape[1] <= 4


def test_a_pooler_stays_whole_so_that_from_pretrained_loads_the_result(tmp_path: Path) -> None:
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    net = transformers.BertForSequenceClassification(transformers.BertConfig(**shape, vocab_size=40)).eval()
    inputs, asked = {"input_ids": torch.arange(3, 9)[None]}, {"restore": "prune", "forecast": False}
    result = lbyl.compress(net, inputs, budget=lbyl.Budget(params=0.9, exclude=("*attention*",)), **asked)
    assert any(note.startswith("bert.pooler.dense: left whole") for note in result.report.notes)
    assert {row.group for row in result.report.rows} == {f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)}
    result.save(tmp_path / "out")
    again = type(net).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(**inputs).logits, result.model(**inputs).logits)
    free = lbyl.Budget(params=0.9, exclude=("*attention*",), uniform_layers=False)
    assert not any("left whole, for" in note for note in lbyl.compress(net, inputs, budget=free, **asked).report.notes)
