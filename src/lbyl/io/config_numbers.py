"""Finds out which numbers of a configuration decide which sizes of a model, and which values give wanted sizes.

The model is built on the meta device, where nothing is allocated, with one number changed. The sizes that change as
well are those that the number decides.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from lbyl.errors import first_line
from lbyl.surgery.plan import architecture_of

_WIDTH = re.compile(
    r"intermediate|inner|ffn|d_ff|mlp_dim|hidden_dim|hidden_size|n_embd|d_model|embed_dims?$|embedding_size|conv_dim$"
    r"|(^|_)heads?$|(^|_)experts$|(?<!num)_channels$"
)
"""Numbers of hidden neurons, heads, experts and channels of residual connections and stages."""

HEADS = re.compile(r"(^|_)heads?$")
"""Numbers that count heads."""

_TRIES = 8
"""Number of values that are tried where a size does not grow evenly with its number. It is mostly the first or second,
since only rounding is uneven."""

Settings = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Place = tuple[str | int, ...]
"""Where a number is: names of nested configurations, its own name, and its index if it is one of a list."""
Axis = tuple[str, int]
"""A parameter or buffer, and one of its dimensions."""


class Unsayable(Exception):
    """Why no configuration can express these widths."""


class Unbuildable(Exception):
    """Why no model can be built with some settings."""


def built_from(model: nn.Module, settings: Settings) -> Any:
    """A model of the same class with these settings, on the meta device.

    Raises:
        Unbuildable: the configuration or the model refuses them.
    """
    kind: Any = type(model)
    try:
        with torch.device("meta"):
            return kind(config_from(model, settings))
    except Exception as error:  # a model's own checks may raise anything
        told = first_line(error)
        if told.endswith(":"):  # what transformers validates says on the next line what is wrong
            told = " ".join([told, *(line.strip() for line in str(error).splitlines()[1:2])])
        raise Unbuildable(f"{type(error).__name__}: {told}") from error


def attempt(model: nn.Module, settings: Settings) -> Any:
    """A model with these settings on the meta device; None if the configuration or the model refuses them."""
    try:
        return built_from(model, settings)
    except Unbuildable:
        return None


def config_from(model: nn.Module, settings: Settings) -> Any:
    """A configuration made from settings as if read from ``config.json``, with all checks of its class."""
    kind: Any = type(model.config)
    # Only reading a file undoes how infinity is written.
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(kind.from_dict(copy.deepcopy(settings)).to_json_string(), encoding="utf-8", newline="\n")
        return kind.from_json_file(file)


def with_values(settings: Settings, values: Mapping[Place, Any]) -> Settings:
    """The same settings with other values in some places."""
    changed = copy.deepcopy(settings)
    for path, value in values.items():
        place: Any = changed
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
    return changed


def numbers(settings: Settings, kind: type, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Numbers of one type, including those in lists, such as one for each stage, and in nested configurations."""
    for name, value in settings.items():
        if isinstance(value, dict) and (name.endswith("config") or "model_type" in value):
            yield from numbers(value, kind, (*path, name))
        elif type(value) is kind:
            yield (*path, name), value
        elif isinstance(value, list) and all(type(item) is kind for item in value):
            yield from (((*path, name, index), item) for index, item in enumerate(value))


def fields(settings: Settings) -> Iterator[tuple[Place, int]]:
    """Whole numbers that may be a width."""
    return ((path, value) for path, value in numbers(settings, int) if _WIDTH.search(name_at(path)))


def name_at(path: Place) -> str:
    """The name of a number, which is that of the list if it is one of a list."""
    return next(part for part in reversed(path) if isinstance(part, str))


