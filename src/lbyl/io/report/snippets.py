"""Makes Python code from a plan: code that loads the saved network, and code that reproduces it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from lbyl.io.report.format import line
from lbyl.runtime.settings import as_call, printed
from lbyl.surgery.plan import Plan, is_rebuildable, of_huggingface


def loading(plan: Plan) -> Iterator[str]:
    """The lines of code that load the folder of the plan, with a placeholder for its path."""
    yield "import lbyl"
    yield ""
    if plan.source and is_rebuildable(plan.source):
        yield 'model = lbyl.load("path/to/this/folder")'
    else:
        known = f" ({line(shown_source(plan.source))})" if plan.source else ""
        yield f"fresh = ...  # an unpruned instance of the architecture{known}; its weights don't matter"
        yield 'model = lbyl.load("path/to/this/folder", fresh)'


def load_line(path: str | os.PathLike[str], source: str | None) -> str:
    """One line of code that loads the folder at ``path``."""
    folder = repr(str(path))
    if source is None:
        return f"import lbyl; net = lbyl.load({folder}, model)  # model: a fresh, unpruned instance"
    if is_rebuildable(source):
        return f"import lbyl; net = lbyl.load({folder})"
    return f"import lbyl; net = lbyl.load({folder}, lbyl.load_source({source!r}))"


def reproducing(plan: Plan) -> Iterator[str]:
    """The lines of code that make the same network again: the call with all its settings."""
    parts = plan.settings.get("parts", ())
    yield from ("import torch", "import lbyl")
    if plan.source and "after" not in plan.settings:
        yield "from lbyl import load_source"
    yield ""
    if "after" in plan.settings:
        yield "model = ...  # the result of the first compression, with the weights that were compressed"
    elif plan.source:
        yield f"model = load_source({shown_source(plan.source)!r})  # with the weights that were compressed"
    else:
        yield "model = ...  # the network, with the weights that were compressed"
    if _reads_data(plan.settings):
        yield "batches = ...  # the inputs on which the moments were measured"
    yield f"inputs = ({' '.join(f'{text},' for text in map(_tensor, plan.inputs.split(', ')))})"
    yield "result = lbyl.compress("
    yield "    model,"
    yield "    inputs,"
    for name, value in arguments(plan).items():
        yield f"    {name}={value},"
    if len(parts) == 1:
        yield f"    submodule={parts[0]!r},"
    yield ")"
    if plan.trained:
        yield "# ... and its weights were trained, which this does not repeat"


def arguments(plan: Plan) -> dict[str, str]:
    """The settings of the compression as Python code, by name."""
    settings = dict(plan.settings)
    settings.pop("after", None)  # settings of an earlier compression
    settings.pop("parts", None)  # a new call finds the traceable parts again
    if settings.get("criterion") == settings.get("restore"):
        settings.pop("criterion", None)  # this restorer chooses the channels itself
    if settings.get("budget"):
        settings.pop("ratio", None)  # the ratios follow from the budget
    return {name: _python(value) for name, value in settings.items()}


def _tensor(text: str) -> str:
    """The Python code that makes an input of this dtype and shape."""
    dtype, _, sizes = text.partition(" ")
    shape = ", ".join(sizes.split("x")) if sizes != "scalar" else "()"
    if dtype == "float32":
        return f"torch.randn({shape})"
    make = "torch.randn" if "float" in dtype else "torch.zeros"
    return f"{make}({shape}, dtype=torch.{dtype})"


def _python(value: Any) -> str:
    """A setting as Python code."""
    import lbyl

    def call(name: str, fields: Sequence[str]) -> str:
        known = f"lbyl.{name}" if name in lbyl.__all__ else name
        return as_call(known, ["batches", *fields] if name == "Data" else fields)

    def plain(item: Any) -> str:
        if isinstance(item, str):
            return json.dumps(item, ensure_ascii=False)
        return repr(tuple(item) if isinstance(item, list) else item)

    return printed(value, plain, call)


def _reads_data(value: Any) -> bool:
    return isinstance(value, Mapping) and (value.get("name") == "Data" or any(map(_reads_data, value.values())))


def shown_source(source: str) -> str:
    """The source without paths of this machine: only the name of a file or folder."""
    if source.lower().endswith((".onnx", ".pt2")):
        return PurePath(source).name
    place, separator, name = source.rpartition(":")
    if of_huggingface(source) is not None:
        return f"{place}:{PurePath(name).name}" if PurePath(name).is_absolute() else source
    return f"{PurePath(place).name}{separator}{name}" if place.endswith(".py") else source


def title_of(plan: Plan) -> str:
    """The title of a page about the network."""
    made = ", pruned and trained" if plan.trained else ", pruned"
    source = plan.source if plan.source and (is_rebuildable(plan.source) or not plan.network) else ""
    # The name of a user's factory says less than the class that it returns.
    name = line(shown_source(source).rpartition(":")[2] if source else plan.network)
    return f"{name}{made}" if name else f"A network{made}"
