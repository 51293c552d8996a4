"""The inside of heads: queries and keys of lower rank, values of lower rank; cut, verified, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.errors import BudgetError, InputError, VerificationError
from lbyl.graph.heads import find_heads
from lbyl.moments.heads import head_moments
from lbyl.restore.heads import (
    best_pairs,
    pair_gains,
    pair_products,
    roots,
    smaller_products,
    smaller_values,
    strongest,
)
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.inputs import ExampleInputs
from lbyl.surgery.heads import verify_heads

HALF = lbyl.Budget(params=0.85, head_dim=True)


def vit(**changes: Any) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    net = timm.create_model("vit_tiny_patch16_224", num_classes=5, **{**shape, **changes})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def images(seed: int = 0, count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def smaller(net: Any, restore: Any, budget: lbyl.Budget = HALF) -> lbyl.Result:
    return lbyl.compress(net, images(), budget=budget, restore=restore, forecast=False)


def seen() -> lbyl.LeastSquares:
    return lbyl.LeastSquares(moments=lbyl.Data([images(seed, 16) for seed in (1, 2)]))


def rows(seed: int, count: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator).double()
    return torch.randn(count, width, generator=generator).double() @ mixed + torch.randn(width, generator=generator)


def test_products_and_values_are_the_best_of_their_rank() -> None:
    q, k, v, out = rows(0, 50, 6), rows(1, 50, 6), rows(2, 50, 6), rows(3, 6, 9)
    k, v = k - k.mean(0), v - v.mean(0)
    a, b = smaller_products(q.T @ q, k.T @ k, 2)
    lost = (q @ k.T - q @ a @ (k @ b).T).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(q @ k.T)[2:].square().sum())
    c, w = smaller_values(v.T @ v, out, 2)
    lost = (v @ out - v @ c @ w).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(v @ out)[2:].square().sum())
    whole = smaller_products(q.T @ q, k.T @ k, 6)
    torch.testing.assert_close(whole[0] @ whole[1].T, torch.eye(6).double())
    root, inverse = roots(torch.diag(torch.tensor([4.0, 0.0])).double())
    assert torch.equal(inverse, torch.diag(torch.tensor([0.5, 0.0])).double())
    assert torch.equal(root, torch.diag(torch.tensor([2.0, 0.0])).double())
    assert torch.equal(strongest(torch.tensor([1.0, 3.0, 2.0]), 2), torch.eye(3).double()[:, [1, 2]])


def test_heads_get_smaller_and_the_result_loads(tmp_path: Path) -> None:
    net = vit()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    solved = smaller(net, seen())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    attention: Any = solved.model.blocks[0].attn  # pyright: ignore
    size = attention.head_dim
    assert 1 < size < 12
    assert (attention.qkv.out_features, attention.proj.in_features, attention.attn_dim) == (
        6 * size,
        2 * size,
        2 * size,
    )
    assert solved.report.parameters[1] <= 0.85 * solved.report.parameters[0]
    assert sum(p.numel() for p in solved.model.parameters()) == solved.report.parameters[1]
    row = solved.report.rows[0]
    assert (row.group, row.before, row.after) == ("blocks.0.attn.head_dim", 12, size)
    assert solved.report.assessment is not None
    assert solved.report.assessment.restored < 0.7 * solved.report.assessment.pruned
    assert (solved.report.verified or 1.0) < 1e-5
    solved.save(tmp_path / "out")
    again = lbyl.load(tmp_path / "out", vit())
    attention.fused_attn = not attention.fused_attn  # both ways of timm scale products by the new size
    torch.testing.assert_close(again(images(7)), solved.model(images(7)))
    then = lbyl.compress(again, images(), ratio={"*mlp*": 0.5}, restore="prune", forecast=False)
    then.save(tmp_path / "then")
    torch.testing.assert_close(lbyl.load(tmp_path / "then", vit())(images(7)), then.model(images(7)))


def test_without_biases_and_with_a_budget_of_macs() -> None:
    net = vit(qkv_bias=False)
    result = smaller(net, seen(), lbyl.Budget(macs=0.85, head_dim=True, round_to=4))
    assert result.model.blocks[0].attn.head_dim % 4 == 0  # pyright: ignore
    assert result.report.macs is not None
    assert result.report.macs[1] <= 0.85 * result.report.macs[0]
    same = smaller(net, seen(), lbyl.Budget(params=1.0, head_dim=True))
    assert torch.equal(same.model(images()), net(images()))
    assert "heads stay as large as they are for this budget" in same.report.notes


def test_attention_that_computes_more_is_left() -> None:
    norms, layers = vit(qk_norm=True), vit()
    found, why = find_heads(norms, ExampleInputs.of(images()))
    assert not found
    assert "more than plain attention" in why["blocks.0.attn"]
    assert [each.path for each in find_heads(layers, ExampleInputs.of(images()))[0]] == [
        "blocks.0.attn",
        "blocks.1.attn",
    ]


def vision(kind: str) -> Any:
    """A small vision transformer of transformers."""
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(**shape, image_size=8, patch_size=4)
    name = {"ViT": "ViTForImageClassification", "CLIPVision": "CLIPVisionModel"}.get(kind, f"{kind}Model")
    net = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Beit", "CLIPVision"])
def test_heads_with_three_layers_get_smaller_and_transformers_loads_what_it_can_say(kind: str, tmp_path: Path) -> None:
    net, x = vision(kind), {"pixel_values": images()}
    budget = lbyl.Budget(params=0.9, head_dim=True)
    data = lbyl.LeastSquares(moments=lbyl.Data([{"pixel_values": images(seed, 16)} for seed in (1, 2)]))
    result = lbyl.compress(net, x, budget=budget, restore=data, forecast=False)
    assert (result.report.verified or 1.0) < 1e-5
    assert result.report.assessment is not None
    assert result.report.assessment.restored < 0.7 * result.report.assessment.pruned
    result.save(tmp_path / "out")
    expected = result.model(pixel_values=images(7))[0]
    torch.testing.assert_close(lbyl.load(tmp_path / "out", vision(kind))(pixel_values=images(7))[0], expected)
    if kind == "CLIPVision":
        assert any("model.config still has the unpruned widths" in note for note in result.report.notes)
        return
    again = type(net).from_pretrained(tmp_path / "out").eval()
    assert again.config.head_dim == result.model.config.head_dim == result.report.rows[0].after
    assert not hasattr(net.config, "head_dim")
    torch.testing.assert_close(again(pixel_values=images(7))[0], expected)


def decoder(kind: str = "Llama", **changes: Any) -> Any:
    """A small language model of transformers whose positions are rotary."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 128, "pad_token_id": 0}
    shape |= {"bos_token_id": 1, "eos_token_id": 2, **changes}
    net = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return net


