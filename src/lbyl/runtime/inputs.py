"""Example inputs: the arguments of one call of a model, and the tensors in its output."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lbyl.errors import InputError, LbylError, first_line
from lbyl.runtime.contexts import users_device
from lbyl.runtime.sentinels import meaningful

HUGE = 1e18
"""Squares of larger numbers are infinite in float32."""


def _holds_tensors(value: object) -> bool:
    """Whether an object has a tensor as one of its attributes."""
    return any(isinstance(each, Tensor) for each in getattr(value, "__dict__", {}).values())


def _is_byte_image(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8 and tensor.dim() >= 3


def _in_form(tensor: Tensor, form: torch.dtype) -> Tensor:
    return tensor.to(form) if _is_byte_image(tensor) and form.is_floating_point else tensor


@dataclass(frozen=True)
class ExampleInputs:
    """Positional and keyword inputs of one call.

    Attributes:
        args: positional inputs.
        kwargs: keyword inputs.
        rows: the only batch size that the network takes, where its code says one: a larger batch is run in parts of
            this size. None where any size will do.

    >>> ExampleInputs.of(torch.zeros(1, 3)).describe()
    'float32 1x3'
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None

    @staticmethod
    def of(
        inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | ExampleInputs, name: str = "example_inputs"
    ) -> ExampleInputs:
        """Accept a tensor, a tuple of positional inputs, or a mapping of keyword inputs; errors call it ``name``.

        Raises:
            InputError: it is anything else, holds no tensor, or holds a tensor that is empty, sparse or without values.
        """
        if isinstance(inputs, ExampleInputs):
            return inputs
        if isinstance(inputs, Tensor):
            made = ExampleInputs((inputs,))
        elif isinstance(inputs, (tuple, list)):
            made = ExampleInputs(tuple(inputs))
        elif isinstance(inputs, Mapping):
            made = ExampleInputs((), dict(inputs))
        elif _holds_tensors(inputs):
            made = ExampleInputs((inputs,))
        else:
            raise InputError(
                f"{name} is a {type(inputs).__name__}; pass a tensor, a tuple of positional inputs, "
                "or a dict of keyword inputs"
            )
        if not made.tensors():
            objects = (leaf for leaf in pytree.tree_leaves((made.args, dict(made.kwargs))) if _holds_tensors(leaf))
            if kind := next((type(leaf).__name__ for leaf in objects), ""):
                raise InputError(
                    f"{name} holds tensors only inside of a {kind}; wrap the model in a module that takes these "
                    f"tensors as its inputs and makes the {kind} of them"
                )
            raise InputError(f"{name} holds no tensor; pass the inputs that the model is called with")
        if any(tensor.is_inference() for tensor in made.tensors()) and not torch.is_inference_mode_enabled():
            made = made.map(Tensor.clone)  # gradients can't be computed from tensors of inference mode
        for tensor in made.tensors():
            if tensor.is_nested:
                raise InputError("an input is a nested tensor; pass a padded one (tensor.to_padded_tensor(0.0))")
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
        return replace(self, args=args, kwargs=kwargs)

    def to(self, device: torch.device, floating: torch.dtype | None = None) -> ExampleInputs:
        """Move to a device; floating-point tensors also get the dtype, when one is given."""
        return self.map(lambda t: t.to(device, floating if t.is_floating_point() and floating else t.dtype))

    def with_float_images(self, model: nn.Module) -> ExampleInputs | None:
        """The same inputs with floats in place of uint8 images, if the model computes the same from them, else None.

        Probes of any value, and gradients, need floats.
        """
        if not any(_is_byte_image(tensor) for tensor in self.tensors()):
            return None
        floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
        floats = self.map(lambda t: t.to(floating) if _is_byte_image(t) else t)
        try:
            with torch.no_grad():
                pairs = [output_tensors(each.cloned().call(model)) for each in (self, floats)]
        except Exception:  # whatever somebody's code raises on floats that it did not ask for
            return None
        same = len(pairs[0]) == len(pairs[1]) and all(
            a.shape == b.shape and torch.allclose(a.double(), b.double(), 1e-4, 1e-6, equal_nan=True)
            for a, b in zip(*pairs, strict=True)
        )
        return floats if same else None

    def in_the_form_of(self, other: ExampleInputs) -> ExampleInputs:
        """The same inputs with floats in place of uint8 images where ``other`` has floats."""
        forms = [t.dtype for t in other.tensors()]
        if len(forms) != len(self.tensors()):
            return self
        rest = iter(forms)
        return self.map(lambda t: _in_form(t, next(rest)))

    def thinned(self, share: float) -> ExampleInputs | None:
        """The same images with at most this share of their rows and columns, at multiples of 32 and at least 64.

        None if there are tensors other than images, or if the images are too small. (Most networks reduce the size of
        images by a factor of 32.)
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

    def cloned(self) -> ExampleInputs:
        """Copies that a forward pass may write to. A tensor that occurs several times is copied once."""
        twins: dict[int, Tensor] = {}

        def twin(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return twins.setdefault(id(leaf), leaf.clone())
            if isinstance(leaf, _OPAQUE):
                return leaf
            try:
                return copy.deepcopy(leaf)
            except Exception:  # an object that can't be copied is passed on as it is
                return leaf

        args, kwargs = pytree.tree_map(twin, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs)

    def call(self, model: nn.Module) -> Any:
        """Run the model on these inputs themselves; what may write to them gets them :meth:`cloned`."""
        return self.through(model)

    def through(self, run: Callable[..., Any]) -> Any:
        """What ``run(*args, **kwargs)`` returns.

        Where ``rows`` says a batch size, and this batch has another one, it is run in parts of that size, the last one
        filled up with its first rows, and the list of all output tensors is returned.
        """
        with users_device():
            size = self.size
            if self.rows is None or size == self.rows:
                return run(*self.args, **self.kwargs)
            found: list[list[Tensor]] = []
            for start in range(0, size, self.rows):
                rows = torch.arange(start, start + self.rows)
                part = self._rows(rows.where(rows < size, (rows - start) % (size - start) + start))
                outs, used = output_tensors(run(*part.args, **part.kwargs)), min(self.rows, size - start)
                found.append([out[:used] if out.dim() and len(out) == self.rows else out for out in outs])
            return [torch.cat(same) if same[0].dim() else same[0] for same in zip(*found, strict=True)]

    @property
    def size(self) -> int:
        """Length of the first tensor's first axis."""
        first = self.tensors()[0]
        return first.shape[0] if first.dim() else 1

    def taking(self, rows: Sequence[int]) -> ExampleInputs:
        """Some rows of the batch, in this order."""
        return self._rows(torch.tensor(rows))

    def _rows(self, index: Int[Tensor, " rows"]) -> ExampleInputs:
        """Some rows of the batch, in an order."""
        size = self.size
        return self.map(lambda t: t[index.to(t.device)] if t.dim() and t.shape[0] == size else t)

    def with_rows(self, model: nn.Module) -> ExampleInputs:
        """The same, with ``rows`` where the network runs on this batch size, and not on twice as many.

        The model is in evaluation mode.
        """
        if not self.tensors()[0].dim() or self.rows is not None:
            return self
        twice = self._rows(torch.arange(self.size).repeat(2))
        try:
            with torch.no_grad():
                once, found = (output_tensors(each.cloned().call(model)) for each in (self, twice))
        except Exception:  # whatever somebody's code raises on a batch that it was not made for
            return replace(self, rows=self.size)
        said = [out.shape[:1] for out in once] == [out.shape[:1] for out in found]
        batched = any(out.dim() and len(out) == self.size for out in once)
        return replace(self, rows=self.size) if said and batched else self

    def has_faults(self) -> bool:
        """Whether some number is NaN or +inf; -inf is allowed, because attention masks use it."""
        real = [t for t in self.tensors() if t.is_floating_point() and t.numel() and not t.is_meta]
        return not all(bool((t < math.inf).all()) for t in real)

    def largest(self) -> float:
        """The largest magnitude of all numbers that are not in float64, without those of masks."""
        real = [t for t in self.tensors() if t.is_floating_point() and t.numel() and t.dtype != torch.float64]
        return max((float(t.abs().where(meaningful(t), 0).max()) for t in real), default=0.0)

    def describe(self) -> str:
        """Dtypes and shapes, for messages."""
        return ", ".join(
            f"{str(t.dtype).removeprefix('torch.')} {'x'.join(map(str, t.shape)) or 'scalar'}" for t in self.tensors()
        )


