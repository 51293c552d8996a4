"""Example inputs: what a model is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lbyl.errors import InputError, LbylError, first_line


@dataclass(frozen=True)
class ExampleInputs:
    """Positional and keyword inputs of one call.

    >>> ExampleInputs.of(torch.zeros(1, 3)).describe()
    'float32 1x3'
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | ExampleInputs) -> ExampleInputs:
        """Accept a tensor, a tuple of positional inputs, or a mapping of keyword inputs.

        Raises:
            InputError: anything else, or no tensor among them.
        """
        if isinstance(inputs, ExampleInputs):
            return inputs
        if isinstance(inputs, Tensor):
            made = ExampleInputs((inputs,))
        elif isinstance(inputs, (tuple, list)):
            made = ExampleInputs(tuple(inputs))
        elif isinstance(inputs, Mapping):
            made = ExampleInputs((), dict(inputs))
        else:
            raise InputError(
                f"example_inputs is a {type(inputs).__name__}; pass a tensor, a tuple of positional inputs, "
                "or a dict of keyword inputs"
            )
        if not made.tensors():
            raise InputError("example_inputs holds no tensor; pass what the model is called with")
        for tensor in made.tensors():
            found = f"an input of {'x'.join(map(str, tensor.shape))}"
            if tensor.is_meta:
                raise InputError(f"{found} is on the meta device, where it has no values; pass one that has")
            if tensor.layout != torch.strided:
                raise InputError(f"{found} is sparse; pass a dense one (tensor.to_dense())")
            if not tensor.numel():
                raise InputError(f"{found} is empty: a size of zero; pass at least one example")
        return made

    def tensors(self) -> list[Tensor]:
        """All tensors among the inputs, in order."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def map(self, function: Callable[[Tensor], Tensor]) -> ExampleInputs:
        """The same structure with ``function`` applied to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, dict(self.kwargs)))
        return ExampleInputs(args, kwargs)

    def to(self, device: torch.device, floating: torch.dtype | None = None) -> ExampleInputs:
        """Move to a device; floating-point tensors also get the dtype, when one is given."""
        return self.map(lambda t: t.to(device, floating if t.is_floating_point() and floating else t.dtype))

    def thinned(self, share: float) -> ExampleInputs | None:
        """The same images with at most so large a share of their rows and columns; None where that can't be.

        Then there is something besides images, or they are small already. Both sides become multiples of 32, by which
        most networks shrink them, and 64 at the least.
        """
        tensors = self.tensors()
        if len(tensors) != 1 or tensors[0].dim() != 4 or not tensors[0].is_floating_point():
            return None
        sides = tensors[0].shape[2:]
        if min(sides) < 128:
            return None

        def thin(image: Tensor) -> Tensor:
            for dim, side in zip((2, 3), sides, strict=True):
                fewer = 32 * max(2, int(share * side / 32))
                image = image.index_select(dim, torch.arange(fewer, device=image.device) * side // fewer)
            return image

        return self.map(thin)

    def call(self, model: nn.Module) -> Any:
        """Run the model on these inputs."""
        return model(*self.args, **self.kwargs)

    def describe(self) -> str:
        """Dtypes and shapes, for messages."""
        return ", ".join(
            f"{str(t.dtype).removeprefix('torch.')} {'x'.join(map(str, t.shape)) or 'scalar'}" for t in self.tensors()
        )


def output_tensors(output: Any) -> list[Tensor]:
    """All tensors in a model's output, whatever its structure (tuples, dicts, dataclass-like mappings)."""
    if not isinstance(output, Tensor | tuple | list | dict) and hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def outputs(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """The model's output tensors, detached.

    Raises:
        InputError: the model fails on these inputs.
    """
    try:
        with torch.no_grad():
            return [tensor.detach() for tensor in output_tensors(inputs.call(model))]
    except LbylError:
        raise
    except Exception as error:
        raise InputError(
            f"the model does not run on the example inputs ({inputs.describe()}): {first_line(error)}"
        ) from error
