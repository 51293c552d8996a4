"""Pads tell nothing: what stands at positions that an attention mask leaves out changes no weight and no figure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import lbyl

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0}


def bert() -> nn.Module:
    return BertModel(BertConfig(**SIZES))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def texts(pad: int) -> list[dict[str, Tensor]]:
    """Padded batches whose pads hold one token or another."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        ids, mask = torch.randint(1, 50, (8, 12), generator=generator), torch.ones(8, 12, dtype=torch.long)
        mask[::2, 7:] = 0
        found.append({"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask})
    return found


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("settings", [{}, {"solve": "mix"}, {"attach_norms": False}])
def test_what_pads_hold_changes_nothing(make: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = make().eval()
    results = []
    for pad in (0, 7):
        restorer = lbyl.LeastSquares(moments=lbyl.Data(texts(pad), batches=4), **settings)
        results.append(lbyl.compress(net, texts(0)[0], ratio=0.5, restore=restorer, forecast=False))
    first, second = results
    assert first.plan.groups == second.plan.groups
    for name, tensor in first.model.state_dict().items():
        torch.testing.assert_close(tensor, second.model.state_dict()[name], msg=name)
    assert first.report.assessment is not None
    assert second.report.assessment is not None
    assert first.report.assessment.restored == pytest.approx(second.report.assessment.restored, rel=1e-3)


def test_budgets_do_not_look_at_pads() -> None:
    torch.manual_seed(0)
    net = bert().eval()
    plans = []
    for pad in (0, 7):
        restorer = lbyl.LeastSquares(moments=lbyl.Data(texts(pad), batches=4))
        plans.append(
            lbyl.compress(net, texts(0)[0], budget=lbyl.Budget(params=0.8), restore=restorer, forecast=False).plan
        )
    assert plans[0].groups == plans[1].groups


def test_masks_given_by_position_count_as_well() -> None:
    torch.manual_seed(0)
    net = bert().eval()
    results = []
    for pad in (0, 7):
        batches = [(x["input_ids"], x["attention_mask"]) for x in texts(pad)]
        restorer = lbyl.LeastSquares(moments=lbyl.Data(batches, batches=4))
        results.append(lbyl.compress(net, batches[0], ratio=0.5, restore=restorer, verify=False, forecast=False))
    for one, other in zip(results[0].model.parameters(), results[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
