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
from lbyl.restore.heads import roots, smaller_products, smaller_values, strongest
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


def test_rotated_queries_are_refused_by_name() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=50)).eval()
    tokens = {"input_ids": torch.arange(8)[None]}
    with pytest.raises(InputError, match=r"layers.0.self_attn: it computes more than plain attention: rotary"):
        lbyl.compress(net, tokens, budget=HALF, forecast=False)


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
    "two at once": (lambda: lbyl.Budget(params=0.5, head_dim=True, depth=True), "give one of depth and head_dim"),
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
