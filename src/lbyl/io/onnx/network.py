"""The network of an ONNX file as a module, which runs the file's operators one by one, with layers as submodules."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lbyl.errors import InputError, LbylError, first_line
from lbyl.io.onnx.file import OnnxFile, session


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
class Part:
    """The part of a recurrent layer's constant that a tensor of the network was made from.

    Attributes:
        direction: its index along the first axis.
        half: for a bias, 0 for the one that is added to the input's product, 1 for the state's; None for a weight.
        gates: the place in the file of each gate of the tensor.
    """

    direction: int
    half: int | None
    gates: tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """The constant of the file that a tensor of the network was made from.

    Attributes:
        path: path of the parameter or buffer.
        value: the constant's name in the file.
        layout: how the two differ: "same", "transposed", "flat" (the constant has additional axes of size 1), or "part"
            (the constant holds several tensors).
        scale: factor by which the constant was multiplied.
        node: position in the file of the node that uses the constant.
        operand: index of the constant among the operands of that node.
        part: the part of the constant, if its layout is "part".
    """

    path: str
    value: str
    layout: str
    scale: float
    node: int
    operand: int
    part: Part | None = None


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


UNNAMED = "?"
"""The name of sizes that the file leaves open without a name."""


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

    def proposal(
        self, image: tuple[int, int], length: int, channels: tuple[int, int] | None, ones: Collection[str]
    ) -> tuple[int, ...]:
        """A shape that the input may have.

        Args:
            image: height and width, if it is an image.
            length: the size of other open axes.
            channels: the axis and the number of an image's channels, for an input that states neither.
            ones: names of sizes that are 1.
        """
        axis = self._channels()
        known = self.sizes
        if axis is None and channels is not None and self._is_bare():
            axis = channels[0]
            known = tuple(channels[1] if place == axis else size for place, size in enumerate(known))
        sides: dict[int, int] = {}
        if axis is not None:
            sides.update(zip((2, 3) if axis == 1 else (1, 2), image, strict=True))
        made = []
        for place, size in enumerate(known):
            if isinstance(size, int):
                made.append(size)
            else:
                made.append(1 if size in ones or (place == 0 and size == UNNAMED) else sides.get(place, length))
        return tuple(made)

    def _channels(self) -> int | None:
        """The axis of an image's channels; None if the input is no image, or does not say so."""
        found = [axis for axis in (1, 3) if len(self.sizes) == 4 and self.sizes[axis] in (1, 3, 4)]
        return found[0] if found else None

    def _is_bare(self) -> bool:
        return len(self.sizes) == 4 and not any(isinstance(size, int) for size in self.sizes[1:])

    def make(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """An input of this shape: random floating-point numbers, ones for masks, zeros for other whole numbers."""
        if self.dtype.is_floating_point:
            return torch.randn(tuple(shape), generator=generator).to(self.dtype)
        return torch.full(tuple(shape), int("mask" in self.name.lower()), dtype=self.dtype)


_IMAGES = (
    (224, 224), (48, 320), (32, 320), (256, 256), (320, 320), (640, 640), (512, 512), (384, 384), (64, 64), (32, 32),
    (28, 28), (112, 112), (96, 96), (299, 299), (336, 336), (448, 448), (518, 518), (1024, 1024),
)  # fmt: skip
_LENGTHS = (128, 64, 77, 32, 16, 8, 4, 2, 1, 256, 512, 576, 1024, 2048, 4096, 16000, 48000)
_CHANNELS = (None, (1, 3), (3, 3), (1, 1), (3, 1))
"""Sizes of images and sequences that the file leaves open, and the axes and numbers of channels: the first ones that
the file runs on are taken. Networks that read lines of text take images of 32 or 48 rows only."""
_LARGEST_INPUT = 2**28


def _is_too_large(shape: Sequence[int]) -> bool:
    return math.prod(shape) > _LARGEST_INPUT


def _proposed(inputs: Sequence[FileInput]) -> list[tuple[tuple[int, ...], ...]]:
    """Shapes that the inputs may have, the usual ones first. Sizes of one name are equal in all of them."""
    # The first axis is the batch, except that of a vector, such as positions, whose size is a later axis of others.
    firsts = {item.sizes[0] for item in inputs if len(item.sizes) > 1}
    later = {size for item in inputs for size in item.sizes[1:]}
    vectors = {item.sizes[0] for item in inputs if len(item.sizes) == 1}
    ones = {size for size in firsts | (vectors - later) if isinstance(size, str)} - {UNNAMED}
    pairs = [(image, _LENGTHS[0]) for image in _IMAGES] + [(_IMAGES[0], length) for length in _LENGTHS]
    made = (
        tuple(item.proposal(image, length, channels, ones) for item in inputs)
        for channels in _CHANNELS
        for image, length in pairs
    )
    return list(dict.fromkeys(made))


@lru_cache(maxsize=16)
def _default_shapes(file: OnnxFile, inputs: tuple[FileInput, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes for a file's inputs: the first proposed ones that it runs on in onnxruntime, or else the first ones."""
    proposed = _proposed(inputs)
    if len(proposed) == 1:
        return proposed[0]
    try:
        opened = session(file.path)
    except Exception:  # those who need onnxruntime say what is wrong
        return proposed[0]
    for shapes in proposed:
        if any(map(_is_too_large, shapes)):
            continue
        generator = torch.Generator().manual_seed(0)
        pairs = zip(inputs, shapes, strict=True)
        try:
            opened.run(None, {item.name: item.make(shape, generator).numpy() for item, shape in pairs})
        except Exception:
            continue
        return shapes
    return proposed[0]


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
            found = self._computed(step, operands, floating)
            made = found if isinstance(found, (tuple, list)) else (found,)
            values.update((name, item) for name, item in zip(step.outputs, made, strict=False) if name)
            for name in program.last_uses.get(number, ()):
                values.pop(name, None)
        outputs = tuple(torch.as_tensor(self._operand(source, values)) for source in program.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _computed(self, step: Step, operands: Sequence[Any], floating: torch.dtype) -> Any:
        """What a step returns.

        Raises:
            InputError: it does not take operands of these sizes.
        """
        try:
            if step.module:
                return self.get_submodule(step.module)(*operands)
            assert step.function is not None
            return step.function(*operands, floating=floating) if step.floating else step.function(*operands)
        except (LbylError, torch.OutOfMemoryError, NotImplementedError):
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            given = ", ".join(_described(operand) for operand in operands if operand is not None)
            raise InputError(
                f"{step.name} does not run on {given}: {first_line(error).rstrip('.!')}; give inputs of sizes that the "
                "file takes (--input, or the shapes of example_inputs)"
            ) from error

    def example_inputs(
        self,
        shapes: Sequence[Sequence[int]] | None = None,
        generator: torch.Generator | None = None,
        dtypes: Sequence[torch.dtype | None] | None = None,
    ) -> tuple[Tensor, ...]:
        """Inputs of the shapes that the file states.

        Sizes that the file leaves open become 1 on the first axis, 224 for the sides of images, and 128 elsewhere, or
        the first of other usual sizes with which the file runs in onnxruntime, where it does not run with these.
        Floating-point numbers are random, masks are ones, and other whole numbers are zeros, which every vocabulary
        has.

        Args:
            shapes: shapes of the inputs, if other than the defaults. Those of scalars may be left out.
            generator: the source of random numbers.
            dtypes: dtypes that the inputs are expected to have, which are compared with the file's; None for any.

        Raises:
            InputError: the shapes or dtypes do not fit the file.
        """
        asked = self.program.inputs
        made = []
        for item, shape, dtype in zip(asked, *self._shapes(shapes, dtypes), strict=True):
            if not item.takes(shape):
                raise InputError(f"{self.program.file.path}: {item} can't be {'x'.join(map(str, shape))}")
            if dtype not in (None, item.dtype):
                told = str(dtype).removeprefix("torch.")
                raise InputError(
                    f"{self.program.file.path}: {item} can't be {told}; leave the type out, or write its own"
                )
            if _is_too_large(shape):
                raise InputError(f"{self.program.file.path}: {item} is too large; pass a smaller input")
            made.append(item.make(shape, generator))
        return tuple(made)

    def _shapes(
        self, shapes: Sequence[Sequence[int]] | None, dtypes: Sequence[torch.dtype | None] | None
    ) -> tuple[Sequence[tuple[int, ...]], Sequence[torch.dtype | None]]:
        """Shapes and dtypes of all inputs; scalars may be left out of those that are given."""
        asked = self.program.inputs
        if shapes is None:
            shapes = _default_shapes(self.program.file, asked)
        found = [tuple(shape) for shape in shapes]
        types = [*(dtypes or ())][: len(found)]
        types += [None] * (len(found) - len(types))
        if len(found) == sum(bool(item.sizes) for item in asked):
            for place, item in enumerate(asked):
                if not item.sizes and len(found) < len(asked):
                    found.insert(place, ())
                    types.insert(place, None)
        if len(found) != len(asked):
            told = ", ".join(map(str, asked))
            raise InputError(f"{self.program.file.path} takes {len(asked)} inputs ({told}), but got {len(found)}")
        return found, types

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


def _described(operand: Any) -> str:
    """An operand in errors: the sizes of tensors, and a few numbers as they are."""
    if isinstance(operand, Tensor):
        return "x".join(map(str, operand.shape)) or "a scalar"
    if isinstance(operand, np.ndarray):
        return str(operand.tolist()) if operand.size <= _FEW else "x".join(map(str, operand.shape))
    return f"{len(operand)} values" if isinstance(operand, (list, tuple)) else str(operand)


_FEW = 8
