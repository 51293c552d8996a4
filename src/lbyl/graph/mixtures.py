"""Finds mixtures whose experts can be dropped as a whole: their router, and all that is stacked by expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.intercept import module_hooks
from lbyl.runtime.routed import Routed


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts.

    Attributes:
        experts: path of the module whose parameters are stacked by expert.
        router: path of the module that chooses experts for each token.
        block: path of the module that holds both.
        count: the number of experts.
        chosen: how many of them a token gets.
        tensors: all parameters and buffers with a slice for each expert, in experts, router and block: their names, and
            the dimension along which they are stacked.
    """

    experts: str
    router: str
    block: str
    count: int
    chosen: int
    tensors: tuple[tuple[str, int], ...]


def find_mixtures(model: nn.Module, inputs: ExampleInputs) -> tuple[tuple[Mixture, ...], dict[str, str]]:
    """Find the mixtures of a network, in execution order, and why others can't lose experts.

    Experts are a module all of whose parameters are stacked by expert, two of them matrices, and which is given states,
    the experts that were chosen for each token, and the router's weights, as experts of transformers 5 are. The router
    is a module beside it with a row for each expert, that returned what was chosen, or scores for each expert.

    Args:
        model: the network; it is not changed.
        inputs: the example inputs.
    """
    with undisturbed(model), torch.no_grad():
        work = sharing_copy(model)
        stacked = {path: count for path, module in work.named_modules() if (count := stacked_experts(module))}
        calls, outputs = _observed(work, inputs, stacked)
    found: list[Mixture] = []
    others: dict[str, str] = {}
    for path, routed in calls.items():
        block, count = path.rpartition(".")[0], stacked[path]
        router = _router(work, path, routed, count, outputs)
        if routed is None:
            others[path] = "it is not given states, chosen experts and their weights as three matrices"
        elif router is None:
            others[path] = f"no layer beside it has a row for each of its {count} experts, and chooses"
        elif groups := _groups(work.get_submodule(block), work.get_submodule(router)):
            others[path] = f"its router chooses among {groups} groups of experts first"
        else:
            tensors = tuple(_by_expert(work, path, router, block, count))
            found.append(Mixture(path, router, block, count, routed.chosen.shape[1], tensors))
    return tuple(found), others


def stacked_experts(module: nn.Module) -> int:
    """The number of experts whose weights are stacked in a module's parameters; 0 if it holds none."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    counts = {len(parameter) for parameter in own if parameter.dim()}
    matrices = sum(parameter.dim() == 3 for parameter in own)
    return counts.pop() if matrices > 1 and len(counts) == 1 and min(counts) > 1 else 0


def _observed(
    model: nn.Module, inputs: ExampleInputs, stacked: dict[str, int]
) -> tuple[dict[str, Routed | None], dict[str, list[Tensor]]]:
    """The calls of experts, and the outputs of all modules beside them."""
    calls: dict[str, Routed | None] = {}
    outputs: dict[str, list[Tensor]] = {}
    blocks = {path.rpartition(".")[0] for path in stacked}
    beside = {
        path: module
        for path, module in model.named_modules()
        if path.rpartition(".")[0] in blocks or any(path.startswith(f"{block}.") for block in blocks)
    }

    def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if path in stacked:
            calls[path] = Routed.of(module, args, kwargs) if path not in calls else None

    def leave(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs[path] = output_tensors(output)

    with module_hooks(beside, enter, leave):
        inputs.cloned().call(model)
    return calls, outputs


def _router(
    model: nn.Module, experts: str, routed: Routed | None, count: int, outputs: dict[str, list[Tensor]]
) -> str | None:
    """The path of the module that chose the experts, or that scores each of them."""
    block = experts.rpartition(".")[0]
    candidates = [
        path
        for path in outputs
        if path.startswith(f"{block}.") and path != experts and any(_slices(model.get_submodule(path), count))
    ]
    for path in candidates:
        if routed is not None and any(made is routed.chosen for made in outputs[path]):
            return path
    scoring = [path for path in candidates if any(made.shape[-1:] == (count,) for made in outputs[path])]
    return scoring[0] if len(scoring) == 1 else None


def _slices(module: nn.Module, count: int) -> Iterator[tuple[str, int]]:
    """The parameters and buffers with a slice for each expert, and the dimension along which they are stacked."""
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None and tensor.dim() and len(tensor) == count:
                yield name, 0
            elif tensor is not None and tensor.shape == (1, count):
                yield name, 1


def _by_expert(model: nn.Module, experts: str, router: str, block: str, count: int) -> Iterator[tuple[str, int]]:
    """The same in the experts, the router with all within it, and the block's own vectors, by full names."""
    chooses = [path for path, _ in model.named_modules() if path == router or path.startswith(f"{router}.")]
    for path in (experts, *chooses, block):
        module = model.get_submodule(path)
        for name, dim in _slices(module, count):
            tensor = module._parameters.get(name, module._buffers.get(name))
            assert tensor is not None
            if path != block or tensor.numel() == count:
                yield f"{path}.{name}", dim


def _groups(*modules: nn.Module) -> int:
    """The number of groups of experts among which a router chooses first; 0 if there is one group."""
    names = ("n_group", "num_group", "num_expert_group", "num_expert_groups")
    found = [value for module in modules for name in names if type(value := vars(module).get(name)) is int]
    return max(found, default=0) if max(found, default=0) > 1 else 0
