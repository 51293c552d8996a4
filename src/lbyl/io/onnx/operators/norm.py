"""Normalizations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lbyl.io.onnx.operators.base import Node, operator, tensors


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm for inputs with any number of axes."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps, device="meta")
        self.num_batches_tracked = None

    def _check_input_dim(self, input: Tensor) -> None:
        pass


@operator("BatchNormalization")
def batch_norm(node: Node) -> None:
    """A batch norm with the file's statistics."""
    if node.attributes.get("training_mode", 0):
        raise node.refuse("it is in training mode; export the network in evaluation mode")
    if not all(node.is_constant(index) for index in range(1, 5)):
        raise node.refuse("its statistics are computed")
    scale = node.constant(1)
    assert scale is not None
    module = BatchNorm(len(scale), eps=float(node.attributes.get("epsilon", 1e-5)))
    names = ("weight", "bias", "running_mean", "running_var")
    node.layer(module, {name: (index + 1, "same", 1.0) for index, name in enumerate(names)}, node.source(0))


@operator("LayerNormalization")
def layer_norm(node: Node) -> None:
    """Layer norm: statistics over the last axes, with the file's scale and shift."""
    get, scale = node.attributes.get, node.constant(1)
    axis, eps = get("axis", -1), float(get("epsilon", 1e-5))
    if scale is None or scale.ndim != 1 or (axis != -1 and axis < 0):
        node.run(partial(_free_layer_norm, axis=axis, eps=eps), *(node.source(index) for index in range(3)))
        return
    module = nn.LayerNorm(len(scale), eps=eps, bias=node.operands > 2, device="meta")
    held = {name: (index, "same", 1.0) for index, name in ((1, "weight"), (2, "bias")) if index < node.operands}
    node.layer(module, held, node.source(0))


def _free_layer_norm(x: Tensor, scale: Any, shift: Any, *, axis: int, eps: float) -> Tensor:
    x, scale, shift = tensors(x, scale, shift)
    shape = x.shape[axis % x.dim() :]
    if all(value is None or (isinstance(value, Tensor) and value.shape == shape) for value in (scale, shift)):
        return functional.layer_norm(x, shape, scale, shift, eps)
    out = functional.layer_norm(x, shape, eps=eps) * scale
    return out if shift is None else out + shift


@operator("GroupNormalization")
def group_norm(node: Node) -> None:
    """Group norm: statistics over blocks of channels, with the file's scale and shift for each channel (opset 21)."""
    scale = node.constant(1)
    groups = int(node.attributes["num_groups"])
    if scale is None or node.constant(2) is None or (node.opset < 21 and len(scale) == groups):
        raise node.refuse("its scale and shift are computed, or are given for blocks of channels (opset 18)")
    module = nn.GroupNorm(groups, len(scale), eps=float(node.attributes.get("epsilon", 1e-5)), device="meta")
    node.layer(module, {"weight": (1, "same", 1.0), "bias": (2, "same", 1.0)}, node.source(0))
    node.width("num_groups", "num_groups")


@operator("InstanceNormalization")
def instance_norm(node: Node) -> None:
    """Instance norm: statistics of each channel of each image."""
    node.run(
        partial(_instance_norm, eps=float(node.attributes.get("epsilon", 1e-5))),
        *(node.source(index) for index in range(3)),
    )


def _instance_norm(x: Tensor, scale: Any, shift: Any, *, eps: float) -> Tensor:
    x, scale, shift = tensors(x, scale, shift)
    if not isinstance(scale, Tensor) or not isinstance(shift, Tensor):  # a single channel
        return functional.instance_norm(x, eps=eps) * scale + shift
    return functional.instance_norm(x, weight=scale, bias=shift, eps=eps)


@operator("RMSNormalization")
def rms_norm(node: Node) -> None:
    """RMS norm: division by the root of the mean square over the last axes."""
    get = node.attributes.get
    call = partial(_rms_norm, axis=get("axis", -1), eps=float(get("epsilon", 1e-5)))
    node.run(call, node.source(0), node.source(1))


def _rms_norm(x: Tensor, scale: Any, *, axis: int, eps: float) -> Tensor:
    x, scale = tensors(x, scale)
    return functional.rms_norm(x, x.shape[axis % x.dim() :], scale, eps)


@operator("LRN")
def local_response(node: Node) -> None:
    """Local response normalization: division by a sum over neighboring channels."""
    get = node.attributes.get
    call = partial(
        functional.local_response_norm,
        size=int(node.attributes["size"]),
        alpha=float(get("alpha", 1e-4)),
        beta=float(get("beta", 0.75)),
        k=float(get("bias", 1.0)),
    )
    node.run(call, node.source(0))


@operator("MeanVarianceNormalization")
def mean_variance(node: Node) -> None:
    """Normalization to zero mean and unit variance over some axes."""
    node.run(partial(_mean_variance, axes=list(node.attributes.get("axes", [0, 2, 3]))), node.source(0))


def _mean_variance(x: Tensor, *, axes: list[int]) -> Tensor:
    x = x - x.mean(axes, keepdim=True)
    return x / (x.square().mean(axes, keepdim=True).sqrt() + 1e-9)


@operator("Dropout")
def dropout(node: Node) -> None:
    """Dropout, which does nothing in evaluation mode; its mask is all true."""
    masks = node.is_used(1)
    node.run(partial(_with_mask, old=node.opset < 10) if masks else torch.clone, node.source(0))


def _with_mask(x: Tensor, *, old: bool) -> tuple[Tensor, Tensor]:
    return x.clone(), torch.ones_like(x, dtype=x.dtype if old else torch.bool)