_OPAQUE = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type,
    Enum,
    FunctionType,
    MethodType,
    ModuleType,
    nn.Module,
    torch.dtype,
    torch.device,
)
"""Types that can't hold a tensor."""


def output_tensors(output: Any) -> list[Tensor]:
    """All tensors in a model's output, inside containers, dataclasses, namespaces or other objects; also arrays.

    Lists of numbers count as tensors in float64 or int64, and come last. Single ones only count where there is nothing
    else, since they may be times, and only with a fraction, since they may be sizes. The caches that decoders of
    transformers return for the next token do not count.
    """
    numbers = list[Any]()
    tensors = list(_tensors_in(output, {}, numbers))
    lists = [value for value in numbers if isinstance(value, (list, tuple))]
    single = [value for value in numbers if isinstance(value, (float, complex, np.inexact))]
    return tensors + [_as_tensor(value) for value in (lists if tensors or lists else single)]


def _tensors_in(value: Any, seen: dict[int, Any], numbers: list[Any]) -> Iterator[Tensor]:
    """The tensors in a value; numbers, and lists of nothing else, are added to ``numbers``."""
    if isinstance(value, Tensor):
        yield from _dense(value)
        return
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        yield torch.from_numpy(value)
        return
    if _is_numeric(value):
        numbers.append(value)
        return
    if isinstance(value, _OPAQUE) or id(value) in seen or _is_cache(value):
        return
    seen[id(value)] = value
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        items = list(value)
    else:
        slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
        held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        items = list({**held, **getattr(value, "__dict__", {})}.values())
    for item in items:
        yield from _tensors_in(item, seen, numbers)


