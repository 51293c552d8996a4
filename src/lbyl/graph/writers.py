"""Finds the layer of a block whose output is added to the residual stream, and what follows the sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lbyl.graph.blocks import Call, first_float
from lbyl.runtime.intercept import FunctionInterceptor, module_hooks
from lbyl.runtime.seeding import generator_for


@dataclass(frozen=True)
class Writer:
    """The layer that a block adds to the stream: ``stream = tail(rest + writer)``.

    Attributes:
        layer: path of the linear layer or convolution within the block.
        norm: path of the batch norm that directly follows it; "" if there is none.
        tail: what follows the sum: "" (nothing), "relu" or "layer_norm".
    """

    layer: str
    norm: str
    tail: str

    @property
    def output(self) -> str:
        """Path of the module whose output is added."""
        return self.norm or self.layer


@dataclass(frozen=True)
class Sum:
    """The sum in which a block ends.

    Attributes:
        value: the sum.
        tail: what follows it, as in :class:`Writer`.
        scale: weight of a layer norm that follows, or None.
        shift: bias of a layer norm that follows, or None.
    """

    value: Tensor
    tail: str = ""
    scale: Tensor | None = None
    shift: Tensor | None = None


_RELUS = (functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


class SumInterceptor(FunctionInterceptor):
    """While ``active``, remembers the last ReLU or layer norm and its input, for :meth:`sum_of`."""

    def __init__(self) -> None:
        super().__init__()
        self.active = True
        self._last: tuple[Any, Sum] | None = None

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the call, and remember it if a block may end with it."""
        if not self.active or (func not in _RELUS and func is not functional.layer_norm):
            return func(*args, **kwargs)
        given = args[0] if args else kwargs["input"]
        if func is functional.layer_norm:
            names = dict(zip(("input", "normalized_shape", "weight", "bias"), args, strict=False)) | kwargs
            result = func(*args, **kwargs)
            self._last = result, Sum(given, "layer_norm", names.get("weight"), names.get("bias"))
            return result
        before = given.clone()  # it may be written to
        result = func(*args, **kwargs)
        self._last = result, Sum(before, "relu")
        return result

    def sum_of(self, output: Tensor) -> Sum:
        """The sum before the tail of a block with this output."""
        if self._last is not None and self._last[0] is output:
            return self._last[1]
        return Sum(output)


_MOST = 12
"""So many of the last layers of a block are tried."""
_EXACT = 1e-2
"""Largest relative deviation of a change of the sum from the change of the layer's output."""


@torch.no_grad()
def find_writer(block: nn.Module, call: Call) -> Writer | None:
    """The layer whose output is added to the stream as it is, found by adding noise to the output of one layer.

    If there are several, as in blocks with two branches, the one with the largest variance is chosen.

    Args:
        block: the block in evaluation mode.
        call: a call of it.

    Returns:
        The writer; None if none is known: a norm or a scale follows the last layer, or the layer is a grouped one.
    """
    order, outputs = _layers(block, call)
    whole = _sum(block, call)
    found: list[tuple[float, Writer]] = []
    for path in order[: -_MOST - 1 : -1]:
        writer = _writer_of(block, path, outputs, whole.tail)
        if writer is None or outputs[path][1].shape != whole.value.shape:
            continue
        noise = torch.randn(whole.value.shape, generator=generator_for(0, path)).to(whole.value)
        noise = noise * whole.value.std()
        with block.get_submodule(path).register_forward_hook(lambda _, args, output, noise=noise: output + noise):
            moved = _sum(block, call).value
        if moved.shape == whole.value.shape and _close(moved - whole.value, noise):
            found.append((float(outputs[path][1].double().var()), writer))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is the linear layer of transformers that stores its weight input first."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, _ConvNd) and hasattr(module, "nf")


def _mixes(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd):
        return module.groups == 1 and not isinstance(module, _ConvTransposeNd)
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


def _layers(block: nn.Module, call: Call) -> tuple[list[str], dict[str, tuple[Tensor | None, Tensor]]]:
    """The layers and batch norms in the order of their calls, and each one's input and output."""
    order: list[str] = []
    seen: dict[str, tuple[Tensor | None, Tensor]] = {}
    known = (nn.Linear, _ConvNd, _BatchNorm)
    layers = {p: m for p, m in block.named_modules() if p and (isinstance(m, known) or is_transposed_linear(m))}

    def leave(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            order.append(path)
            seen[path] = args[0] if args else None, output

    with module_hooks(layers, lambda *_: None, leave):
        call.inputs.cloned().call(block)
    return [path for path in order if order.count(path) == 1], seen


def _writer_of(
    block: nn.Module, path: str, outputs: dict[str, tuple[Tensor | None, Tensor]], tail: str
) -> Writer | None:
    module = block.get_submodule(path)
    if not isinstance(module, _BatchNorm):
        return Writer(path, "", tail) if _mixes(module) else None
    if module.running_mean is None or not module.affine:
        return None
    given = outputs[path][0]
    before = [name for name, (_, output) in outputs.items() if output is given and _mixes(block.get_submodule(name))]
    return Writer(before[0], path, tail) if len(before) == 1 else None


def _sum(block: nn.Module, call: Call) -> Sum:
    watch = SumInterceptor()
    with watch:
        output = first_float(call.inputs.cloned().call(block))
        assert output is not None
        return watch.sum_of(output)


def _close(change: Tensor, noise: Tensor) -> bool:
    return float((change - noise).detach().norm()) <= _EXACT * float(noise.norm())
