"""What the functions of operators are given, and how they are found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lbyl.io.onnx.arrays import as_tensor
from lbyl.io.onnx.network import Known, Source


class Node(Protocol):
    """A node of the file while it is read.

    Attributes:
        operator: its name.
        opset: the version of the standard operators.
        attributes: by name, as numbers, texts, lists and arrays.
        operands: how many inputs it names.
        outputs: how many values it gives.
    """

    operator: str
    opset: int
    attributes: Mapping[str, Any]
    operands: int
    outputs: int

    def source(self, index: int) -> Source:
        """An operand, whatever it is; None where it is left out."""
        ...

    def constant(self, index: int) -> np.ndarray | None:
        """The value of an operand that is known before the network runs; None where it is not, or left out."""
        ...

    def is_constant(self, index: int) -> bool:
        """Whether :meth:`constant` knows it."""
        ...

    def run(self, function: Callable[..., Any], *sources: Source, floating: bool = False) -> None:
        """Have a function do it."""
        ...

    def numbers(self, function: Callable[..., Any], *sources: Source) -> None:
        """Have a function do it that gives numbers (an array), of which other numbers may be computed."""
        ...

    def first(self, function: Callable[..., Any], *sources: Source) -> Source:
        """Have a function make an operand of what follows."""
        ...

    def layer(self, module: nn.Module, held: Mapping[str, tuple[int, str, float]], *sources: Source) -> None:
        """Have a module do it, that holds constants of the file: operand, layout and scale by the names in it."""
        ...

    def sized(self, module: Any, *sources: Source, sizes: list[tuple[int, str]]) -> None:
        """Have a module do it, whose ``sizes`` are numbers of the file: operands, or attributes by name."""
        ...

    def bias(self, width: int, axis: int) -> int | None:
        """The operand number of a bias that the next node adds along an axis from the end, and nobody else looks."""
        ...

    def width(self, name: str, attribute: str) -> None:
        """Say that the module's attribute ``name`` is the node's ``attribute``."""
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
    """An operand beside a tensor: a single number as such, an array as a tensor on the same device."""
    if not isinstance(value, np.ndarray):
        return value
    if value.size == 1 and value.ndim <= like.dim():
        return value.item()
    made = as_tensor(value).to(like.device)
    return made.to(like.dtype) if made.is_floating_point() and like.is_floating_point() else made


def tensors(*values: Any) -> list[Any]:
    """Operands of one operation, of which at least one is a tensor, as what it takes."""
    like = max((value for value in values if isinstance(value, Tensor)), key=lambda value: value.dim(), default=None)
    if like is None:
        return [as_tensor(value) if isinstance(value, np.ndarray) else value for value in values]
    return [tensor(value, like) for value in values]


def whole(value: Any) -> list[int]:
    """A shape, axes or the like, as whole numbers."""
    if isinstance(value, Tensor):
        return [int(item) for item in value.reshape(-1).tolist()]
    return [int(item) for item in np.asarray(value).reshape(-1)]


def number(node: Node, index: int, default: Any = None) -> Any:
    """A single number that an operand must hold."""
    found = node.constant(index)
    if found is None:
        return default
    return found.item() if found.size == 1 else default


def known(value: Any) -> Known:
    """A constant operand."""
    return Known(np.asarray(value))


def as_floating(value: Any, floating: torch.dtype) -> Tensor:
    """An operand as a tensor; arrays of real numbers get the network's dtype."""
    if isinstance(value, Tensor):
        return value
    made = as_tensor(np.asarray(value))
    return made.to(floating) if made.is_floating_point() else made
