"""Numbers of configurations that are derived, of single stages, or read-only, and what is said where none fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nets import images
from torch import Tensor, nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.io import artifact
from lbyl.io.config_numbers import config_from
from lbyl.runtime.inputs import ExampleInputs, output_tensors

hf: Any = transformers
TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
STAGES = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1], "num_labels": 4}
BAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 4}
LFM2 = {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"], "block_ffn_dim_multiplier": 1.0}

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**SIZES, **TOKENS)),
    "falcon, grouped": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**SIZES | {"num_attention_heads": 4}, num_kv_heads=2, new_decoder_architecture=True, **TOKENS)
    ),
    "bamba": lambda: hf.BambaForCausalLM(
        hf.BambaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, attn_layer_indices=[1], **BAMBA, **TOKENS)
    ),
    "recurrentgemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(
            **SIZES | {"num_hidden_layers": 3}, num_key_value_heads=1, intermediate_size=48, lru_width=16, **TOKENS
        )
    ),
    "lfm2": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(**SIZES, intermediate_size=96, block_multiple_of=8, **LFM2, **TOKENS)
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=16, n_layer=1, n_head=2, **TOKENS)),
    "convnextv2": lambda: hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(**STAGES)),
    "resnet": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, layer_type="basic", **STAGES)),
    "poolformer": lambda: hf.PoolFormerForImageClassification(hf.PoolFormerConfig(**STAGES)),
    "wav2vec2": lambda: hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            **SIZES, intermediate_size=24, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 4), vocab_size=20,
            num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
        )
    ),
}  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[name]().eval()


def inputs_of(model: Any) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": images(2, 3, 64, 64)}
    if model.main_input_name == "input_values":
        return {"input_values": images(2, 400)}
    return {"input_ids": torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))}


def saved(model: nn.Module, folder: Path, ratio: Any) -> tuple[lbyl.Result, str]:
    """A pruned model in a folder, and what the saved report says of transformers."""
    scope: Any = "inner" if isinstance(ratio, dict) else "all"
    result = lbyl.compress(model, inputs_of(model), ratio=ratio, scope=scope, restore="prune", forecast=False)
    result.save(folder)
    (note,) = (note for note in artifact.read_manifest(folder).report.notes if "from_pretrained" in note)
    return result, note


LOADABLE: dict[str, tuple[str, Any, dict[str, Any]]] = {
    # model, ratio, what config.json must say
    "read-only size of heads": ("falcon", {"*dense_h_to_4h": 0.5}, {"ffn_hidden_size": 32, "num_attention_heads": 2}),
    "heads of the stream": ("falcon", 0.5, {"hidden_size": 8, "num_attention_heads": 1, "ffn_hidden_size": 32}),
    "grouped heads of the stream": ("falcon, grouped", 0.5, {"num_attention_heads": 2, "num_kv_heads": 1}),
    "infinity": ("bamba", {"*feed_forward*": 0.5}, {"intermediate_size": 12}),
    "halved": ("recurrentgemma", {"*mlp*": 0.25}, {"intermediate_size": 36}),
    "rounded to a multiple": ("lfm2", {"*feed_forward*": 0.25}, {"intermediate_size": 72}),
    "stages": ("convnextv2", 0.5, {"hidden_sizes": [4, 8, 8, 12]}),
    "stages and a stem": ("resnet", 0.5, {"hidden_sizes": [4, 8, 8, 12], "embedding_size": 4}),
    "stages without attention": ("poolformer", 0.5, {"hidden_sizes": [4, 8, 8, 12]}),
}


@pytest.mark.parametrize("case", LOADABLE)
def test_the_numbers_are_found(case: str, tmp_path: Path) -> None:
    name, ratio, said = LOADABLE[case]
    model = build(name)
    result, note = saved(model, tmp_path / "out", ratio)
    assert "loads this folder as well" in note
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in said} == said
    kind: Any = type(model)
    x = ExampleInputs.of(inputs_of(model))
    with torch.no_grad():
        wanted, found = (output_tensors(x.call(net)) for net in (result.model, kind.from_pretrained(tmp_path / "out")))
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b)


UNSAYABLE: dict[str, tuple[str, Any, str]] = {
    "whole widths of layers": (
        "bloom", {"*mlp*": 0.3},
        "hidden_size is one number for all layers, but transformer.h.0.mlp.dense_4h_to_h keeps 44 of 64 and "
        "transformer.word_embeddings_layernorm keeps 16 of 16",
    ),
    "no multiple": (
        "lfm2", {"*feed_forward*": 0.2},
        "found no value of intermediate_size that sets dimension 0 of model.layers.0.feed_forward.w1.weight to 51",
    ),
    "one layer of a stage": (
        "convnextv2", {"*stages.0*pwconv1": 0.5},
        "hidden_sizes[0] is one number for all layers of a stage, but convnextv2.encoder.stages.0.layers.0.grn keeps "
        "16 of 32",
    ),
    "a replaced layer": (
        "wav2vec2", {"*intermediate_dense": 0.5},
        "(wav2vec2.encoder.pos_conv_embed.conv was replaced by a plain one, which its class does not build)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_no_number_says(case: str, tmp_path: Path) -> None:
    name, ratio, words = UNSAYABLE[case]
    assert words in saved(build(name), tmp_path / "out", ratio)[1]
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_configuration_that_no_model_can_be_built_from(tmp_path: Path) -> None:
    model: Any = build("bloom")
    model.config.n_head = 3  # does not divide the stream
    _, note = saved(model, tmp_path / "out", {"*mlp*": 0.5})
    assert "no model can be built from its BloomConfig: ValueError: " in note


def test_settings_are_read_as_from_a_file() -> None:
    model: Any = build("bamba")
    assert model.config.time_step_limit[1] == float("inf")
    assert tuple(config_from(model, model.config.to_dict()).time_step_limit) == tuple(model.config.time_step_limit)


@pytest.mark.parametrize("given", [["int64:1x6"], ["int64:1x6", "int64:1x6"]], ids=["tokens", "tokens and mask"])
def test_a_decoder_gets_its_first_token_on_the_command_line(given: list[str], tmp_path: Path) -> None:
    shape = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24, "num_layers": 1, "vocab_size": 40}
    hf.T5ForConditionalGeneration(hf.T5Config(**shape, decoder_start_token_id=5)).save_pretrained(tmp_path / "t5")
    options = [part for spec in given for part in ("--input", spec)]
    call = ["compress", f"hf:{tmp_path / 't5'}", *options, "--ratio", "0.5", "--restore", "prune"]
    done = CliRunner().invoke(app, [*call, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert any("decoder" in row.group for row in artifact.read_manifest(tmp_path / "out").report.rows)


def test_a_decoder_that_makes_its_tokens_is_left_to_do_so() -> None:
    from lbyl.cli.sources import example_inputs

    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16, **TOKENS}
    heads = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")}
    bart = hf.BartForConditionalGeneration(hf.BartConfig(**shape, **heads, decoder_start_token_id=2)).eval()
    assert isinstance(example_inputs("hf:bart", bart, ["int64:1x6"], 0), tuple)
    t5 = hf.T5Model(hf.T5Config(d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1, decoder_start_token_id=5)).eval()
    made = example_inputs("hf:t5", t5, ["int64:2x6"], 0)
    assert made["input_ids"].shape == made["decoder_input_ids"].shape == (2, 6)
    assert bool((made["decoder_input_ids"] == 5).all())


def test_an_encoder_and_a_decoder_of_one_class_keep_their_own_numbers(tmp_path: Path) -> None:
    encoder, decoder = (hf.BertConfig(**SIZES, **TOKENS, intermediate_size=size) for size in (24, 32))
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    torch.manual_seed(0)
    net = hf.EncoderDecoderModel(config).eval()
    inputs = {name: torch.arange(3, 9)[None] for name in ("input_ids", "decoder_input_ids")}
    result = lbyl.compress(net, inputs, ratio={"*intermediate*": 0.5}, restore="prune", forecast=False)
    small: Any = result.model
    assert (small.encoder.config.intermediate_size, small.decoder.config.intermediate_size) == (12, 16)
    assert (net.encoder.config.intermediate_size, net.decoder.config.intermediate_size) == (24, 32)
    result.save(tmp_path / "out")
    again = hf.EncoderDecoderModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, small(**inputs).logits)
