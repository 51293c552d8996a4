"""Finds submodules that can be traced although the whole model can't, and the inputs that the model gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lbyl.errors import InputError, TraceError
from lbyl.graph import NOT_OURS, Consumer, Graph, Group, Size, Slot, trace
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.inputs import ExampleInputs, outputs
from lbyl.runtime.intercept import module_hooks

_DEEPEST = 5


@dataclass(frozen=True)
class Submodule:
    """A submodule: its path, the inputs that the model calls it with, and its channel graph."""

    path: str
    inputs: ExampleInputs
    graph: Graph


def captured(model: nn.Module, inputs: ExampleInputs, paths: Iterable[str]) -> dict[str, list[ExampleInputs]]:
    """The inputs of every call of each submodule in ``paths``, from one run of the model."""
    calls: dict[str, list[ExampleInputs]] = {path: [] for path in paths}

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[path].append(ExampleInputs(args, kwargs).cloned())

    with module_hooks({path: model.get_submodule(path) for path in calls}, note), undisturbed(model):
        outputs(model, inputs)
    return calls


def submodule_of(model: nn.Module, inputs: ExampleInputs, path: str) -> Submodule:
    """The submodule of that name, with its inputs and its graph.

    Raises:
        InputError: there is no such submodule, or the model does not call it exactly once with tensors.
        TraceError: ``torch.export`` can't trace it.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        names = ", ".join(name for name, _ in model.named_children())
        raise InputError(f"submodule={path!r}: {type(model).__name__} has none of that name; it has {names}") from error
    calls = captured(model, inputs, [path])[path]
    if len(calls) != 1 or not calls[0].tensors():
        raise InputError(
            f"submodule={path!r} is called {len(calls)} times when the model runs; choose one that is called once, "
            "with tensors"
        )
    with undisturbed(module):
        return Submodule(path, calls[0], trace(module, calls[0]))


def traceable_submodules(model: nn.Module, inputs: ExampleInputs) -> tuple[list[Submodule], dict[str, str]]:
    """The largest submodules that can be traced separately, and for all others the reason why they can't be used.

    A submodule can be used if the model calls it once, with tensors, and it has channels that can be cut.
    """
    paths = [path for path, _ in model.named_modules() if path and path.count(".") < _DEEPEST]
    calls = captured(model, inputs, paths)
    parts: list[Submodule] = []
    left: dict[str, str] = {}

    def visit(path: str, module: nn.Module) -> None:
        if not any(True for _ in module.parameters()):
            return
        why = ""
        if len(calls.get(path, ())) == 1 and calls[path][0].tensors():
            try:
                with undisturbed(module):
                    graph = trace(module, calls[path][0])
            except (TraceError, InputError) as error:
                why = str(error)
            else:
                if any(group.prunable for group in graph.groups):
                    parts.append(Submodule(path, calls[path][0], graph))
                else:
                    left[path] = "; ".join(dict.fromkeys(g.reason or "" for g in graph.groups)) or "no channels to cut"
                return
        children = [(f"{path}.{name}", child) for name, child in module.named_children()]
        known = len(parts) + len(left)
        for name, child in children:
            if name in calls:
                visit(name, child)
        if len(parts) + len(left) == known:
            left[path] = why or f"it is called {len(calls.get(path, ()))} times"

    for name, child in model.named_children():
        visit(name, child)
    return parts, left


def joined(parts: Iterable[Submodule]) -> Graph:
    """The graphs of several submodules as one graph, with the names that the whole model uses."""
    groups: list[Group] = []
    consumers: list[Consumer] = []
    barriers: list[str] = []
    sizes: list[Size] = []
    lengths: set[tuple[str, str]] = set()
    for part in parts:
        first = len(groups)

        def columns(pairs: tuple[tuple[int, int], ...], first: int = first) -> tuple[tuple[int, int], ...]:
            return tuple((group if group == NOT_OURS else group + first, channel) for group, channel in pairs)

        def name(text: str, path: str = part.path) -> str:
            return f"{path}.{text}" if text else path

        def slot(item: Slot, name: Callable[[str], str] = name) -> Slot:
            return replace(item, parameter=name(item.parameter))

        for group in part.graph.groups:
            producers = tuple(
                replace(p, layer=name(p.layer), weight=slot(p.weight), bias=p.bias and name(p.bias))
                for p in group.producers
            )
            groups.append(
                replace(
                    group,
                    name=name(group.name),
                    producers=producers,
                    carriers=tuple(map(slot, group.carriers)),
                    consumers=tuple(map(slot, group.consumers)),
                    tied=tuple(map(slot, group.tied)),
                    averages=tuple(replace(a, module=name(a.module), weight=name(a.weight)) for a in group.averages),
                )
            )
        consumers += [
            replace(
                consumer,
                layer=name(consumer.layer),
                weight=name(consumer.weight),
                bias=consumer.bias and name(consumer.bias),
                columns=columns(consumer.columns),
            )
            for consumer in part.graph.consumers
        ]
        barriers += [f"{part.path}: {barrier}" for barrier in part.graph.barriers]
        sizes += [replace(size, module=name(size.module), columns=columns(size.columns)) for size in part.graph.sizes]
        lengths |= {(name(module), attribute) for module, attribute in part.graph.lengths}
    notes = tuple(f"{part.path}: {note}" for part in parts for note in part.graph.notes)
    return Graph(tuple(groups), tuple(consumers), tuple(barriers), tuple(sizes), frozenset(lengths), notes=notes)