def tokens(seed: int = 0, count: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (count, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def texts() -> lbyl.LeastSquares:
    return lbyl.LeastSquares(moments=lbyl.Data([tokens(seed, 32) for seed in (1, 2)]))


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 64}
ROTARY: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 4, "attention_bias": True},
    "Mistral": {},
    "Qwen2": {},
    "Gemma": {"head_dim": 8},
    "Granite": {"attention_multiplier": 0.3},
    "Llama 3": {"rope_parameters": LLAMA_3},
}


@pytest.mark.parametrize("kind", ROTARY)
def test_rotated_heads_lose_the_same_pairs_and_transformers_loads_what_is_left(kind: str, tmp_path: Path) -> None:
    def whole() -> Any:
        return decoder(kind.split()[0], **ROTARY[kind])

    net = whole()
    result = lbyl.compress(net, tokens(), budget=replace(HALF, params=0.9), restore=texts(), forecast=False)
    size = result.report.rows[0].after
    assert size % 2 == 0
    assert size < 8
    assert (result.report.verified or 0.0) < 1e-5
    assert result.report.assessment is not None
    assert result.report.assessment.restored < result.report.assessment.pruned
    rotary = result.model.model.rotary_emb  # pyright: ignore
    pairs = result.plan.groups[0].keep[: size // 2]
    assert torch.equal(rotary.inv_freq, net.model.rotary_emb.inv_freq[list(pairs)])
    assert result.plan.groups[0].keep == (*pairs, *(pair + 4 for pair in pairs))
    assert any("all heads lose the same of 4 pairs" in note for note in result.report.notes)
    result.save(tmp_path / "out")
    expected = result.model(**tokens(7)).logits
    torch.testing.assert_close(lbyl.load(tmp_path / "out", whole())(**tokens(7)).logits, expected)
    again = type(net).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(**tokens(7)).logits, expected)
    assert again.config.head_dim == size
    assert net.config.rope_parameters["rope_type"] != "longrope"
    written = [model.generate(**tokens(8, 1), max_new_tokens=8, do_sample=False) for model in (again, result.model)]
    assert torch.equal(*written)
    with pytest.raises(InputError, match="change with the length of texts \\(longrope\\)"):
        lbyl.compress(again, tokens(), budget=HALF, forecast=False)


def test_pairs_and_their_gains_are_the_best() -> None:
    q, k = torch.stack([rows(0, 50, 6), rows(1, 50, 6)]), torch.stack([rows(2, 50, 6), rows(3, 50, 6)])
    products = pair_products(q.transpose(1, 2) @ q / 50, k.transpose(1, 2) @ k / 50)
    terms = torch.stack([q[..., [i, i + 3]] @ k[..., [i, i + 3]].transpose(1, 2) for i in range(3)], -1).flatten(1, 2)
    torch.testing.assert_close(products, terms.transpose(1, 2) @ terms / 2500)
    gains, lost = pair_gains(products, (0, 2))
    for head in range(2):
        best = torch.linalg.lstsq(terms[head][:, [0, 2]], terms[head].sum(1)).solution
        torch.testing.assert_close(gains[head], best, rtol=0.05, atol=0.01)
        left = (terms[head][:, [0, 2]] @ gains[head] - terms[head].sum(1)).square().mean()
        torch.testing.assert_close(lost[head], left)
    each = {pair: float(pair_gains(products, [i for i in range(3) if i != pair])[1].sum()) for pair in range(3)}
    assert best_pairs(products, 2, solved=True) == tuple(i for i in range(3) if i != min(each, key=lambda p: each[p]))
    assert best_pairs(products, 3, solved=True) == (0, 1, 2)
    power = products.diagonal(dim1=1, dim2=2).sum(0)
    assert best_pairs(products, 1, solved=False) == (int(power.argmax()),)


