"""Seeing every call that a running model makes, and changing some, while no module is changed.

There are three levels. A :class:`FunctionInterceptor` sees the functions of PyTorch as the model's own code calls
them: ``functional.conv2d``, ``torch.add``. An :class:`OperatorInterceptor` sees the ATen operators that these are
made of. :func:`module_hooks` tells when modules start and end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lbyl.runtime.copying import tensors_of

Names = Mapping[int, str]
"""The names of a model's parameters and buffers, by the ids of the tensors."""


def names_by_id(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[int, str]:
    """The names of a model's parameters and buffers by their ids; ``values`` are tensors that stand in for some."""
    return {id(tensor): name for name, tensor in {**tensors_of(model), **(values or {})}.items()}


class Interceptor:
    """Answers calls in PyTorch's place: the base of :class:`FunctionInterceptor` and :class:`OperatorInterceptor`.

    Args:
        names: the names of the model's tensors, for interceptors that have to tell them apart. Whoever replaces a
            tensor meanwhile adds the new one to this table.
    """

    def __init__(self, names: Names | None = None) -> None:
        super().__init__()
        self.names: Names = {} if names is None else names

    def name_of(self, value: Any) -> str | None:
        """The name of a parameter or buffer of the model; None for everything else."""
        return self.names.get(id(value))

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one call. ``func(*args, **kwargs)`` makes it as if nobody had looked."""
        raise NotImplementedError


class FunctionInterceptor(Interceptor, TorchFunctionMode):
    """While it is on, every call of a PyTorch function or tensor method goes through :meth:`on_call`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.on_call(func, args, kwargs or {})


class OperatorInterceptor(Interceptor, TorchDispatchMode):
    """While it is on, every ATen operator goes through :meth:`on_call`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch asks whether to hide this mode from the compiler; it would import the compiler to do so."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.on_call(func, args, kwargs or {})


def undivided() -> AbstractContextManager[Any]:
    """Below autograd, where an operation that is made of others has not been taken apart yet."""
    return torch._C._AutoDispatchBelowAutograd()


def leading_arguments(args: Sequence[Any], kwargs: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
    """The leading arguments of a call by their parameter names, whether they were passed by position or by name."""
    return tuple(args[place] if len(args) > place else kwargs[name] for place, name in enumerate(names))


OnEnter = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""Called as ``on_enter(path, module, args, kwargs)`` before a module runs."""
OnLeave = Callable[[str, nn.Module, tuple[Any, ...], Any], None]
"""Called as ``on_leave(path, module, args, output)`` after a module has run, and also when it has failed."""


@contextmanager
def module_hooks(
    modules: Mapping[str, nn.Module],
    on_enter: OnEnter,
    on_leave: OnLeave | None = None,
    *,
    enter_first: bool = False,
    leave_first: bool = False,
) -> Iterator[None]:
    """Tell when modules start and end; afterwards, no hook is left.

    Args:
        modules: the modules by their paths.
        on_enter: called before each one runs.
        on_leave: called after each one has run.
        enter_first: call ``on_enter`` before the module's own hooks, not after them.
        leave_first: call ``on_leave`` before the module's own hooks, not after them.
    """

    def enter(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        on_enter(path, module, args, kwargs)

    with ExitStack() as hooks:
        for path, module in modules.items():
            before = partial(enter, path)
            hooks.callback(module.register_forward_pre_hook(before, prepend=enter_first, with_kwargs=True).remove)
            if on_leave is not None:
                after = partial(on_leave, path)
                handle = module.register_forward_hook(after, prepend=leave_first, always_call=True)
                hooks.callback(handle.remove)
        yield
