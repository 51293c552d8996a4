"""Real architectures of different families, small variants: cut in scope "all", verified, restored, saved.

All of them, full size, are in benchmarks/coverage.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from nets import images
from torch import Tensor, nn

import lbyl
from lbyl.runtime.inputs import ExampleInputs, output_tensors

TOKENS = {"vocab_size": 60, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, **TOKENS
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, **TOKENS))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=48,
        **TOKENS,
    )
    return transformers.LlamaForCausalLM(config)


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [3, 3], [4, 4], num_classes=10)


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=10, **options)


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None)


def pixels(size: int) -> Callable[[], Tensor]:
    return lambda: images(1, 3, size, size)


# name: (builds it, its input, something that must be cut, from how many, to how many)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str, int, int]] = {
    "residual": (torchvision_model("resnet18"), pixels(64), "layer1.0.conv1", 64, 48),
    "densely connected": (
        lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10),
        pixels(64),
        "features.denseblock1.denselayer1.conv1",
        32,
        24,
    ),
    "depthwise, squeeze": (torchvision_model("mobilenet_v3_small"), pixels(64), "features.1.block.1.fc1", 8, 6),
    "grouped": (timm_model("regnety_002"), pixels(64), "s1.b1.conv1.conv", 24, 18),
    "shuffled": (torchvision_model("shufflenet_v2_x0_5"), pixels(64), "stage2.1.branch2.0", 24, 18),
    "radix attention": (timm_model("resnest14d", stem_width=8), pixels(64), "layer1.0.conv2.fc1", 32, 24),
    "pieces in sequence": (timm_model("res2net50_26w_4s"), pixels(64), "layer1.1.conv1", 104, 76),
    "vision transformer": (
        timm_model("vit_tiny_patch16_224", img_size=64, depth=2), pixels(64), "blocks.0.attn.qkv", 3, 2,
    ),
    "shifted windows": (swin, pixels(32), "features.1.0.mlp.0", 96, 72),
    "bidirectional text": (bert, tokens, "bert.encoder.layer.1.attention.self.query", 4, 3),
    "input-first weights": (gpt2, tokens, "transformer.h.1.attn.c_attn", 4, 3),
    "grouped queries": (llama, tokens, "model.layers.0.self_attn.q_proj", 4, 3),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    build, make_input, group, before, after = FAMILIES[family]
    torch.manual_seed(0)
    model, x = build().eval(), make_input()
    result = lbyl.compress(model, x, ratio=0.25, scope="all", restore="prune", forecast=False)
    assert result.report.verified is not None
    # Llama takes its statistics in float32, whatever it runs in.
    assert result.report.verified < (1e-6 if family == "grouped queries" else 1e-9)
    widths = {row.group: (row.before, row.after) for row in result.report.rows}
    assert widths[group] == (before, after)

    # Twice the batch, for no size of the example may have got stuck.
    inputs = ExampleInputs.of(x)
    twice = inputs.map(lambda t: torch.cat([t, t]))
    with torch.no_grad():
        wanted, found = (output_tensors(twice.call(net)) for net in (model, result.model))
    assert [t.shape for t in wanted] == [t.shape for t in found]

    result.save(tmp_path / "out")
    again = lbyl.load(tmp_path / "out", build())
    with torch.no_grad():
        loaded = output_tensors(inputs.call(again))
        assert all(map(torch.equal, loaded, output_tensors(inputs.call(result.model))))


# mechanism: (builds a network that has it, the side of its images, the least share of the parameters that goes)
MECHANISMS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "cosine attention in shifted windows": (
        lambda: torchvision.models.SwinTransformer(
            [4, 4],
            24,
            [1, 1],
            [3, 3],
            [4, 4],
            num_classes=10,
            block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
        ),
        32,
        0.15,
    ),
    "grids and windows": (
        lambda: torchvision.models.MaxVit((32, 32), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=10), 32, 0.3,
    ),
    "global response norm": (timm_model("convnextv2_atto", depths=(1, 1, 1, 1)), 64, 0.3),
    "mixing tokens": (timm_model("mixer_s32_224"), 224, 0.2),
    "cross-covariance attention": (timm_model("xcit_nano_12_p16_224", depth=1), 64, 0.3),
    "attention on unfolded patches": (timm_model("mobilevit_xxs"), 64, 0.3),
    "pooling for attention": (timm_model("poolformer_s12"), 64, 0.3),
    "batch norms of linear layers": (timm_model("levit_128s"), 224, 0.2),
    "cheap features, concatenated": (timm_model("ghostnet_100"), 64, 0.3),
    "parallel branches, added": (timm_model("repvgg_a0"), 64, 0.3),
    "resolutions, fused": (timm_model("hrnet_w18_small"), 64, 0.3),
    "trees of sums": (timm_model("dla34"), 64, 0.3),
    "stages, split and joined": (timm_model("cspresnet50"), 64, 0.3),
    "branches, concatenated": (torchvision_model("squeezenet1_1"), 64, 0.3),
}  # fmt: skip


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_mechanisms_that_the_coverage_table_counts_on(mechanism: str) -> None:
    build, side, share = MECHANISMS[mechanism]
    torch.manual_seed(0)
    result = lbyl.compress(
        build().eval(), images(1, 3, side, side), ratio=0.25, scope="all", restore="prune", forecast=False
    )
    assert result.report.verified is not None
    assert result.report.verified < 1e-6
    before, after = result.report.parameters
    assert 1 - after / before >= share
    assert not any("not traced" in why for _, why in result.report.left)


@pytest.mark.parametrize("family", ["shuffled", "vision transformer", *list(FAMILIES)[-3:]])
def test_restoration_beats_plain_pruning(family: str) -> None:
    build, make_input, *_ = FAMILIES[family]
    torch.manual_seed(0)
    settings = lbyl.LeastSquares(moments=lbyl.Noise(images=64 if family in list(FAMILIES)[-3:] else 16))
    result = lbyl.compress(build().eval(), make_input(), ratio=0.25, scope="all", restore=settings, forecast=False)
    found = result.report.assessment
    assert found is not None
    assert found.restored < found.pruned
    assert not any("not seen" in row.note for row in result.report.rows)


def test_detection_is_compressed_in_parts() -> None:
    """Which boxes come out depends on the data, so only backbone and head can be traced, each by itself."""
    backbone = torchvision.models.mobilenet_v3_small(weights=None).features[:4]
    backbone.out_channels = 24  # pyright: ignore
    anchors = torchvision.models.detection.anchor_utils.AnchorGenerator(((16,),), ((1.0,),))
    torch.manual_seed(0)
    model = torchvision.models.detection.FasterRCNN(
        backbone,  # pyright: ignore
        num_classes=3,
        rpn_anchor_generator=anchors,
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 3, 1),
        min_size=64,
        max_size=64,
    ).eval()
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    result = lbyl.compress(model, ([image],), ratio=0.25, scope="all", restore="prune", forecast=False)
    assert {"backbone", "roi_heads.box_head"} <= set(result.plan.settings["parts"])
    assert result.model([image, image])[1].keys() == {"boxes", "labels", "scores"}
    assert any("can't trace" in note for note in result.report.notes)
    alone = lbyl.compress(model, ([image],), ratio=0.25, restore="prune", submodule="backbone", forecast=False)
    assert {row.group.partition(".")[0] for row in alone.report.rows} == {"backbone"}