_NUMBERS = (int, float, complex, np.number, np.bool_)


def _is_numeric(value: Any) -> bool:
    """Whether a value is a number, or a list of equally long lists of numbers."""
    if isinstance(value, _NUMBERS):
        return not isinstance(value, Enum)
    if type(value) not in (list, tuple) or not value or not all(map(_is_numeric, value)):
        return False
    return len({len(item) if isinstance(item, (list, tuple)) else -1 for item in value}) == 1


def _as_tensor(value: Any) -> Tensor:
    array = np.asarray(value)
    return torch.from_numpy(np.asarray(np.nan_to_num(array.astype(np.float64) if array.dtype.kind == "f" else array)))


def _dense(tensor: Tensor) -> list[Tensor]:
    """An output as tensors that can be compared: sparse ones with their zeros, and nested ones by their parts."""
    if tensor.is_nested:
        return list(tensor.unbind())
    return [tensor if tensor.layout == torch.strided else tensor.to_dense()]


def _slots(kind: type) -> tuple[str, ...]:
    found = vars(kind).get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)


def _is_cache(value: Any) -> bool:
    return any(kind.__module__ == "transformers.cache_utils" for kind in type(value).__mro__)


def outputs_if_taken(model: nn.Module, inputs: ExampleInputs) -> list[Tensor] | None:
    """As :func:`outputs`, for inputs that a network was not made for; None if it refuses them."""
    try:
        return outputs(model, inputs)
    except LbylError:
        return None


def outputs(model: nn.Module, inputs: ExampleInputs, given_away: bool = False) -> list[Tensor]:
    """Run the model and return its output tensors, detached. Only inputs that are ``given_away`` may be changed.

    Raises:
        InputError: the model fails on these inputs, or returns no tensor.
    """
    try:
        with torch.no_grad():
            output = (inputs if given_away else inputs.cloned()).call(model)
            found = [tensor.detach() for tensor in output_tensors(output)]
    except LbylError:
        raise
    except Exception as error:
        raise InputError(
            f"the model does not run on the example inputs ({inputs.describe()}): {first_line(error)}"
        ) from error
    check_output(found, output)
    return found


def check_output(found: list[Tensor], output: Any) -> None:
    """Raise InputError if a model returned no tensor that could be compared."""
    if not found:
        raise InputError(
            f"the model returns no tensor (it returns a {type(output).__name__}), so nothing can be compared; "
            "return a tensor, or a container or object that holds tensors"
        )
