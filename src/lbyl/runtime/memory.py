"""Measures how much memory the activations of a network take, and returns freed memory to the system."""

from __future__ import annotations

import ctypes
import re
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lbyl.runtime.batches import first_rows
from lbyl.runtime.contexts import Switch
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.forward import CONVOLUTIONS, frozen, run_intercepted
from lbyl.runtime.inputs import ExampleInputs, outputs_if_taken
from lbyl.runtime.intercept import FunctionInterceptor

ROOM = 5 * 2**29
"""Bytes that activations may take by default (2.5 GiB)."""
_PLANNED = 0.6
"""The share of these bytes that probes may use. The rest is for temporary memory inside layers, and for freed blocks
that the allocator can't reuse."""


def held_at_once(memory: int, each: int) -> int:
    """How many probes fit into ``memory`` bytes at once, if each takes ``each`` bytes."""
    return int(_PLANNED * memory / each)


def _places(model: nn.Module) -> set[int]:
    """The addresses of the model's own tensors."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors_of(model).values()}


class _Held(FunctionInterceptor):
    """Counts the bytes of all tensors that a network makes, as long as they are referenced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = _places(model)
        self.owners: dict[int, int] = {}
        self.now = self.most = self.total = 0

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._made(leaf)
        return out

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self.known:
            return
        if place not in self.owners:
            self.owners[place] = 0
            self.now += size
            self.total += size
            self.most = max(self.most, self.now)
        self.owners[place] += 1
        weakref.finalize(tensor, self._gone, place, size).atexit = False

    def _gone(self, place: int, size: int) -> None:
        self.owners[place] -= 1
        if not self.owners[place]:
            del self.owners[place]
            self.now -= size


def held_bytes(model: nn.Module, inputs: ExampleInputs) -> int:
    """The largest memory that tensors between layers take during a forward pass, in bytes for each row of the batch.

    Temporary memory inside layers is not included.
    """
    return _each(_held(model, inputs).most, inputs)


def made_bytes(model: nn.Module, inputs: ExampleInputs) -> int:
    """The memory of all tensors between layers if none is freed, as for a backward pass, in bytes for each row."""
    return _each(_held(model, inputs).total, inputs)


def _held(model: nn.Module, inputs: ExampleInputs) -> _Held:
    held, own = _Held(model), inputs.cloned()
    with torch.no_grad(), held:
        own.call(model)
    return held


def a_few(model: nn.Module, inputs: ExampleInputs, count: int = 2) -> ExampleInputs:
    """The first inputs of a batch, or all if the network does not run on these, as with the nodes of a graph."""
    few = first_rows(inputs, count)
    return inputs if few is not inputs and outputs_if_taken(model, few) is None else few


def held_by_each(model: nn.Module, inputs: ExampleInputs) -> int:
    """As :func:`held_bytes`, measured on a few rows of the batch, or on all if these do not stand alone."""
    few = first_rows(inputs)
    try:
        return held_bytes(model, few)
    except Exception:  # whatever somebody's code raises; a fault of the whole batch is raised below
        if few is inputs:
            raise
    return held_bytes(model, inputs)


