"""Counts multiply-accumulates while a model runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from lbyl.errors import InputError
from lbyl.runtime.contexts import plain_attention, undisturbed
from lbyl.runtime.copying import named_once
from lbyl.runtime.inputs import ExampleInputs, outputs
from lbyl.runtime.intercept import OperatorInterceptor, undivided

_FREE = {
    torch.ops.aten.adaptive_avg_pool2d,
    torch.ops.aten.batch_norm,
    torch.ops.aten.contiguous,
    torch.ops.aten.dropout,
    torch.ops.aten.flatten,
    torch.ops.aten.group_norm,
    torch.ops.aten.layer_norm,
    torch.ops.aten.pad,
    torch.ops.aten.reshape,
    torch.ops.aten.to,
}
"""Composite operations that contain no counted multiplication, and so need not be decomposed."""


class MacCounter(OperatorInterceptor):
    """Counts multiply-accumulates of convolutions, linear layers and matrix products by PyTorch's own formulas.

    ``torch.utils.flop_counter.FlopCounterMode`` gives the same number, but tracks every module, which takes as long as
    a small model.

    Args:
        spare: return zeros from layers and batch norms instead of computing them, which takes a fraction of the time.
            It requires a model whose program does not depend on computed values, and it only works within `undivided`.
        named: tensors by name. The operations that they are arguments of are also counted for each of them.
    """

    def __init__(self, spare: bool = False, named: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self._flops, self._spare = 0, spare
        self._uncounted: dict[str, None] = {}
        self._inside: set[Any] = set()  # composite operations that are being decomposed
        # Some operations are given a view of the weight, which has the same storage.
        self._names = {t.untyped_storage().data_ptr(): name for name, t in (named or {}).items() if t.dim() > 1}
        self._by_name: dict[str, float] = defaultdict(float)

    @property
    def total(self) -> int:
        """Multiply-accumulates counted so far."""
        return self._flops // 2

    @property
    def by_name(self) -> dict[str, float]:
        """Multiply-accumulates of the operations that have the named tensors as arguments."""
        return {name: flops / 2 for name, flops in self._by_name.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """A note that names operations whose multiplications could not be counted, if there were any."""
        names = ", ".join(self._uncounted)
        return (f"the MACs do not include these operations, which have no formula: {names}",) if names else ()

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call and add its multiply-accumulates."""
        if self._spare and (zeros := self._spared(func, args, kwargs)) is not None:
            return zeros
        formula = _FORMULAS.get(func.name().partition(".")[0]) or flop_registry.get(func._overloadpacket)
        if formula is None and func not in self._inside and _composite(func):
            # Within inference_mode, composite operations arrive as a whole. Those of nested tensors come back.
            self._inside.add(func)
            try:
                with self:
                    return func.decompose(*args, **kwargs)
            finally:
                self._inside.discard(func)
        result = func(*args, **kwargs)
        if formula is not None:
            self._add(formula(*args, **kwargs, out_val=result), args)
        elif _multiplies(func):
            self._uncounted[func.name().partition(".")[0]] = None
        return result

    def _spared(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Zeros of the shape of a layer's output; None if the call must be computed."""
        shape = _SHAPES[func](*args, **kwargs) if func in _SHAPES else None
        if shape is None:
            return None
        x, weight = args[:2]
        zeros = x.new_zeros(shape)
        if func is not torch.ops.aten.batch_norm.default:
            self._add(2 * layer_macs(zeros, weight[0].numel()), args)
        return zeros

    def _add(self, flops: int, args: tuple[Any, ...]) -> None:
        self._flops += flops
        if not self._names:
            return
        tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        weights = {
            self._names[key]: t.numel() for t in tensors if (key := t.untyped_storage().data_ptr()) in self._names
        }
        for name, size in weights.items():
            self._by_name[name] += flops * size / sum(weights.values())


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _recurrent(x: Tensor, first: Tensor, second: Tensor, *rest: Any, out_val: Any) -> int:
    return 2 * _rows(x) * (first.numel() + second.numel())


def _recurrent_cudnn(x: Tensor, weights: Any, *rest: Any, out_val: Any) -> int:
    return 2 * _rows(x) * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _trilinear(a: Tensor, b: Tensor, c: Tensor, *axes: Any, out_val: Any) -> int:
    shapes = []
    for tensor, added in zip((a, b, c), axes[:3], strict=True):
        shape = list(tensor.shape)
        for axis in added:
            shape.insert(axis, 1)
        shapes.append(shape)
    return 2 * math.prod(map(max, *shapes))


def _filtered(x: Tensor, weight: Tensor, *rest: Any, out_val: Tensor, **named: Any) -> int:
    return 2 * layer_macs(out_val, weight[0].numel())


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any, **named: Any) -> int:
    return 2 * _rows(query) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _of_second(x: Tensor, y: Tensor, *rest: Any, out_val: Any, **named: Any) -> int:
    return 2 * y.numel()


