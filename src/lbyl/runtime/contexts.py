"""Contexts for running a user's model: they restore modes, buffers, random states and settings of PyTorch."""

from __future__ import annotations

import gc
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from lbyl.runtime.experts import choose_grouped

MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""The attributes that every module has."""
ATOMS = frozenset((bool, int, float, str, type(None)))
CONTAINERS = (dict, list, set)
TABLES = (
    "_buffers",
    "_modules",
    "_parameters",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""The tables of modules that a forward pass may write to."""


class Switch:
    """A setting of the whole process that several threads may hold at one value. The last thread restores it."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        self._read, self._write = read, write
        self._lock, self._users, self._before = threading.Lock(), 0, None

    @property
    def is_held(self) -> bool:
        """Whether some thread holds it."""
        return self._users > 0

    @contextmanager
    def held(self, position: Any) -> Iterator[None]:
        """Set the value, and restore the earlier one after the last thread has left."""
        with self._lock:
            if not self._users:
                self._before = self._read()
            self._users += 1
            self._write(position)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._write(self._before)


_default_device: ContextVar[torch.device | None] = ContextVar("_default_device", default=None)


@contextmanager
def own_settings() -> Iterator[None]:
    """Work as in a fresh process, whatever the caller has set around it.

    New tensors are on the CPU (see :func:`users_device`), gradients can be computed, and no operation runs in another
    precision than its inputs'. Random numbers that a network draws itself, as a VAE does, are the same in every call,
    and none of them are taken from the caller's generators.
    """
    with ExitStack() as stack:
        stack.enter_context(seeded())
        stack.enter_context(_own_device())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _own_device() -> Iterator[None]:
    device = torch.get_default_device()
    if device.type == "cpu" or _default_device.get() is not None:
        yield
        return
    token = _default_device.set(device)
    try:
        with torch.device("cpu"):
            yield
    finally:
        _default_device.reset(token)


def users_device() -> AbstractContextManager[Any]:
    """Make new tensors on the default device that the user has set. It is used while the user's model runs."""
    device = _default_device.get()
    return nullcontext() if device is None else device


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Keep other threads from working on this model."""
    with _locks_lock:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        yield


def _generators() -> tuple[Any, ...]:
    """The states of all global generators."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpus  # noqa: NPY002


def _set_generators(states: tuple[Any, ...] | int) -> None:
    """Restore states from :func:`_generators`, or start all generators from a seed."""
    if isinstance(states, int):
        random.seed(states)
        np.random.seed(states)  # noqa: NPY002
        torch.default_generator.manual_seed(states)
        if torch.cuda.is_initialized():  # otherwise the seed would be applied later, at initialization
            torch.cuda.manual_seed_all(states)
        return
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state_all(states[3])


_GENERATORS = Switch(_generators, _set_generators)