def _written(path: Place) -> str:
    """The place of a number as one would write it in Python."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def sizes_of(shapes: Shapes) -> dict[Axis, int]:
    """The size of each dimension of each parameter and buffer."""
    return {(parameter, dim): size for parameter, shape in shapes.items() for dim, size in enumerate(shape)}


def decides(model: nn.Module, settings: Settings, path: Place, value: int, before: Shapes) -> dict[Axis, Fraction]:
    """The sizes that a number decides, and by how much each changes when the number grows by one."""
    old = sizes_of(before)
    # Configurations check divisibility. These values pass: divisors of a number divide its double, and 1 divides all
    # numbers. The double is first: half of 1 is 0, and rounded to a multiple it says little.
    for probe in dict.fromkeys((2 * value, 1 if value != 1 else 2)):
        sizes = _tried(model, settings, path, probe)
        slopes = {
            axis: Fraction(size - sizes[axis], value - probe)
            for axis, size in old.items()
            if axis in sizes and sizes[axis] != size and value != probe
        }
        if slopes:
            return slopes
    return {}


def _tried(model: nn.Module, settings: Settings, path: Place, value: int) -> dict[Axis, int]:
    """The sizes of a model with another value of one number; empty if no model can be built with it."""
    built = attempt(model, with_values(settings, {path: value}))
    return {} if built is None else sizes_of(architecture_of(built))


def solved(model: nn.Module, settings: Settings, before: Shapes, after: Shapes) -> tuple[dict[Place, int], str]:
    """The values that numbers must have to give the new sizes, and which size they do not give, or "".

    A size may depend on several numbers, as for queries, keys and values in one layer. Numbers that decide a size alone
    are solved first, and the others from what remains. If that fails, the values are those of the former: what remains
    may not be a sum, such as the number of heads times a width divided by it.

    Raises:
        Unsayable: layers need different values of a number that decides their sizes alone, or no value gives them.
    """
    old, goal = sizes_of(before), sizes_of(after)
    left = {axis: Fraction(goal[axis] - size) for axis, size in old.items() if goal[axis] != size}
    decided = {field: decides(model, settings, *field, before) for field in fields(settings)}
    times = Counter(axis for slopes in decided.values() for axis in slopes)
    new, alone = dict[Place, int](), dict[Place, int]()

    def missed() -> str:
        (parameter, dim), config = min(left, key=lambda at: (goal[at] == old[at], at)), type(model.config).__name__
        return f"found no number in {config} that sets dimension {dim} of {parameter} to {goal[parameter, dim]}"

    for shared in (False, True):
        alone = dict(new)
        for (path, value), slopes in decided.items():
            own = [axis for axis in slopes if times[axis] == 1]
            if bool(own) == shared or not slopes.keys() & left.keys():
                continue
            targets = {axis: old[axis] + left.get(axis, Fraction(0)) for axis in own or slopes}
            try:
                number, change = _value(path, value, slopes, targets, old, partial(_tried, model, settings, path))
            except Unsayable:
                if own:
                    raise
                return alone, missed()
            rest = {axis: left.pop(axis, Fraction(0)) - size for axis, size in change.items()}
            left |= {axis: size for axis, size in rest.items() if size}
            if number != value:
                new[path] = number
    return (alone, missed()) if left else (new, "")


def _value(
    path: Place,
    value: int,
    slopes: Mapping[Axis, Fraction],
    targets: Mapping[Axis, Fraction],
    old: Mapping[Axis, int],
    tried: Callable[[int], Mapping[Axis, int]],
) -> tuple[int, Mapping[Axis, Fraction]]:
    """The value of a number that gives some sizes, and the change of all sizes that it decides.

    Raises:
        Unsayable: there is none, or it was not found.
    """
    wanted = {axis: value + (size - old[axis]) / slopes[axis] for axis, size in targets.items()}
    if len(set(wanted.values())) > 1:
        raise Unsayable(_apart(path, wanted, slopes, old, targets))
    number = next(iter(wanted.values()))
    if all(size.denominator == 1 for size in (number, *slopes.values())):
        return int(number), {axis: slope * (number - value) for axis, slope in slopes.items()}
    found, sizes = _searched(path, number, targets, slopes, tried)
    return found, {axis: Fraction(sizes[axis] - old[axis]) for axis in slopes}


def _searched(
    path: Place,
    estimate: Fraction,
    targets: Mapping[Axis, Fraction],
    slopes: Mapping[Axis, Fraction],
    tried: Callable[[int], Mapping[Axis, int]],
) -> tuple[int, Mapping[Axis, int]]:
    """The value of a number, near an estimate, that gives sizes which do not grow evenly with it, and all sizes then.

    Sizes may be a share of the number, rounded, or rounded to a multiple, as for gated neurons.
    """
    number, seen = max(1, round(estimate)), set[int]()
    while number not in seen and len(seen) < _TRIES:
        seen.add(number)
        sizes = tried(number)
        if not slopes.keys() <= sizes.keys():
            break
        missing = [(size - sizes[axis]) / slopes[axis] for axis, size in targets.items()]
        if not any(missing):
            return number, sizes
        most = max(missing, key=abs)
        number = max(1, number + (round(most) or (1 if most > 0 else -1)))
    (parameter, dim), size = min(targets.items())
    raise Unsayable(f"found no value of {_written(path)} that sets dimension {dim} of {parameter} to {size}")


def _apart(
    path: Place,
    wanted: Mapping[Axis, Fraction],
    slopes: Mapping[Axis, Fraction],
    old: Mapping[Axis, int],
    goal: Mapping[Axis, Fraction],
) -> str:
    """The sentence for layers that need different values of one number."""
    ends = [pick(wanted, key=lambda axis: (wanted[axis], axis)) for pick in (min, max)]
    low, high = (wanted[axis] for axis in ends)
    all_layers = "all layers" if isinstance(path[-1], str) else "all layers of a stage"
    begin = f"{_written(path)} is one number for {all_layers}, but"
    counts = HEADS.search(name_at(path)) or all(slopes[axis] == 1 for axis in ends)
    if counts and low.denominator == high.denominator == 1:
        return f"{begin} layers keep {low} to {high}"
    # The number may be multiplied, as for hidden neurons that are four times the stream: these are the layers' widths.
    kept = [f"{axis[0].rpartition('.')[0] or axis[0]} keeps {goal[axis]} of {old[axis]}" for axis in ends]
    return f"{begin} {' and '.join(kept)}"
