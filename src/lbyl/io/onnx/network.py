"""The network of an ONNX file as a module, which runs the file's operators one by one, with layers as submodules."""

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
    """An operand that is the output of another step, or an input of the network."""

    name: str


@dataclass(frozen=True)
class Held:
    """An operand that is a parameter or buffer of the network, by its path."""

    path: str


@dataclass(frozen=True, eq=False)
class Known:
    """An operand that is a constant which no cut changes."""

    array: np.ndarray


Source = Value | Held | Known | None
"""Where an operand comes from; None for an optional operand that is left out."""


@dataclass(frozen=True, eq=False)
class Step:
    """One operator of the file.

    Attributes:
        name: its name in messages: the node's name and its operator.
        sources: its operands.
        outputs: names of its outputs; "" for unused ones.
        module: path of the module that computes it, or "".
        function: the function that computes it, if no module does.
        floating: whether the function gets the network's dtype as ``floating=``.
    """

    name: str
    sources: tuple[Source, ...]
    outputs: tuple[str, ...]
    module: str = ""
    function: Callable[..., Any] | None = None
    floating: bool = False


@dataclass(frozen=True)
class Link:
    """The constant of the file that a tensor of the network was made from.

    Attributes:
        path: path of the parameter or buffer.
        value: the constant's name in the file.
        layout: how the two differ: "same", "transposed", "flat" (the constant has additional axes of size 1), "gates".
        scale: factor by which the constant was multiplied.
        node: position in the file of the node that uses the constant.
        operand: index of the constant among the operands of that node.
    """

    path: str
    value: str
    layout: str
    scale: float
    node: int
    operand: int


@dataclass(frozen=True)
class NumberLink:
    """The number in the file that a number of a module was taken from.

    Attributes:
        module: path of the module.
        name: the module's attribute.
        place: index of the number if the attribute is a list, else None.
        value: the constant's name in the file; "" if the number is an attribute of a node.
        index: index of the number in that constant or attribute; None if the attribute is a single number.
        node: position in the file of the node that uses the constant first, or that has the attribute.
        operand: index of the constant among the operands of that node; -1 for an attribute.
        attribute: name of the node's attribute.
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
    """An input of the file: its name, dtype, and sizes, where symbolic sizes are names."""

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
        """A shape that the input may have."""
        image = len(self.sizes) == 4 and {self.sizes[1], self.sizes[3]} & {1, 3, 4}
        return tuple(
            size if isinstance(size, int) else 1 if axis == 0 else _IMAGE if image else _SEQUENCE
            for axis, size in enumerate(self.sizes)
        )

    def make(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """An input of this shape: random floating-point numbers, ones for masks, zeros for other whole numbers."""
        if self.dtype.is_floating_point:
            return torch.randn(tuple(shape), generator=generator).to(self.dtype)
        return torch.full(tuple(shape), int("mask" in self.name.lower()), dtype=self.dtype)


_IMAGE, _SEQUENCE = 224, 128
"""Default sizes of images and sequences, if the file leaves them open."""
_LARGEST_INPUT = 2**28


@dataclass(frozen=True, eq=False)
class Program:
    """The content of a file without its weights. It never changes, so copies of a network share it."""

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
    """A network that was read from an ONNX file.

    It is called with the file's inputs, in order or by name. Sizes that the file leaves open may differ between calls.

    Attributes:
        program: the content of the file without its weights.
    """

    program: Program

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """The file's outputs: a tensor if there is one, else a tuple."""
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
        self,
        shapes: Sequence[Sequence[int]] | None = None,
        generator: torch.Generator | None = None,
        dtypes: Sequence[torch.dtype | None] | None = None,
    ) -> tuple[Tensor, ...]:
        """Inputs of the shapes that the file states.

        Sizes that the file leaves open become 1 on the first axis, 224 for the sides of images, and 128 elsewhere.
        Floating-point numbers are random, masks are ones, and other whole numbers are zeros, which every vocabulary
        has.

        Args:
            shapes: shapes of the inputs, if other than the defaults.
            generator: the source of random numbers.
            dtypes: dtypes that the inputs are expected to have, which are compared with the file's; None for any.

        Raises:
            InputError: the shapes or dtypes do not fit the file.
        """
        asked = self.program.inputs
        if shapes is not None and len(shapes) != len(asked):
            told = ", ".join(map(str, asked))
            raise InputError(f"{self.program.file.path} takes {len(asked)} inputs ({told}), but got {len(shapes)}")
        made = []
        for place, item in enumerate(asked):
            shape = tuple(shapes[place]) if shapes is not None else item.default()
            if not item.takes(shape):
                raise InputError(f"{self.program.file.path}: {item} can't be {'x'.join(map(str, shape))}")
            dtype = None if dtypes is None or place >= len(dtypes) else dtypes[place]
            if dtype not in (None, item.dtype):
                told = str(dtype).removeprefix("torch.")
                raise InputError(
                    f"{self.program.file.path}: {item} can't be {told}; leave the type out, or write its own"
                )
            if math.prod(shape) > _LARGEST_INPUT:
                raise InputError(f"{self.program.file.path}: {item} is too large; pass a smaller input")
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
