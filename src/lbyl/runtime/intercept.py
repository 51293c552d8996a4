"""Intercepts the calls that a running model makes, without changing any module.

There are three levels. A :class:`FunctionInterceptor` sees the functions of PyTorch that the model's code calls, such
as ``functional.conv2d`` and ``torch.add``. An :class:`OperatorInterceptor` sees the ATen operators that these functions
call. :func:`module_hooks` reports when modules start and end.
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
    """The names of a model's parameters and buffers by their ids; ``values`` are tensors that replace some of them."""
    return {id(tensor): name for name, tensor in {**tensors_of(model), **(values or {})}.items()}


class Interceptor:
    """The base of :class:`FunctionInterceptor` and :class:`OperatorInterceptor`.

    Args:
        names: the names of the model's tensors, for interceptors that need them. Code that replaces a tensor while the
            model runs must add the new one to this table.
    """

    def __init__(self, names: Names | None = None) -> None:
        super().__init__()
        self.names: Names = {} if names is None else names

    def name_of(self, value: Any) -> str | None:
        """The name of a value that is a parameter or buffer of the model; None for all other values."""
        return self.names.get(id(value))

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of one call. ``func(*args, **kwargs)`` gives the result without interception."""
        raise NotImplementedError


class FunctionInterceptor(Interceptor, TorchFunctionMode):
    """While active, passes every call of a PyTorch function or tensor method through :meth:`on_call`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.on_call(func, args, kwargs or {})


class OperatorInterceptor(Interceptor, TorchDispatchMode):
    """While active, passes every ATen operator through :meth:`on_call`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, because PyTorch would import its compiler to hide this mode from it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.on_call(func, args, kwargs or {})


def unseen() -> AbstractContextManager[Any]:
    """Call PyTorch's functions in code of our own that runs inside the model's (a hook), unseen by interceptors."""
    return torch._C.DisableTorchFunction()


def undivided() -> AbstractContextManager[Any]:
    """Run below autograd, so that operator interceptors see composite operations before they are decomposed."""
    return torch._C._AutoDispatchBelowAutograd()


def leading_arguments(args: Sequence[Any], kwargs: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
    """The first arguments of a call, given their parameter names; they may be passed by position or by name."""
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
    """Report when modules start and end. All hooks are removed afterwards.

    Args:
        modules: the modules by their paths.
        on_enter: called before each module runs.
        on_leave: called after each module has run.
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
