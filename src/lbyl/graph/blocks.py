"""Finds residual blocks: children of lists that add something to their input, so that the network runs without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lbyl.runtime.contexts import plain_attention, undisturbed
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.intercept import module_hooks


@dataclass(frozen=True)
class Block:
    """A residual block: a child of an ``nn.ModuleList`` or ``nn.Sequential``.

    Attributes:
        stack: path of the list.
        index: position of the block in it.
        name: path of the block.
    """

    stack: str
    index: int
    name: str


@dataclass(frozen=True)
class Call:
    """One call of a module: its inputs, and its first tensor output."""

    inputs: ExampleInputs
    output: Tensor


@dataclass(frozen=True)
class Blocks:
    """The residual blocks of a network in the order of their lists.

    Attributes:
        blocks: the blocks.
        calls: the calls of all children of the lists on the example inputs, by path.
    """

    blocks: tuple[Block, ...]
    calls: Mapping[str, Call]


def lists_of(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """The lists of modules in a network, by path; a list that is registered twice is left out."""
    paths = list(model.named_modules(remove_duplicate=False))
    times = Counter(id(module) for _, module in paths)
    return {
        path: module
        for path, module in paths
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1 and times[id(module)] == 1
    }


def child_path(stack: str, name: str) -> str:
    """The path of a child of a list; the list may be the whole network."""
    return f"{stack}.{name}" if stack else name


def first_float(value: Any) -> Tensor | None:
    """The first floating-point tensor in a value."""
    return next((tensor for tensor in output_tensors(value) if tensor.is_floating_point()), None)


def find_blocks(model: nn.Module, inputs: ExampleInputs) -> Blocks:
    """Find the residual blocks of a network.

    A residual block is called exactly once in a forward pass, its first tensor input and its first tensor output have
    one shape, and the output still follows the input when all layers within the block return zeros: it computes
    ``x + f(x)``, or a norm or an activation of that. A block within a block counts, and the outer one does not.

    Args:
        model: the network; it is not changed.
        inputs: the example inputs.
    """
    with undisturbed(model), plain_attention(), torch.no_grad():
        work = sharing_copy(model)
        calls = _recorded(work, inputs)
        found = []
        for stack, module in lists_of(work).items():
            for index, (name, child) in enumerate(module.named_children()):
                path = child_path(stack, name)
                if path in calls and is_residual(child, calls[path]):
                    found.append(Block(stack, index, path))
    outer = {each.name for each in found if any(other.name.startswith(f"{each.name}.") for other in found)}
    return Blocks(tuple(each for each in found if each.name not in outer), calls)


def _recorded(model: nn.Module, inputs: ExampleInputs) -> dict[str, Call]:
    """The calls of all children of lists that are called exactly once, by path."""
    children = {
        child_path(stack, name): child
        for stack, module in lists_of(model).items()
        for name, child in module.named_children()
    }
    times = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    given: dict[str, list[ExampleInputs]] = {path: [] for path in children}
    made: dict[str, Any] = {}

    def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given[path].append(ExampleInputs(args, kwargs).cloned())

    def leave(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor = first_float(output)
        made[path] = None if tensor is None else tensor.detach().clone()

    with module_hooks(children, enter, leave):
        inputs.cloned().call(model)
    return {
        path: Call(those[0], made[path])
        for path, those in given.items()
        if len(those) == 1 and made.get(path) is not None and times[id(children[path])] == 1
    }


_FOLLOWS = 0.5
"""Smallest correlation between the input of a block and its output without its layers."""


def is_residual(block: nn.Module, call: Call) -> bool:
    """Whether the output of a block follows its input when all layers within it return zeros."""
    x = first_float((call.inputs.args, dict(call.inputs.kwargs)))
    if x is None or x.shape != call.output.shape or x.dim() < 2:
        return False
    inner = [
        module
        for path, module in block.named_modules()
        if path and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    ]
    if not inner:
        return False
    with silent(inner):
        try:
            kept = first_float(call.inputs.cloned().call(block))
        except Exception:  # a model's own code may raise anything where layers return zeros
            return False
    return kept is not None and kept.shape == x.shape and _correlation(x, kept) > _FOLLOWS


@contextmanager
def silent(modules: list[nn.Module]) -> Iterator[None]:
    """Let modules return zeros in place of their outputs."""

    def zeros(module: nn.Module, args: Any, output: Any) -> Any:
        return pytree.tree_map_only(Tensor, torch.zeros_like, output)

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(zeros))
        yield


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length > 0 else 0.0
