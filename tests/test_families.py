"""Language models of many families: compressed on what a tokenizer gives, saved, loaded by transformers elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lbyl

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48}
SIZES |= {"intermediate_size": 40, "max_position_embeddings": 24, "pad_token_id": 0}
CAUSAL: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def of(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    kind = next(name.removesuffix(end) for end in ENDS if name.endswith(end))
    return lambda: getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**sizes))


ENDS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "Model")
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "Llama": of("LlamaForCausalLM", **CAUSAL),
    "Mistral": of("MistralForCausalLM", **CAUSAL),
    "Qwen2": of("Qwen2ForCausalLM", **CAUSAL),
    "Qwen3": of("Qwen3ForCausalLM", **CAUSAL, head_dim=8),
    "Phi3": of("Phi3ForCausalLM", **CAUSAL),
    "Phi": of("PhiForCausalLM", **CAUSAL),
    "Gemma2": of("Gemma2ForCausalLM", **CAUSAL, head_dim=8),
    "GPT-NeoX": of("GPTNeoXForCausalLM", **SIZES),
    "OPT": of("OPTForCausalLM", **SIZES, ffn_dim=40, word_embed_proj_dim=32),
    "GPT-2": of("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=48, n_positions=24),
    "Granite": of("GraniteForCausalLM", **CAUSAL),
    "BERT": of("BertForMaskedLM", **SIZES),
    "RoBERTa": of("RobertaForMaskedLM", **SIZES),
    "DistilBERT": of("DistilBertForMaskedLM", dim=32, hidden_dim=40, n_layers=2, n_heads=4, vocab_size=48),
    "Electra": of("ElectraModel", **SIZES, embedding_size=32),
}
NEURONS = {"OPT": "*fc1", "Phi": "*fc1", "BERT": "*intermediate*", "RoBERTa": "*intermediate*", "DistilBERT": "*lin1"}
NEURONS |= {"Electra": "*intermediate*"}
HEADS = {"Phi3": "*qkv_proj", "GPT-NeoX": "", "GPT-2": "", **dict.fromkeys(NEURONS, ""), "Phi": "*q_proj"}
"""Where configurations can say that there are fewer heads of the same size."""


def tokens() -> dict[str, Tensor]:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    ids = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask}


def test_heads_and_stream_lose_different_shares_where_a_layer_knows_its_width() -> None:
    """GPT-2's layers view their output with a width that they know; here it shrinks to another one than their input."""
    torch.manual_seed(0)
    result = lbyl.compress(
        FAMILIES["GPT-2"]().eval(), tokens(), ratio=0.3, scope="all", restore="prune", forecast=False
    )
    assert [group for group, _ in result.report.left] == ["lm_head"]
    assert result.model.transformer.h[0].attn.c_proj.nf == 22  # pyright: ignore


ELSEWHERE = """
import sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
def run(folder):
    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    model = getattr(transformers, name).from_pretrained(folder).eval()
    x = load_file(folder / "inputs.bin")
    with torch.no_grad():
        found = {"output": model(**x)[0]}
        if model.can_generate():
            for cache in (True, False):
                found[f"cache {cache}"] = model.generate(x["input_ids"], max_new_tokens=8, min_new_tokens=8,
                    do_sample=False, use_cache=cache, pad_token_id=0)
    save_file(found, folder / "found.bin")

for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        run(folder)
    except Exception as error:
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A compressed model of each family in a folder, and what it gives here."""
    place, given = tmp_path_factory.mktemp("families"), dict[str, dict[str, Tensor]]()
    for family, make in FAMILIES.items():
        torch.manual_seed(0)
        net, x = make().eval(), tokens()
        patterns = NEURONS.get(family, "*mlp*"), HEADS.get(family, "*q_proj")
        ratio = {pattern: 0.5 for pattern in patterns if pattern}
        result = lbyl.compress(net, x, ratio=ratio, restore="prune", forecast=False)
        folder = result.save(place / family)
        save_file(x, folder / "inputs.bin")
        small: Any = result.model
        with torch.no_grad():
            given[family] = {"output": small(**x)[0]}
            if small.can_generate():
                written = small.generate(x["input_ids"], max_new_tokens=8, min_new_tokens=8, do_sample=False)
                given[family] |= {"cache True": written, "cache False": written}
        given[family] |= {"before": torch.tensor(result.report.parameters)}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(place)], check=True, env=environment)
    return place, given


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_process_loads_the_folder_and_computes_the_same(
    family: str, folders: tuple[Path, dict[str, dict[str, Tensor]]]
) -> None:
    place, given = folders
    error = place / family / "error.txt"
    assert not error.exists(), error.read_text()
    wanted, found = given[family], load_file(place / family / "found.bin")
    before, after = wanted.pop("before").tolist()
    assert after < before
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5)