class InputsForgotten(FunctionInterceptor):
    """While active, convolutions whose weights need no gradient do not save their inputs for the backward pass.

    Autograd would save these inputs nevertheless; they are about a third of everything that it saves. The backward
    pass gets a tensor of the input's shape and layout with arbitrary values, because the gradient with respect to the
    input needs no more.
    """

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call; a convolution saves only the shape of its input."""
        if func not in CONVOLUTIONS or len(args) < 2 or args[1].requires_grad:
            return func(*args, **kwargs)
        # Neither function may refer to the input, or it would stay in memory.
        place, shape = args[0].data_ptr(), args[0].shape

        def pack(tensor: Tensor) -> Any:
            if tensor.data_ptr() == place and tensor.shape == shape:
                return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
            return tensor

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            shape, stride, dtype, device = packed
            return torch.empty_strided(shape, stride, dtype=dtype, device=device)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return func(*args, **kwargs)


def saved_bytes(model: nn.Module, inputs: ExampleInputs) -> int:
    """Memory that a forward pass saves for a backward pass to the inputs, in bytes for each row of the batch.

    Batch norms use batch statistics. Convolutions do not save their inputs; see :class:`InputsForgotten`.
    """
    known = _places(model)
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        # Detached, because an output that its own function saves would never be freed.
        return tensor.detach()

    asked = inputs.map(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()))
    kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with frozen(model), torch.enable_grad(), kept, InputsForgotten():
        # The output is held until all is counted, so that its memory is not reused and counted only once.
        given = run_intercepted(model, asked, batch_statistics=True)
    del given
    return _each(sum(found.values()), inputs)


def _each(total: int, inputs: ExampleInputs) -> int:
    first = inputs.tensors()[0]
    return max(1, total // (len(first) if first.dim() else 1))


_PLENTY = 4 * ROOM
"""Freed memory is only kept where at least so many bytes are available."""
_LIGHT = ROOM // 8
"""It is only kept for networks whose weights take no more bytes; for others, weights take most of the memory."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""The settings of glibc's ``mallopt``, from ``malloc.h``."""


def _keep_freed(keep: bool) -> None:
    """Keep what is freed, or return it, with the thresholds that glibc chooses once large tensors were freed."""
    values = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
    if not keep:
        values = {_MMAP_MAX: 2**16, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
    change = _of_glibc("mallopt")
    for name, value in values.items() if change else ():
        change(name, value)
    if not keep:
        _trim()


_HEAP = Switch(lambda: False, _keep_freed)


def is_plenty(model: nn.Module, memory: int = ROOM) -> bool:
    """Whether :func:`reused_memory` keeps what is freed."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(model).values())
    return memory >= ROOM and weights <= _LIGHT and available_bytes() >= _PLENTY


@contextmanager
def reused_memory(model: nn.Module, memory: int = ROOM) -> Iterator[None]:
    """Use freed memory again in place of returning it to the system, where there is plenty and the C library is glibc.

    glibc returns each tensor of 32 MiB or more when it is freed, and the kernel clears the pages of the next one. For
    networks with large activations, that takes nearly as long as computing. Pieces that do not fit anew stay unused, so
    more memory is taken.

    Args:
        model: the network that is run.
        memory: bytes that activations may take. If they are fewer than by default, nothing is kept.
    """
    if not is_plenty(model, memory):
        yield
        return
    with _HEAP.held(True):
        yield


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may still take, as Linux and the control group of a container say; else 0."""
    told = _number(root / "proc/meminfo", r"MemAvailable:\s+(\d+) kB")
    if told is None:
        return 0
    least = told * 1024
    groups = root / "sys/fs/cgroup"
    for limit, used in (
        (groups / "memory.max", groups / "memory.current"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"),
    ):
        most, now = _number(limit), _number(used)
        if most is not None and now is not None:
            least = min(least, max(0, most - now))
    return least


def _number(file: Path, form: str = r"(\d+)") -> int | None:
    """The number in a file of the kernel; None if there is no such file, or no number in it."""
    try:
        found = re.search(form, file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return int(found[1]) if found else None


def give_back() -> None:
    """Return freed memory to the system, where the C library is glibc.

    glibc keeps freed blocks below 32 MiB, although the next stage mostly needs larger ones. Nothing is returned within
    :func:`reused_memory`, unless other processes need it.
    """
    if not _HEAP.is_held or available_bytes() < 2 * ROOM:
        _trim()


def _trim() -> None:
    trim = _of_glibc("malloc_trim")
    if trim:
        trim(0)


def _of_glibc(name: str) -> Any:
    """A function of the C library; None if there is no such function, as on other systems."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
