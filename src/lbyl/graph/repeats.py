"""Finds arguments of a network that say how often a part of it runs, for a cut holds for one such number.

A layer that runs once on what another layer made, and then on its own output, has other channels in the first run than
a layer that runs once. So the example inputs decide what may be cut.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator

from torch import nn

from lbyl.runtime.inputs import ExampleInputs


def notes_of_repeats(model: nn.Module, inputs: ExampleInputs) -> tuple[str, ...]:
    """What the user should know of whole numbers that the code of the network counts up to.

    Args:
        model: the network.
        inputs: the example inputs; arguments that are not among them have their defaults.
    """
    try:
        given = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    except (TypeError, ValueError):  # a forward that Python can't look into
        return ()
    given.apply_defaults()
    numbers = {name: value for name, value in given.arguments.items() if type(value) is int}
    function = inspect.unwrap(getattr(model.forward, "__func__", model.forward))
    code = getattr(function, "__code__", None)
    counted = [name for name in dict.fromkeys(_counted(code)) if name in numbers] if code is not None else []
    return tuple(_note(name, numbers[name]) for name in counted)


def _note(name: str, number: int) -> str:
    told = f"a part of the network runs {name} times: it was traced, cut and verified for {name}={number}"
    if number < 2:
        return f"{told}, and may compute something else for more; give a larger {name} among the example inputs"
    return f"{told}, and may compute something else for {name}=1 or 0"


def _counted(code: object) -> Iterator[str]:
    """The local variables of which alone a function takes a range."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("PUSH_NULL", "PRECALL", "CACHE")]  # pyright: ignore[reportArgumentType]
    for first, second, third in zip(steps, steps[1:], steps[2:], strict=False):
        local = second.opname.startswith("LOAD_FAST") and isinstance(second.argval, str)
        if first.argval == "range" and local and third.opname.startswith("CALL"):
            yield second.argval
