"""Finds numbers of modules that their code compares with a size, as in ``assert x.shape[1] == self.channels``.

A traced program has no trace of such a comparison. But the code stops a narrower network, unless the number follows.
"""

from __future__ import annotations

import dis
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from lbyl.graph.builder import Builder, layer_name
from lbyl.graph.numbers import codes_of, run_marked
from lbyl.graph.union_find import compact, varies
from lbyl.runtime.inputs import ExampleInputs

Compared = frozenset[tuple[str, int]]
"""Paths of modules, and numbers that they compare."""


def find_compared(model: nn.Module, inputs: ExampleInputs) -> Compared:
    """The whole numbers among modules' attributes that their code finds equal to another number.

    The model runs once, with numbers that note what they are compared with, if any of its classes compares sizes.

    Args:
        model: the network; it is not changed.
        inputs: the example inputs.
    """
    equal = set[tuple[str, int]]()
    marks = {
        (path, name): _Watched(value, path, equal)
        for path, module in model.named_modules()
        if _compares_sizes(type(module))
        for name, value in vars(module).items()
        if type(value) is int and value > 1
    }
    return frozenset(equal) if marks and run_marked(model, inputs, marks) else frozenset()


def note_entering(builder: Builder, node: fx.Node, env: Mapping[fx.Node, Any], compared: Compared) -> None:
    """Record the shapes of values that enter a module which compares a number with the size of a channel axis."""
    place = layer_name(node)
    for module, size in compared:
        if not _within(place, module):
            continue
        for source in node.all_input_nodes:
            shadow = env[source]
            if source in builder.parameters or not isinstance(shadow, Tensor) or _within(layer_name(source), module):
                continue
            shadow = compact(shadow)
            if [shadow.shape[dim] for dim in range(shadow.dim()) if varies(shadow, dim)] == [size]:
                builder.shaped(shadow, node, module=module)


def _within(place: str, module: str) -> bool:
    return not module or place == module or place.startswith(f"{module}.")


def _compares_sizes(kind: type[nn.Module]) -> bool:
    """Whether any method of a class outside of PyTorch asks for sizes and compares something."""
    return any(
        {"shape", "size"} & {*code.co_names} and any(step.opname == "COMPARE_OP" for step in dis.get_instructions(code))
        for code in codes_of(kind)
    )


class _Watched(int):
    """A whole number that notes when it is found equal to another one."""

    def __new__(cls, value: int, path: str, equal: set[tuple[str, int]]) -> _Watched:
        made = super().__new__(cls, value)
        made._path, made._equal = path, equal
        return made

    _path: str
    _equal: set[tuple[str, int]]

    def __eq__(self, other: object) -> bool:
        same = int(self) == (int(other) if isinstance(other, _Watched) else other)
        if same:
            self._equal.add((self._path, int(self)))
        return same

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__
