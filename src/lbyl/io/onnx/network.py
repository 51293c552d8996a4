"""The network that an ONNX file describes, as a module: its operators one by one, layers as modules of PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lbyl.errors import InputError
from lbyl.io.onnx.file import OnnxFile


@dataclass(frozen=True)
class Value:
    """What another step or the caller gives."""

    name: str


@dataclass(frozen=True)
class Held:
    """A tensor that the network holds: a parameter or buffer, by its path."""

    path: str


@dataclass(frozen=True, eq=False)
class Known:
    """A constant that no cut changes."""

    array: np.ndarray


Source = Value | Held | Known | None
"""Where an operand comes from; None where an optional one is left out."""


@dataclass(frozen=True, eq=False)
class Step:
    """One operator of the file.

    Attributes:
        name: its name in messages: the node's name and its operator.
        sources: its operands.
        outputs: names of what it gives; "" for what nobody uses.
        module: path of the module that does it, or "".
        function: what does it, where no module does.
        floating: whether the function is told the network's dtype, as ``floating=``.
    """

    name: str
    sources: tuple[Source, ...]
    outputs: tuple[str, ...]
    module: str = ""
    function: Callable[..., Any] | None = None
    floating: bool = False


@dataclass(frozen=True)
class Link:
    """Where a tensor of the network stands in the file.

    Attributes:
        path: of the parameter or buffer.
        value: the constant's name in the file.
        layout: how the two differ: "same", "transposed", "flat" (the file's has axes of size 1 beside), "gates".
        scale: what the file's values are multiplied by.
        node: of the operator that uses it, by position in the file.
        operand: which of its operands it is.
    """

    path: str
    value: str
    layout: str
    scale: float
    node: int
    operand: int


@dataclass(frozen=True)
class NumberLink:
    """Where a number of a module stands in the file.

    Attributes:
        module: its path.
        name: the module's attribute.
        place: of the number, where the attribute is a list.
        value: the constant's name in the file; "" where the number is an attribute of a node.
        index: of the number in that constant or attribute; None where the attribute is one number.
        node: that uses the constant first, or that has the attribute, by position in the file.
        operand: which of its operands the constant is; -1 for an attribute.
        attribute: the node's attribute.
    """

    module: str
    name: str
    place: int | None
    value: str
    index: int | None
    node: int
    operand: int = -1
    attribute: str = ""


@dataclass(frozen=True)
class FileInput:
    """An input that the file asks for: its name, dtype, and sizes, of which symbolic ones are names."""

    name: str
    dtype: torch.dtype
    sizes: tuple[int | str, ...]

    def __str__(self) -> str:
        sizes = "x".join(str(size) for size in self.sizes) or "scalar"
        return f"{self.name!r}: {str(self.dtype).removeprefix('torch.')} {sizes}"

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether an input may have this shape."""
        return len(shape) == len(self.sizes) and all(
            not isinstance(size, int) or size == given for size, given in zip(self.sizes, shape, strict=True)
        )

    def default(self) -> tuple[int, ...]:
        """A shape that it may have."""
        image = len(self.sizes) == 4 and {self.sizes[1], self.sizes[3]} & {1, 3, 4}
        return tuple(
            size if isinstance(size, int) else 1 if axis == 0 else _IMAGE if image else _SEQUENCE
            for axis, size in enumerate(self.sizes)
        )

    def make(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """A value of this shape."""
        if self.dtype.is_floating_point:
            return torch.randn(tuple(shape), generator=generator).to(self.dtype)
        return torch.full(tuple(shape), int("mask" in self.name.lower()), dtype=self.dtype)


_IMAGE, _SEQUENCE = 224, 128
"""Sizes where the file leaves them open."""
_LARGEST_INPUT = 2**28


@dataclass(frozen=True, eq=False)
class Program:
    """What a file says, besides its weights: nobody changes it, and copies of a network share it."""

    file: OnnxFile
    inputs: tuple[FileInput, ...]
    outputs: tuple[Source, ...]
    steps: tuple[Step, ...]
    links: tuple[Link, ...] = ()
    numbers: tuple[NumberLink, ...] = ()
    last_uses: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def __copy__(self) -> Program:
        return self

    def __deepcopy__(self, memo: object) -> Program:
        return self


class OnnxNetwork(nn.Module):
    """A network read from an ONNX file.

    It is called with the file's inputs in their order, or by their names. Sizes that the file leaves open may differ
    from call to call.

    Attributes:
        program: what the file says.
    """

    program: Program

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """The file's outputs: a tensor where there is one, else a tuple."""
        program = self.program
        values = self._given(args, kwargs)
        floating = next((t.dtype for t in self.parameters() if t.is_floating_point()), torch.float32)
        for number, step in enumerate(program.steps):
            operands = [self._operand(source, values) for source in step.sources]
            if step.module:
                found = self.get_submodule(step.module)(*operands)
            else:
                assert step.function is not None
                found = step.function(*operands, floating=floating) if step.floating else step.function(*operands)
            made = found if isinstance(found, (tuple, list)) else (found,)
            values.update((name, item) for name, item in zip(step.outputs, made, strict=False) if name)
            for name in program.last_uses.get(number, ()):
                values.pop(name, None)
        outputs = tuple(torch.as_tensor(self._operand(source, values)) for source in program.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def example_inputs(
        self, shapes: Sequence[Sequence[int]] | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Inputs of the shapes that the file states.

        Sizes that it leaves open become 1 on the first axis, 224 for the sides of images, and 128 elsewhere. Real
        numbers are drawn at random, masks are ones, and other whole numbers zeros, which are valid in every vocabulary.

        Args:
            shapes: of the inputs, in place of the file's.
            generator: what the numbers are drawn with.

        Raises:
            InputError: other shapes than the file states.
        """
        asked = self.program.inputs
        if shapes is not None and len(shapes) != len(asked):
            told = ", ".join(map(str, asked))
            raise InputError(f"{self.program.file.path} takes {len(asked)} inputs ({told}); {len(shapes)} were given")
        made = []
        for place, item in enumerate(asked):
            shape = tuple(shapes[place]) if shapes is not None else item.default()
            if not item.takes(shape):
                raise InputError(f"{self.program.file.path}: {item} can't be {'x'.join(map(str, shape))}")
            if math.prod(shape) > _LARGEST_INPUT:
                raise InputError(f"{self.program.file.path}: {item} is too large to be tried")
            made.append(item.make(shape, generator))
        return tuple(made)

    def _given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = [item.name for item in self.program.inputs]
        if len(args) > len(names) or any(name not in names[len(args) :] for name in kwargs):
            raise InputError(f"the file takes {len(names)} inputs ({', '.join(names)})")
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        missing = [name for name in names if name not in values]
        if missing:
            raise InputError(f"the file takes {len(names)} inputs; {', '.join(missing)} is missing")
        return values

    def _operand(self, source: Source, values: Mapping[str, Any]) -> Any:
        if source is None:
            return None
        if isinstance(source, Value):
            return values[source.name]
        if isinstance(source, Known):
            return source.array
        parent, _, name = source.path.rpartition(".")
        return getattr(self.get_submodule(parent), name)
