"""Whole numbers that modules keep, by themselves or in an object of settings, from which their code takes sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lbyl.runtime.contexts import plain_attention, undisturbed
from lbyl.runtime.copying import sharing_copy
from lbyl.runtime.inputs import ExampleInputs


def numbers_of(model: nn.Module) -> dict[str, frozenset[int]]:
    """The whole numbers that the code of each module may read, by the module's path."""
    return {
        path: frozenset(
            [value for value in vars(module).values() if type(value) is int]
            + [value for _, value in numbers_of_settings(module)]
        )
        for path, module in model.named_modules()
    }


def factors_of(model: nn.Module) -> frozenset[float]:
    """The numbers of type float that modules keep, by themselves or in an object of settings."""
    kept = [value for module in model.modules() for value in vars(module).values()]
    kept += [value for held in kept if _is_settings(held) for value in vars(held).values()]
    return frozenset(value for value in kept if type(value) is float)


def numbers_of_settings(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The whole numbers that a module reads from objects of settings when it runs, as in ``self.config.width``.

    Names have the form ``config.width``. Numbers that the module also keeps by itself, under the same name, are left
    out.
    """
    kept = vars(module)
    holders = {name: value for name, value in kept.items() if _is_settings(value)}
    if not holders:
        return
    read = _names_read_by(type(module))
    for holder in read & holders.keys():
        for name, value in vars(holders[holder]).items():
            if type(value) is int and name in read and name not in kept:
                yield f"{holder}.{name}", value


@lru_cache(maxsize=256)
def _names_read_by(kind: type[nn.Module]) -> frozenset[str]:
    """The names in the code of a class; remembered, because verification asks for them at every trial."""
    return frozenset(name for code in codes_of(kind) for name in code.co_names)


def run_marked(
    model: nn.Module,
    inputs: ExampleInputs,
    marks: Mapping[tuple[str, str], int],
    watching: AbstractContextManager[Any] | None = None,
) -> bool:
    """Run a copy of a model, in which some attributes are replaced by numbers that take notes of their use.

    Args:
        model: the network; it is not changed.
        inputs: the example inputs.
        marks: the numbers, by a module's path and the name of its attribute.
        watching: a context that is active during the run.

    Returns:
        Whether the copy runs; code may take no other type than int.
    """
    copy = sharing_copy(model)
    for (path, name), mark in marks.items():
        vars(copy.get_submodule(path))[name] = mark
    try:
        with torch.no_grad(), undisturbed(copy), plain_attention(), watching or nullcontext():
            inputs.cloned().call(copy)
    except Exception:
        return False
    return True


def codes_of(kind: type[nn.Module]) -> Iterator[CodeType]:
    """The code of all methods of a class but its constructor, without those of PyTorch."""
    for base in kind.__mro__:
        if base is nn.Module:
            return
        if base.__module__.startswith("torch.nn."):
            continue
        for name, member in vars(base).items():
            if name != "__init__" and inspect.isfunction(member):
                inner = inspect.unwrap(member)
                if isinstance(inner, FunctionType):
                    yield inner.__code__


def _is_settings(value: object) -> bool:
    """Whether a value is an object of somebody's class that keeps plain values."""
    plain = isinstance(value, nn.Module | Tensor | type | FunctionType)
    return not plain and hasattr(value, "__dict__") and not callable(value)