def seeded(seed: int = 0) -> AbstractContextManager[None]:
    """Start all global random generators from a seed, and restore their states afterwards."""
    return _GENERATORS.held(seed)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and afterwards restore it and the global random generators.

    Every module's mode, plain attributes, buffers, arrays and hooks are restored, and which parts and parameters it
    has. Some modules cache values that they compute from their weights (attention biases, masks). After a run in
    another precision, or a trace with fake tensors, the cached values would be wrong. Other modules count their calls,
    or register hooks when they first run and note that in an attribute. Experts run as `lbyl.runtime.experts` says.
    """
    with alone(model), seeded():
        modes = {module: module.training for module in model.modules()}
        before = [(vars(module), vars(module).copy()) for module in modes]
        held = {
            id(value): (value, _content(value))
            for _, own in before
            for name, value in own.items()
            if type(value) not in ATOMS and isinstance(value, CONTAINERS) and name not in MODULE_ATTRIBUTES
        }
        there = (vars(module)[name] for module in modes for name in TABLES if name in vars(module))
        tables = [(table, table.copy()) for table in there]
        written = _Written(modes)
        forget_cached(model)
        model.eval()  # even in evaluation mode, because it makes some modules clear their caches
        choose_grouped(modes)
        try:
            yield
        finally:
            set_modes(modes)
            for now, own in before:
                if now.keys() == own.keys() and all(map(is_, now.values(), own.values())):
                    continue  # the usual case
                for name in now.keys() - own.keys() - MODULE_ATTRIBUTES:
                    del now[name]
                now.update({name: value for name, value in own.items() if name not in MODULE_ATTRIBUTES})
            for container, content in held.values():
                _refill(container, content)
            for table, content in tables:
                if table.keys() != content.keys() or not all(map(is_, table.values(), content.values())):
                    table.clear()
                    table.update(content)
            written.put_back()


def _content(container: Any) -> list[Any]:
    """What a list, set or dictionary holds."""
    return list(dict.items(container)) if isinstance(container, dict) else list(container)


def _refill(container: Any, content: list[Any]) -> None:
    """Give a list, set or dictionary what it held, unless it holds that still.

    The methods are those of Python's own types, for a class of the user's may refuse to be changed (configurations of
    diffusers).
    """
    now = _content(container)
    if isinstance(container, dict):
        if len(now) == len(content) and all(a is b and x is y for (a, x), (b, y) in zip(now, content, strict=True)):
            return
        kind: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        kind.clear(container)
        for key, value in content:
            kind.__setitem__(container, key, value)
    elif len(now) != len(content) or not all(map(is_, now, content)):
        if isinstance(container, list):
            list.__setitem__(container, slice(None), content)
        else:
            set.clear(container)
            set.update(container, content)


def forget_cached(model: nn.Module) -> None:
    """Let modules drop the tensors that they once computed from their weights and keep in a dictionary.

    They do so when they are put into training mode (attention biases of LeViT). The modes stay as they are.
    """
    for module in model.modules():
        if type(module).train is nn.Module.train:
            continue
        tables = (
            value for name, value in vars(module).items() if name not in MODULE_ATTRIBUTES and type(value) is dict
        )
        if any(table and all(isinstance(value, Tensor) for value in table.values()) for table in tables):
            modes = {part: part.training for part in module.modules()}
            with suppress(Exception):  # a user's code may do anything here
                module.train(True)
            set_modes(modes)


class _Written:
    """A copy of everything that a forward pass may write to: buffers, arrays, tensors in plain attributes."""

    def __init__(self, modules: Mapping[nn.Module, bool]) -> None:
        tensors: dict[int, Tensor] = {}
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        for module in modules:
            own = [t for t in module._buffers.values() if t is not None]
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                own.append(module.weight)
            for name, value in vars(module).items():
                if type(value) in ATOMS or name in MODULE_ATTRIBUTES:
                    continue
                for item in _items(value):
                    if isinstance(item, np.ndarray):
                        self._arrays.append((item, item.copy()))
                    elif isinstance(item, Tensor) and not isinstance(item, nn.Parameter):
                        own.append(item)
            tensors |= {id(t): t for t in own if t.layout == torch.strided and not t.is_meta}
        self._tensors = [(t, _version(t), t.detach().clone()) for t in tensors.values()]

    def put_back(self) -> None:
        """Restore the contents."""
        with torch.no_grad():
            for tensor, version, content in self._tensors:
                if version is None or tensor._version != version:
                    tensor.detach().copy_(content)
        for array, content in self._arrays:
            if array.flags.writeable:
                array[...] = content


def _items(value: Any) -> list[Any]:
    """An attribute's value, or the items in it if it is a plain container."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return list(value.values()) if isinstance(value, dict) else [value]


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None for tensors that do not count this."""
    return None if tensor.is_inference() else tensor._version


def set_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Set each module's ``training`` flag directly, where it differs; calling ``train()`` would have side effects."""
    for module, training in modes.items():
        if module.training != training:
            module.training = training


_FAST_ATTENTION = Switch(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled)
_COLLECTION = Switch(gc.isenabled, lambda on: gc.enable() if on else gc.disable())


class _Straight:
    """Takes the place of PyTorch's function for reentrant checkpoints, and runs what is given to it as it is."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_random_state: bool, *args: Any) -> Any:
        return function(*args)


def _around(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Takes the place of what PyTorch does before and after a part with any other checkpoint, and does nothing."""
    yield


_STRAIGHT = {
    name: _around if name.startswith("_") else _Straight
    for name in (
        "CheckpointFunction",
        "_checkpoint_without_reentrant_generator",
        "_checkpoint_without_reentrant_generator_impl",
    )
    if hasattr(checkpoint, name)
}
_CHECKPOINTS = Switch(lambda: {name: getattr(checkpoint, name) for name in _STRAIGHT}, checkpoint.__dict__.update)


def without_checkpoints() -> AbstractContextManager[None]:
    """Keep the activations that a model's checkpoints would compute once more in the backward pass.

    Reentrant checkpoints first run their part without gradients, so that nothing inside can be differentiated. Others
    require that the part does the same both times, but the second time nobody observes it.
    """
    return _CHECKPOINTS.held(_STRAIGHT)


def plain_attention() -> AbstractContextManager[None]:
    """Turn off the fast path of torch's attention, which runs a whole layer as one operation."""
    return _FAST_ATTENTION.held(False)


def uncollected() -> AbstractContextManager[None]:
    """Turn off garbage collection, which would only cost time while many objects are made and kept."""
    return _COLLECTION.held(False)