def _batches_summed(x: Tensor, a: Tensor, b: Tensor, *rest: Any, out_val: Any, **named: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _distances(a: Tensor, b: Tensor, *rest: Any, out_val: Tensor, **named: Any) -> int:
    return 2 * out_val.numel() * a.shape[-1]


def _grouped(x: Tensor, *rest: Any, out_val: Tensor, **named: Any) -> int:
    return 2 * layer_macs(out_val, x.shape[-1])


def _over_time(x: Tensor, weight: Tensor, *rest: Any, out_val: Tensor, **named: Any) -> int:
    return 2 * layer_macs(out_val, weight[..., 0].numel())


_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::mkldnn_rnn_layer": _recurrent,
    "aten::_cudnn_rnn": _recurrent_cudnn,
    "aten::_trilinear": _trilinear,
    "aten::_conv_depthwise2d": _filtered,
    "aten::conv_tbc": _over_time,
    "aten::_grouped_mm": _grouped,
    "transformers::grouped_mm_fallback": _grouped,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::mv": lambda x, y, *rest, out_val: 2 * x.numel(),
    "aten::addmv": lambda x, y, *rest, out_val, **named: 2 * y.numel(),
    "aten::dot": _of_second,
    "aten::vdot": _of_second,
    "aten::addbmm": _batches_summed,
    "aten::_cdist_forward": _distances,
    "aten::_euclidean_dist": _distances,
    "torchvision::deform_conv2d": _filtered,
}
"""Floating-point operations (two for each multiply-accumulate) of operations for which PyTorch has no formula."""

_SOLVERS = ("_fft", "linalg_", "_linalg", "cholesky", "triangular_solve", "lu_", "ormqr", "_sparse", "_weight_int")
_NAMESPACES = ("aten", "prim", "prims", "profiler")
_MOVING = ("torchvision::nms", "torchvision::roi_align", "torchvision::roi_pool", "torchvision::ps_roi")


def _multiplies(func: Any) -> bool:
    """Whether an operation without a formula may contain multiplications other than element-wise ones."""
    namespace, _, name = func.name().partition("::")
    if namespace in _NAMESPACES:
        return name.startswith(_SOLVERS)
    return not func.name().startswith(_MOVING)


def layer_macs(out: Tensor, products: int) -> int:
    """Multiply-accumulates of one call of a convolution or linear layer, as PyTorch's own formulas count them.

    Args:
        out: the output of the layer.
        products: number of products in one element of the output, which is the number of weights in a filter.
    """
    return out.numel() * products


@cache
def _composite(func: Any) -> bool:
    """Whether an operation is composite and may contain counted operations."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return func._overloadpacket not in _FREE and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite)


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = (1,),
    padding: Any = (0,),
    dilation: Any = (1,),
    groups: int = 1,
) -> list[int] | None:
    axes = weight.dim() - 2
    if x.dim() != weight.dim() or weight.shape[1] * groups != x.shape[1] or isinstance(padding, str):
        return None
    each = [list(value) * (axes // len(value)) for value in (stride, padding, dilation)]
    sides = [
        (side + 2 * pad - far * (kernel - 1) - 1) // step + 1
        for side, kernel, step, pad, far in zip(x.shape[2:], weight.shape[2:], *each, strict=True)
    ]
    return [x.shape[0], weight.shape[0], *sides] if min(sides) > 0 else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[int] | None:
    return [*x.shape[:-1], weight.shape[0]] if weight.dim() == 2 and x.shape[-1] == weight.shape[1] else None


def _batch_norm(x: Tensor, *tensors_and_numbers: Any) -> list[int] | None:
    training = tensors_and_numbers[4]
    return None if training else list(x.shape)


_SHAPES: dict[Any, Callable[..., list[int] | None]] = {
    torch.ops.aten.conv1d.default: _convolved,
    torch.ops.aten.conv2d.default: _convolved,
    torch.ops.aten.conv3d.default: _convolved,
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.batch_norm.default: _batch_norm,
}
"""Output shapes of layers that need not be computed; None for arguments that the function does not handle."""


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs_by_parameter(model: nn.Module, inputs: ExampleInputs, total: int) -> dict[str, float]:
    """Multiply-accumulates by the name of the weight that they multiply.

    Args:
        model: the network.
        inputs: its inputs.
        total: the network's multiply-accumulates. Those without a weight, such as of attention scores, are listed
            under the name "".
    """
    named = {name: tensor for name, tensor in named_once(model).items() if isinstance(tensor, nn.Parameter)}
    with undisturbed(model):
        counter, _ = _counted(model, inputs, named)
    return {**counter.by_name, "": max(0.0, total - sum(counter.by_name.values()))}


def count_macs(model: nn.Module, inputs: ExampleInputs) -> int:
    """Multiply-accumulates of convolutions, linear layers and matrix products in one forward pass."""
    with plain_attention(), MacCounter() as counter:
        outputs(model, inputs)
    return counter.total


def macs_by_shapes(model: nn.Module, inputs: ExampleInputs) -> int:
    """As :func:`count_macs`, for models that can be traced. Layers return zeros, unless the model fails on zeros.

    Raises:
        InputError: the model does not run on inputs of these shapes.
    """
    return macs_and_shapes(model, inputs)[0]


def macs_and_shapes(model: nn.Module, inputs: ExampleInputs) -> tuple[int, list[torch.Size]]:
    """As :func:`macs_by_shapes`, with the shapes of the outputs.

    Raises:
        InputError: the model does not run on inputs of these shapes.
    """
    counter, found = _counted(model, inputs)
    return counter.total, [tensor.shape for tensor in found]


def _counted(
    model: nn.Module, inputs: ExampleInputs, named: Mapping[str, Tensor] | None = None
) -> tuple[MacCounter, list[Tensor]]:
    counter = MacCounter(spare=True, named=named)
    with torch.no_grad(), plain_attention():
        try:
            with undivided(), counter:
                found = outputs(model, inputs)
        except InputError:  # the model fails on zeros
            counter = MacCounter(named=named)
            with counter:
                found = outputs(model, inputs)
    return counter, found
