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


MODELS: dict[str, Callable[[str], tuple[nn.Module, Any]]] = {
    **{f"torchvision:{name}": _torchvision for name in TORCHVISION},
    **{f"timm:{name}": _timm for name in TIMM},
}


def build(name: str) -> tuple[nn.Module, Any]:
    """The network in evaluation mode, and an input."""
    return MODELS[name](name.partition(":")[2])
