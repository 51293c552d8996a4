"""The interface of a node for the functions that read operators, and the register of these functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lbyl.io.onnx.arrays import as_tensor
from lbyl.io.onnx.network import Known, Source


class Node(Protocol):
    """A node of the file while it is read.

    Attributes:
        operator: the name of its operator.
        opset: the version of the standard operators.
        attributes: its attributes by name, as numbers, texts, lists and arrays.
        operands: number of its operands.
        outputs: number of its outputs.
        where: its name in errors.
    """

    operator: str
    opset: int
    attributes: Mapping[str, Any]
    operands: int
    outputs: int
    where: str

    def source(self, index: int) -> Source:
        """An operand of any kind; None if it is left out."""
        ...

    def constant(self, index: int) -> np.ndarray | None:
        """The value of an operand that is known before the network runs; None if it is not known, or left out."""
        ...

    def is_used(self, output: int) -> bool:
        """Whether another node, or the file's user, reads an output."""
        ...

    def is_constant(self, index: int) -> bool:
        """Whether :meth:`constant` knows it."""
        ...

    def run(self, function: Callable[..., Any], *sources: Source, floating: bool = False) -> None:
        """Compute the node by a function of the sources."""
        ...

    def numbers(self, function: Callable[..., Any], *sources: Source) -> None:
        """Compute the node by a function that gives numbers (an array), from which others may be computed."""
        ...

    def first(self, function: Callable[..., Any], *sources: Source) -> Source:
        """Compute a value by a function, as an operand for the node."""
        ...

    def layer(self, module: nn.Module, held: Mapping[str, tuple[int, str, float]], *sources: Source) -> None:
        """Compute the node by a module; ``held`` gives (operand, layout, scale) for each of its tensors by name."""
        ...

    def recurrent(self, module: nn.RNNBase, gates: Sequence[int], *sources: Source) -> None:
        """Compute the node by a recurrent layer whose tensors are parts of the operands 1 to 3.

        ``gates`` has the place in the file of each gate of the layer.
        """
        ...

    def is_number(self, index: int) -> bool:
        """Whether an operand is a constant, or follows from shapes: an array when the network runs."""
        ...

    def is_zero(self, index: int) -> bool:
        """Whether an operand holds zeros only, whatever its shape; also if it is left out."""
        ...

    def sized(self, module: Any, *sources: Source, sizes: list[tuple[int, str]]) -> None:
        """Compute the node by a module whose ``sizes`` are numbers of the file: operands, or attributes by name."""
        ...

    def bias(self, width: int, axis: int) -> int | None:
        """The operand index of a bias that only the next node adds, along an axis counted from the end; else None."""
        ...

    def width(self, name: str, attribute: str) -> None:
        """Link the module's attribute ``name`` to the node's ``attribute``, which a cut then changes."""
        ...

    def refuse(self, why: str) -> Exception:
        """The error that says why this node can't be read."""
        ...


Build = Callable[[Node], None]
OPERATORS: dict[str, Build] = {}


def operator(*names: str) -> Callable[[Build], Build]:
    """Register the function that reads nodes of these operators."""

    def register(build: Build) -> Build:
        OPERATORS.update(dict.fromkeys(names, build))
        return build

    return register


def tensor(value: Any, like: Tensor) -> Any:
    """An operand for an operation with a tensor: arrays become tensors on its device, single numbers stay numbers."""
    if not isinstance(value, np.ndarray):
        return value
    if value.size == 1 and value.ndim <= like.dim():
        return value.item()
    made = as_tensor(value).to(like.device)
    return made.to(like.dtype) if made.is_floating_point() and like.is_floating_point() else made


def tensors(*values: Any) -> list[Any]:
    """Operands for an operation of which at least one is a tensor, converted by :func:`tensor`."""
    like = max((value for value in values if isinstance(value, Tensor)), key=lambda value: value.dim(), default=None)
    if like is None:
        return [as_tensor(value) if isinstance(value, np.ndarray) else value for value in values]
    return [tensor(value, like) for value in values]


def whole(value: Any) -> list[int]:
    """A shape or axes as a list of whole numbers."""
    if isinstance(value, Tensor):
        return [int(item) for item in value.reshape(-1).tolist()]
    return [int(item) for item in np.asarray(value).reshape(-1)]


def number(node: Node, index: int, default: Any = None) -> Any:
    """The single number that an operand holds; the default if it is left out."""
    found = node.constant(index)
    if found is None:
        return default
    return found.item() if found.size == 1 else default


def known(value: Any) -> Known:
    """A constant operand."""
    return Known(np.asarray(value))


def as_floating(value: Any, floating: torch.dtype) -> Tensor:
    """An operand as a tensor; arrays of floating-point numbers get the network's dtype."""
    if isinstance(value, Tensor):
        return value
    made = as_tensor(np.asarray(value))
    return made.to(floating) if made.is_floating_point() else made
