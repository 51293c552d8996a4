"""The plan: the cuts and the settings, as plain data that is part of the saved folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from keyword import iskeyword
from typing import Any
from uuid import uuid4

from torch import nn

from lbyl.errors import ArtifactError
from lbyl.graph.computed_weights import Fold
from lbyl.runtime.copying import imprint, tensors_of
from lbyl.runtime.documents import check_no_faults, read_as
from lbyl.surgery.attributes import Attribute
from lbyl.surgery.blocks import BlockCut, composed, renamed
from lbyl.surgery.cuts import Cut
from lbyl.surgery.packed import Unpacking, packed
from lbyl.surgery.versions import VERSION, upgraded


@dataclass(frozen=True)
class GroupPlan:
    """The kept channels of one group."""

    name: str
    width: int
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """All information that is needed to cut a fresh instance of the same architecture.

    Attributes:
        groups: kept channels by group.
        cuts: every slice of every parameter and buffer.
        attributes: changes of numbers that modules store (heads, widths).
        settings: the arguments of :func:`lbyl.compress`.
        architecture: shape of every parameter and buffer of the unpruned model.
        source: where the unpruned model comes from ("timm:...", "torchvision:..."), or None.
        inputs: dtype and shape of the example inputs.
        blocks: dropped blocks. Groups, cuts, attributes and folds have the names that are valid after that.
        folds: layers that computed their weight on the fly and were replaced by plain layers.
        library: the version of lbyl that made the plan.
        trained: whether the weights were changed after a cut by something else, training say: the settings alone do
            not lead to them.
        network: the class of the network.
        version: the version of this format.
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
    trained: bool = False
    network: str = ""
    blocks: tuple[BlockCut, ...] = ()

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return dataclasses.asdict(self)

    def to_document(self) -> dict[str, Any]:
        """The plan as plain data for ``lbyl.json``, in which many kept channels are short text."""

        def short(items: Sequence[GroupPlan] | Sequence[Cut]) -> list[dict[str, Any]]:
            return [{**vars(item), "keep": packed(item.keep)} for item in items]

        rest = dataclasses.replace(self, groups=(), cuts=()).to_dict()
        return rest | {"groups": short(self.groups), "cuts": short(self.cuts)}

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
        """Read a plan from the data of :meth:`to_dict` or :meth:`to_document`, also of an earlier version.

        Raises:
            ArtifactError: not a plan, or a version that this library does not know.
        """
        plan = read_as(Plan, _unpacked(upgraded(data)), "the plan")
        check_no_faults(_faults(plan), "the plan")
        return plan

    def after(self, first: Plan, then: Sequence[Attribute] = ()) -> Plan | None:
        """The plan with the effect of ``first`` followed by this plan, and by more changes of attributes.

        None if there is none, because this plan replaces layers by plain ones that ``first`` has already made smaller.
        """
        first = first.without(self.blocks)
        known = {item.module for item in first.folds}
        new = tuple(item for item in self.folds if item.module not in known)
        if new and first.cuts:
            return None
        return dataclasses.replace(
            self,
            blocks=composed(first.blocks, self.blocks),
            groups=_composed_groups(first.groups, self.groups),
            cuts=_composed_cuts(first.cuts, self.cuts),
            attributes=_composed_attributes(first.attributes, (*self.attributes, *then)),
            settings={**self.settings, "after": dict(first.settings)},
            architecture=first.architecture,
            source=self.source or first.source,
            folds=(*first.folds, *new),
            trained=self.trained or first.trained,
        )

    def without(self, blocks: Sequence[BlockCut]) -> Plan:
        """The plan with the names that are valid after more blocks were dropped; what is in these is left out."""
        if not blocks:
            return self
        names = {
            name: renamed(name, blocks)
            for name in (
                *(group.name for group in self.groups),
                *(cut.parameter for cut in self.cuts),
                *(item.module for item in self.attributes),
                *(fold.module for fold in self.folds),
            )
        }
        groups = [dataclasses.replace(g, name=new) for g in self.groups if (new := names[g.name]) is not None]
        cuts = [dataclasses.replace(c, parameter=new) for c in self.cuts if (new := names[c.parameter]) is not None]
        items = [dataclasses.replace(i, module=new) for i in self.attributes if (new := names[i.module]) is not None]
        folds = [dataclasses.replace(f, module=new) for f in self.folds if (new := names[f.module]) is not None]
        return dataclasses.replace(
            self, groups=tuple(groups), cuts=tuple(cuts), attributes=tuple(items), folds=tuple(folds)
        )

    @property
    def widths_before(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every parameter and buffer after blocks were dropped, and before anything else was cut."""
        found = ((renamed(name, self.blocks), shape) for name, shape in self.architecture.items())
        return {name: shape for name, shape in found if name is not None}

    def prefixed(self, path: str) -> Plan:
        """The plan for a network that contains this plan's network as the submodule ``path``."""

        def inner(name: str) -> str:
            return f"{path}.{name}".rstrip(".")

        return dataclasses.replace(
            self,
            groups=tuple(dataclasses.replace(group, name=inner(group.name)) for group in self.groups),
            cuts=tuple(dataclasses.replace(cut, parameter=inner(cut.parameter)) for cut in self.cuts),
            attributes=tuple(dataclasses.replace(item, module=inner(item.module)) for item in self.attributes),
            folds=tuple(dataclasses.replace(fold, module=inner(fold.module)) for fold in self.folds),
            blocks=tuple(dataclasses.replace(cut, stack=inner(cut.stack)) for cut in self.blocks),
            architecture={inner(name): shape for name, shape in self.architecture.items()},
        )

    def check_model(self, model: nn.Module) -> None:
        """Raise ArtifactError unless ``model`` has the unpruned shapes that the plan was made for.

        Buffers that are not saved, and that the plan does not cut, may be missing or different: some modules make them
        when they first run, for the inputs that they then see.
        """
        found, cut = architecture_of(model), {cut.parameter for cut in self.cuts}
        free = _unsaved(model) - cut
        for name, shape in self.architecture.items():
            if name in free:
                continue
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
        extra = sorted(found.keys() - self.architecture.keys() - free)
        if extra:
            raise ArtifactError(f"the plan is for another architecture: it does not know {extra[0]!r}")


def _taken(first: tuple[int, ...], then: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(first[index] for index in then)


def _composed_groups(first: Sequence[GroupPlan], then: Sequence[GroupPlan]) -> tuple[GroupPlan, ...]:
    found = {group.name: group for group in first}
    for group in then:
        before = found.get(group.name)
        if before is not None and len(before.keep) == group.width:
            group = GroupPlan(group.name, before.width, _taken(before.keep, group.keep))
        found[group.name] = group
    return tuple(found.values())


def _composed_cuts(first: Sequence[Cut], then: Sequence[Cut]) -> tuple[Cut, ...]:
    found = {(cut.parameter, cut.dim): cut for cut in first}
    for cut in then:
        key = cut.parameter, cut.dim
        cut = _for_all_experts(cut, found.get((cut.parameter, 0)))
        if key in found:
            before = found[key]
            keep, scale = _taken(before.keep, cut.keep), before.scale * cut.scale
            cut = dataclasses.replace(before, keep=keep, scale=scale)
        found[key] = cut
    return tuple(found.values())


def _for_all_experts(cut: Cut, before: Cut | None) -> Cut:
    """A cut within the experts that an earlier one left, as one of all experts, for it is made before that one.

    Experts that are dropped then keep as many channels as the others, whichever these are.
    """
    if before is None or not before.experts or cut.blocks == 1 or cut.blocks != len(before.keep):
        return cut
    width, kept = cut.size // cut.blocks, len(cut.keep) // cut.blocks
    inside = {expert: cut.keep[i * kept : (i + 1) * kept] for i, expert in enumerate(before.keep)}
    places = {expert: i * width for i, expert in enumerate(before.keep)}
    keep = tuple(
        expert * width + channel - places.get(expert, 0)
        for expert in range(before.size)
        for channel in inside.get(expert, range(kept))
    )
    return dataclasses.replace(cut, size=before.size * width, keep=keep, blocks=before.size)


def _composed_attributes(first: Sequence[Attribute], then: Sequence[Attribute]) -> tuple[Attribute, ...]:
    found = {(item.module, item.name, item.place): item for item in first}
    for item in then:
        key = item.module, item.name, item.place
        found[key] = dataclasses.replace(item, old=found[key].old) if key in found else item
    return tuple(found.values())


@dataclass(frozen=True)
class Remembered:
    """What is known of a network that was cut: how, with which outcome, and what it was then.

    Attributes:
        plan: what leads to it from its unpruned instance.
        report: the outcome (:class:`lbyl.Report`).
        architecture: shape of every parameter and buffer.
        imprint: of its weights.
    """

    plan: Plan
    report: Any
    architecture: Mapping[str, tuple[int, ...]]
    imprint: str

    def is_changed(self, model: nn.Module) -> bool:
        """Whether the weights are others than they were then."""
        return imprint(model) != self.imprint


_remembered: OrderedDict[str, Remembered] = OrderedDict()
_MOST_PLANS = 256


def remember(model: nn.Module, plan: Plan, report: Any) -> None:
    """Store what this network was cut by, within this process; :func:`recalled` also finds it for copies."""
    token = uuid4().hex
    vars(model)["_lbyl_plan"] = token
    _remembered[token] = Remembered(plan, report, architecture_of(model), imprint(model))
    while len(_remembered) > _MOST_PLANS:
        _remembered.popitem(last=False)


def remember_as(model: nn.Module, known: Remembered | None) -> None:
    """Store what another process knew of a network that it sent here (:func:`recalled`)."""
    if known is not None:
        _remembered[vars(model)["_lbyl_plan"]] = known


def recalled(model: nn.Module) -> Remembered | None:
    """What is known of how this network was cut; its shapes may have changed since."""
    return _remembered.get(vars(model).get("_lbyl_plan", ""))


def remembered(model: nn.Module) -> Plan | None:
    """The plan that this network was cut by; None if it is unknown, or if shapes have changed since."""
    known = recalled(model)
    if known is None or known.architecture != architecture_of(model):
        return None
    return dataclasses.replace(known.plan, trained=known.plan.trained or known.is_changed(model))


def _unsaved(model: nn.Module) -> set[str]:
    """The names of buffers that are not saved with the model, also of those that do not exist yet."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def architecture_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and buffer."""
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}


def _unpacked(data: dict[str, Any]) -> dict[str, Any]:
    """Plain data in which all kept channels are numbers. The data given is not changed.

    Raises:
        ArtifactError: a text stands for no channels.
    """
    texts = Unpacking()

    def numbers(item: Any, place: str) -> Any:
        if not isinstance(item, Mapping) or not isinstance(item.get("keep"), str):
            return item
        try:
            return {**item, "keep": texts.channels(item["keep"])}
        except ValueError as error:
            raise ArtifactError(f"the plan is damaged: these are no channels ({error}) - at `{place}`") from error

    lists = {name: data[name] for name in ("groups", "cuts") if isinstance(data.get(name), (list, tuple))}
    return data | {
        name: [numbers(item, f"$.{name}[{index}].keep") for index, item in enumerate(items)]
        for name, items in lists.items()
    }


def _faults(plan: Plan) -> Iterator[tuple[str, str]]:
    """Values of the right type that no plan of lbyl contains, each with its place."""
    yield from _setting_faults(plan.settings, "$.settings", fields=True)
    for index, group in enumerate(plan.groups):
        rising = all(a < b for a, b in pairwise((-1, *group.keep, group.width)))
        if not rising or not group.keep:
            fault = f"{group.name} keeps {list(group.keep[:3])} ... of {group.width} channels"
            yield fault, f"$.groups[{index}].keep"
    for index, block in enumerate(plan.blocks):
        if not block.rises:
            fault = f"{block.stack} keeps {list(block.keep[:3])} ... of {len(block.children)} blocks"
            yield fault, f"$.blocks[{index}].keep"
    for index, cut in enumerate(plan.cuts):
        if not 0 < cut.scale < math.inf:
            yield f"expected a positive number, found {cut.scale!r}", f"$.cuts[{index}].scale"
    for index, attribute in enumerate(plan.attributes):
        if fault := _attribute_fault(attribute):
            yield f"{attribute.module}.{attribute.name} {fault}", f"$.attributes[{index}]"


def _setting_faults(value: Any, place: str, fields: bool) -> Iterator[tuple[str, str]]:
    """Names in settings that are not identifiers: settings are printed as code that users paste."""
    if isinstance(value, Mapping):
        fields = fields or isinstance(value.get("name"), str)
        for name, item in value.items():
            if fields and not (name.isidentifier() and not iskeyword(name)):
                yield f"{name!r} is not a name of a setting", place
            if item and isinstance(item, (Mapping, list, tuple)):
                yield from _setting_faults(item, f"{place}.{name}", fields=False)
        if isinstance(value.get("name"), str) and not value["name"].isidentifier():
            yield f"{value['name']!r} is not a name of a class", f"{place}.name"
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if item and isinstance(item, (Mapping, list, tuple)):  # a file may hold millions of others
                yield from _setting_faults(item, f"{place}[{index}]", fields=False)


def _attribute_fault(attribute: Attribute) -> str:
    """Why a module's number can't follow a cut; "" if it can."""
    old, new, place = attribute.old, attribute.new, attribute.place
    if isinstance(old, float):
        positive = isinstance(new, float) and 0 < old < math.inf and 0 < new < math.inf
        return "" if positive and place is None and not attribute.name.startswith("__") else "is not a valid constant"
    shrinks = isinstance(new, int) and 0 < new <= old
    if shrinks and (place is None or place >= 0) and not attribute.name.startswith("__"):
        return ""
    return f"from {old} to {new} is not a width that shrinks"


def of_huggingface(source: str) -> tuple[str, str | None] | None:
    """The folder or name, and the task, in ``hf:DIR`` or ``hf/TASK:DIR``; None for other sources.

    >>> of_huggingface("hf/masked-lm:models/bert")
    ('models/bert', 'masked-lm')
    """
    kind, separator, place = source.partition(":")
    library, slash, task = kind.partition("/")
    if not separator or library != "hf" or (slash and not task):
        return None
    return place, task or None


def is_rebuildable(source: str) -> bool:
    """Whether loading may build this source: models of libraries and ONNX files, but not a user's code."""
    known = of_huggingface(source) is not None or source.lower().endswith(".onnx")
    return known or source.rpartition(":")[0] in ("timm", "torchvision")