def test_values_that_heads_share_get_one_basis() -> None:
    net, x = decoder(), tokens()
    result = lbyl.compress(net, x, budget=replace(HALF, params=0.9), restore=texts(), forecast=False)
    attention: Any = result.model.model.layers[0].self_attn  # pyright: ignore
    size = attention.head_dim
    assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.o_proj.in_features) == (
        4 * size,
        2 * size,
        4 * size,
    )
    assert attention.v_proj.out_features == 2 * size


def test_padding_does_not_count_in_moments() -> None:
    net, short = decoder(), tokens(3)
    pads = torch.zeros(2, 4, dtype=torch.long)
    padded = {name: torch.cat([value, pads], 1) for name, value in short.items()}
    layers, _ = find_heads(net, ExampleInputs.of(short))
    plain, with_pads = (head_moments(net, layers, [ExampleInputs.of(x)]) for x in (short, padded))
    for path, moments in plain.items():
        assert moments.queries.count == with_pads[path].queries.count == 32
        torch.testing.assert_close(moments.queries.second, with_pads[path].queries.second, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.mixed.second, with_pads[path].mixed.second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("Qwen3", {"head_dim": 8}, "it computes more than plain attention: relative positions, norms"),
        ("StableLm", {}, "rotate a part of each head only"),
        ("Cohere", {}, "it computes more than plain attention"),
    ],
)
def test_other_rotations_are_refused_by_name(kind: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"layers.0.self_attn: .*{said}"):
        lbyl.compress(decoder(kind, **changes), tokens(), budget=HALF, forecast=False)


def test_a_part_of_the_layers_that_share_frequencies_is_refused() -> None:
    budget = replace(HALF, exclude=("*.layers.0.*",))
    with pytest.raises(InputError, match=r"model.rotary_emb rotates model.layers.0.self_attn as well as"):
        lbyl.compress(decoder(), tokens(), budget=budget, forecast=False)


def test_a_pattern_to_exclude_that_matches_nothing_is_told_of() -> None:
    budget = replace(HALF, params=0.95, exclude=("none.*", "blocks.0.*"))
    notes = smaller(vit(), "prune", budget).report.notes
    (told,) = (note for note in notes if note.startswith("exclude"))
    assert told.startswith("exclude: 'none.*' matches no group or layer")


def test_a_wrong_cut_is_seen() -> None:
    net = vit()
    masked = sharing_copy(net, {"blocks.0.attn.proj.weight": torch.zeros(24, 24)})
    with pytest.raises(VerificationError, match="computes something else than with zeros"):
        verify_heads(masked, net, ExampleInputs.of(images()))


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "latency": (lambda: lbyl.Budget(latency=0.5, head_dim=True), "needs macs, params or size_mb, and not latency"),
    "two at once": (lambda: lbyl.Budget(params=0.5, head_dim=True, depth=True), "give head_dim or depth, but not both"),
    "no attention": (
        lambda: lbyl.compress(nn.Linear(4, 4), torch.ones(1, 4), budget=HALF),
        "Linear has no attention whose heads could get smaller inside .*leave out head_dim",
    ),
    "norms": (lambda: smaller(vit(qk_norm=True), "prune"), "computes more than plain attention"),
    "too small": (
        lambda: smaller(vit(), seen(), replace(HALF, params=0.5)),
        r"blocks.0.attn: with 2 of 12 channels in each head.*the budget allows",
    ),
    "criterion": (
        lambda: lbyl.compress(vit(), images(), budget=HALF, criterion="l2"),
        "criterion and head_dim: .*leave out criterion",
    ),
    "submodule": (
        lambda: lbyl.compress(vit(), images(), budget=HALF, submodule="blocks"),
        "the inside of heads can be cut in whole networks",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_can_not_be_is_refused(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(InputError, match=message) as found:
        call()
    assert isinstance(found.value, BudgetError) == (name == "too small")


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("timm:none", ["--ratio", "0.5"], "--head-dim needs a budget of cost"),
        ("hf:nowhere", ["--budget", "params=0.5", "--low-memory"], "--head-dim: this needs the whole model in memory"),
    ],
)
def test_the_option(source: str, options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["compress", source, "--head-dim", *options, "-o", "never-made"])
    assert done.exit_code == 2
    words = " ".join(done.output.replace("\u2502", " ").split())
    assert said in words
