"""The plan: what was cut and with which settings, as plain data that travels into the saved folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

from torch import nn

from lbyl.errors import ArtifactError
from lbyl.graph.computed_weights import Fold
from lbyl.runtime.copying import tensors_of
from lbyl.surgery.attributes import Attribute
from lbyl.surgery.cuts import Cut

VERSION = 1


@dataclass(frozen=True)
class GroupPlan:
    """The kept channels of one group."""

    name: str
    width: int
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that is needed to cut a fresh instance of the same architecture.

    Attributes:
        groups: kept channels by group.
        cuts: every slice of every parameter and buffer.
        attributes: every whole number that a module keeps and that follows the cut.
        settings: the arguments of :func:`lbyl.compress`.
        architecture: shape of every parameter and buffer of the unpruned model.
        source: where the unpruned model comes from ("timm:...", "torchvision:..."), or None.
        inputs: dtype and shape of the example inputs.
        folds: layers that computed their weight on the fly and are plain now.
        library: version of lbyl that made the plan.
        version: version of this format.
    """

    groups: tuple[GroupPlan, ...]
    cuts: tuple[Cut, ...]
    settings: Mapping[str, Any]
    architecture: Mapping[str, tuple[int, ...]]
    source: str | None
    inputs: str
    library: str
    attributes: tuple[Attribute, ...] = ()
    folds: tuple[Fold, ...] = ()
    version: int = VERSION

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan back.

        Raises:
            ArtifactError: not JSON, not a plan, or a version that this library does not know.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ArtifactError(f"the plan is not JSON: {error}") from error
        return Plan.from_dict(data)

    @staticmethod
    def from_dict(data: Any) -> Plan:
        """Read a plan from plain data; see :meth:`from_json`."""
        if not isinstance(data, dict) or "version" not in data:
            raise ArtifactError("this is no lbyl plan: it has no version")
        if data["version"] != VERSION:
            raise ArtifactError(
                f"plan version {data['version']!r} is unknown here (this lbyl reads version {VERSION}); update lbyl"
            )
        try:
            return Plan(
                groups=tuple(_group(g) for g in data["groups"]),
                cuts=tuple(
                    Cut(
                        _text(c["parameter"]),
                        _number(c["dim"]),
                        _number(c["size"]),
                        _numbers(c["keep"]),
                        _number(c["blocks"]),
                        _factor(c.get("scale", 1.0)),
                    )
                    for c in data["cuts"]
                ),
                settings=dict(data["settings"]),
                architecture={_text(name): _numbers(shape) for name, shape in data["architecture"].items()},
                source=None if data["source"] is None else _text(data["source"]),
                inputs=_text(data["inputs"]),
                library=_text(data["library"]),
                attributes=tuple(_attribute(a) for a in data.get("attributes", ())),
                folds=tuple(
                    Fold(_text(f["module"]), _text(f["op"]), dict(f["arguments"])) for f in data.get("folds", ())
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"the plan is damaged: {error!r}") from error

    def check_model(self, model: nn.Module) -> None:
        """Raise ArtifactError unless ``model`` has the unpruned shapes that the plan was made for."""
        found = architecture_of(model)
        for name, shape in self.architecture.items():
            if name not in found:
                raise ArtifactError(
                    f"the plan is for another architecture: {type(model).__name__} has no {name!r}; "
                    "pass a fresh, unpruned instance of the model that was compressed"
                )
            if found[name] != shape:
                raise ArtifactError(
                    f"the plan is for another architecture: {name} is {'x'.join(map(str, found[name]))} in this "
                    f"{type(model).__name__}, the plan expects {'x'.join(map(str, shape))}; "
                    "pass a fresh, unpruned instance"
                )
        extra = sorted(found.keys() - self.architecture.keys())
        if extra:
            raise ArtifactError(f"the plan is for another architecture: it does not know {extra[0]!r}")


def architecture_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and buffer."""
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}


def _group(data: Any) -> GroupPlan:
    group = GroupPlan(_text(data["name"]), _number(data["width"]), _numbers(data["keep"]))
    rising = all(a < b for a, b in pairwise((-1, *group.keep, group.width)))
    if not rising or not group.keep:
        raise ValueError(f"{group.name} keeps {list(group.keep[:3])} ... of {group.width} channels")
    return group


def _attribute(data: Any) -> Attribute:
    place = None if data["place"] is None else _number(data["place"])
    if isinstance(data["old"], float):
        item = Attribute(_text(data["module"]), _text(data["name"]), place, _factor(data["old"]), _factor(data["new"]))
        if item.name.startswith("__") or place is not None:
            raise ValueError(f"{item.module}.{item.name} is no constant of a mean")
        return item
    item = Attribute(_text(data["module"]), _text(data["name"]), place, _number(data["old"]), _number(data["new"]))
    if item.name.startswith("__") or not 0 < item.new <= item.old or (place is not None and place < 0):
        raise ValueError(f"{item.module}.{item.name} from {item.old} to {item.new} is no width that shrinks")
    return item


def _factor(value: Any) -> float:
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise TypeError(f"expected a positive number, found {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected a whole number, found {value!r}")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(_number(item) for item in value)


def described(setting: Any) -> dict[str, Any]:
    """A settings object as plain data that travels into the plan."""
    fields = dataclasses.fields(setting) if dataclasses.is_dataclass(setting) else ()
    # What is not shown, such as the user's data, does not travel.
    values = {field.name: getattr(setting, field.name) for field in fields if field.repr}
    plain = {key: described(v) if dataclasses.is_dataclass(v) else v for key, v in values.items()}
    return {"name": type(setting).__name__, **plain}


def library_version() -> str:
    """The version of this library."""
    try:
        return version("lbyl")
    except PackageNotFoundError:
        return "unknown"


def is_rebuildable(source: str) -> bool:
    """Whether a saved plan may build this source by itself: a library's model, not a user's code."""
    return source.rpartition(":")[0] in ("timm", "torchvision")
