"""The networks of coverage.py: how to build each with random weights, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

TORCHVISION = [
    "alexnet",
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
    "densenet121",
    "densenet169",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_v2_s",
    "efficientnet_v2_m",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mnasnet0_75",
    "mnasnet1_0",
    "mnasnet1_3",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_x_800mf",
    "regnet_x_1_6gf",
    "regnet_x_3_2gf",
    "regnet_x_8gf",
    "regnet_x_16gf",
    "regnet_y_400mf",
    "regnet_y_800mf",
    "regnet_y_1_6gf",
    "regnet_y_3_2gf",
    "regnet_y_8gf",
    "regnet_y_16gf",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "squeezenet1_0",
    "squeezenet1_1",
    "swin_t",
    "swin_s",
    "swin_b",
    "swin_v2_t",
    "swin_v2_s",
    "swin_v2_b",
    "vgg16",
    "vgg16_bn",
    "vit_b_16",
    "vit_b_32",
    "wide_resnet50_2",
]

TIMM = [
    "mobilenetv4_conv_small",
    "efficientnet_lite0",
    "ghostnet_100",
    "repvgg_a0",
    "hrnet_w18_small",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "convnextv2_atto",
    "mobilevit_xs",
    "regnety_004",
    "resnest14d",
    "levit_128",
    "poolformer_s12",
    "edgenext_xx_small",
    "mixer_s32_224",
    "dla34",
    "res2net50_26w_4s",
    "cspresnet50",
    "xcit_tiny_12_p16_224",
    "eca_nfnet_l0",
]


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    import torchvision

    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    net = torchvision.models.get_model(name, weights=None, **extra)
    size = {"inception_v3": 299}.get(name, 224)
    return net.eval(), torch.randn(1, 3, size, size)


def _timm(name: str) -> tuple[nn.Module, Any]:
    import timm

    net = timm.create_model(name, pretrained=False)
    return net.eval(), torch.randn(1, *net.default_cfg["input_size"])  # pyright: ignore


TRANSFORMERS = {
    # name: (configuration class, model class, differing arguments); a few small layers with random weights
    "bert": ("BertConfig", "BertForSequenceClassification", {"num_attention_heads": 4, "intermediate_size": 128}),
    "distilbert": ("DistilBertConfig", "DistilBertModel", {"dim": 64, "n_heads": 4, "n_layers": 2, "hidden_dim": 128}),
    "t5_encoder": ("T5Config", "T5EncoderModel", {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}),
    "vit": ("ViTConfig", "ViTForImageClassification", {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}),
    "deit": ("DeiTConfig", "DeiTModel", {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}),
    "swin": ("SwinConfig", "SwinModel", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2]}),
}


def transformers_model(name: str) -> tuple[nn.Module, Any]:
    """A small Hugging Face model from a configuration, and a batch of one."""
    import transformers

    config_class, model_class, changes = TRANSFORMERS[name]
    common = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    if name in ("distilbert", "t5_encoder", "gpt2", "swin"):
        common = {"vocab_size": 100}
    if name == "swin":
        common = {"num_heads": [2, 4], "window_size": 4}
    if name == "t5_encoder":
        common["num_layers"] = 2
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}
    settings = common | changes | ({} if "image_size" in changes else tokens)
    config = getattr(transformers, config_class)(**settings)
    net = getattr(transformers, model_class)(config)
    if "image_size" in changes:
        return net.eval(), {"pixel_values": torch.randn(1, 3, 32, 32)}
    return net.eval(), {"input_ids": torch.randint(3, 100, (1, 12))}


DETECTION = [
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
]
SEGMENTATION = ("deeplabv3_resnet50", "lraspp_mobilenet_v3_large")


def _detection(name: str) -> tuple[nn.Module, Any]:
    import torchvision

    build = getattr(torchvision.models.detection, name)
    return build(weights=None, weights_backbone=None).eval(), ([torch.rand(3, 320, 320)],)


def _segmentation(name: str) -> tuple[nn.Module, Any]:
    import torchvision

    build = getattr(torchvision.models.segmentation, name)
    return build(weights=None, weights_backbone=None).eval(), torch.randn(1, 3, 128, 128)


MODELS: dict[str, Callable[[str], tuple[nn.Module, Any]]] = {
    **{f"torchvision:{name}": _torchvision for name in TORCHVISION},
    **{f"timm:{name}": _timm for name in TIMM},
    **{f"transformers:{name}": transformers_model for name in TRANSFORMERS},
    **{f"detection:{name}": _detection for name in DETECTION},
    **{f"segmentation:{name}": _segmentation for name in SEGMENTATION},
}
CLASSIFIERS = [name for name in MODELS if name.startswith(("torchvision:", "timm:"))]
"""The 79 that the totals are about."""


def build(name: str) -> tuple[nn.Module, Any]:
    """The network in evaluation mode, and an input."""
    return MODELS[name](name.partition(":")[2])
