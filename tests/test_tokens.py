"""Language models take what a tokenizer gives; the cache that decoders return is no output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lbyl
from lbyl.runtime.inputs import output_tensors

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 16}
GROUPED = {"num_key_value_heads": 2, "pad_token_id": 0}


def of(name: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**sizes))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "Llama": of("LlamaForCausalLM", "LlamaConfig", **SIZES, **GROUPED),
    "Qwen2": of("Qwen2ForCausalLM", "Qwen2Config", **SIZES, **GROUPED),
    "Mistral": of("MistralForCausalLM", "MistralConfig", **SIZES, **GROUPED),
    "Phi3": of("Phi3ForCausalLM", "Phi3Config", **SIZES, **GROUPED),
    "Gemma2": of("Gemma2ForCausalLM", "Gemma2Config", **SIZES, **GROUPED, head_dim=8),
    "GPT-NeoX": of("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES),
    "OPT": of("OPTForCausalLM", "OPTConfig", **SIZES, ffn_dim=24, word_embed_proj_dim=16),
    "GPT-2": of("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16),
    "BERT": of("BertForSequenceClassification", "BertConfig", **SIZES),
}


def tokens(batch: type[Any]) -> Any:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    ids = torch.randint(1, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    return batch({"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [dict, transformers.BatchEncoding])
def test_what_a_tokenizer_gives_is_taken(family: str, batch: type[Any]) -> None:
    torch.manual_seed(0)
    net, x = FAMILIES[family]().eval(), tokens(batch)
    result = lbyl.compress(net, x, ratio=0.5, restore="prune", forecast=False)
    assert result.report.verified is not None
    assert result.report.parameters[1] < result.report.parameters[0]
    with torch.no_grad():
        assert [t.shape for t in output_tensors(result.model(**x))] == [t.shape for t in output_tensors(net(**x))]
        assert any(t.shape[0] == 2 and t.is_floating_point() for t in output_tensors(net(**x)))
