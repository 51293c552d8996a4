"""Verifies that the cut network computes what the masked one computes, in float64 if the network runs in it.

In the masked network, consumers have zeros in place of dropped columns. Layer norms over dropped channels take their
statistics over the others (see `lbyl.runtime.layer_norms`).

Channels are treated equally at every pixel, so large images are compared with fewer pixels, which is a tenth of the
work. The cut network then runs once on the full example inputs to check shapes; its layers return zeros there. A
network that requires a size of images is compared on that size.

A network that requires another precision is compared in that one, with a larger tolerance.

Both networks are also compared on inputs of another size, if the network takes such: see `lbyl.surgery.other_sizes`.

Most groups that can't be cut fail by their shapes, because the code takes a width from elsewhere. These are found
without computing anything, on PyTorch's meta device, if the network runs on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lbyl.errors import InputError, LbylError, VerificationError, line_of
from lbyl.graph import Graph
from lbyl.runtime.contexts import plain_attention, undisturbed
from lbyl.runtime.copying import apply_changes, copy_model, replacements_by_id, tensors_of
from lbyl.runtime.float64 import LARGE, Float64Mode
from lbyl.runtime.inputs import ExampleInputs, outputs, outputs_if_taken
from lbyl.runtime.intercept import unseen
from lbyl.runtime.layer_norms import NormMasks, statistics_of_kept
from lbyl.runtime.macs import macs_by_shapes
from lbyl.runtime.sentinels import meaningful
from lbyl.selection.select import Choice, Selection
from lbyl.surgery.attributes import Attribute, plan_attributes
from lbyl.surgery.cuts import cut_copy, plan_cuts
from lbyl.surgery.masking import Masks, norm_masks, still_masked
from lbyl.surgery.other_sizes import of_another_size

TOLERANCE = 1e-6
"""The tolerance in float64, relative to the output's largest magnitude."""
_ROUNDINGS = 2**13
"""In other precisions, the tolerance is this many times the rounding error, and at most 0.1."""
_THINNED = 0.3
"""The share of rows and columns with which large images are compared."""
_LARGEST = 5e8
"""Networks with more parameters are not run on inputs of another size."""
NOTHING: Masks = MappingProxyType({})

Follow = Callable[[Selection], Sequence[Attribute]]
"""A function that returns the changes of attributes for a selection."""


@dataclass(frozen=True)
class Verification:
    """The result of a verification.

    ``difference`` is the largest difference of any output, relative to that output's largest magnitude; it is None if
    all outputs are empty, so that nothing could be compared. ``macs`` are the multiply-accumulates on the example
    inputs, before and after the cut. ``note`` is what the user should know.
    """

    difference: float | None
    tolerance: float
    dtype: str
    macs: tuple[int, int]
    note: str = ""


@dataclass(frozen=True)
class _Precision:
    """The precision in which a network is run: ``dtype``, or its own if that is None."""

    dtype: torch.dtype | None
    mode: Float64Mode = field(default_factory=Float64Mode)

    def tolerance(self, model: nn.Module) -> float:
        """The tolerance of outputs for the least precise dtype that the run used."""
        own = _own_dtype(model) if self.dtype is None else self.dtype
        return max(_tolerance(dtype) for dtype in (own, *self.mode.narrower))


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE if dtype == torch.float64 else min(0.1, _ROUNDINGS * torch.finfo(dtype).eps)


def _own_dtype(model: nn.Module) -> torch.dtype:
    return next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.get_default_dtype())


def _precisions(model: nn.Module) -> list[_Precision]:
    """The precisions to try, in order."""
    coarse = [torch.float32] if torch.finfo(_own_dtype(model)).bits < 32 else []
    return [_Precision(dtype) for dtype in (torch.float64, *coarse, None)]


class _NotReached(InputError):
    """The module of a weight that has to be masked was not called."""


@contextmanager
def _widened(model: nn.Module, names: dict[int, str], silent: Masks, dtype: torch.dtype | None) -> Iterator[None]:
    """Convert each module's own tensors to ``dtype`` while it runs, so that there is never a converted copy of all.

    ``names`` are the names of tensors by their ids, to which converted tensors are added. ``silent`` masks are applied
    to the converted tensors. Large weights of linear layers are not converted here, but by
    :class:`lbyl.runtime.float64.Float64Mode`.

    Raises:
        _NotReached: a weight of ``silent`` was not masked, because another module uses it (in Swin, attention calls
            functions with the weights of its linear layers).
    """
    state = tensors_of(model) if silent else {}
    laid = {id(state[name]): changes for name, changes in silent.items()}
    held: list[tuple[dict[str, Any], dict[str, Any]]] = []
    unmasked = set(laid)

    def widen(module: nn.Module, args: Any) -> None:
        with unseen():  # or every weight would count as a tensor of low precision that the model's code asked for
            convert(module)

    def convert(module: nn.Module) -> None:
        tables = module._parameters, module._buffers
        held.append((dict(tables[0]), dict(tables[1])))
        for table in tables:
            for name, tensor in table.items():
                if tensor is None or not _has_fraction(tensor):
                    continue
                narrow = type(module) is nn.Linear and name == "weight" and tensor.numel() > LARGE
                if (not narrow and dtype is not None) or id(tensor) in laid:
                    wide = tensor.detach().to(_as_wide(tensor, dtype), copy=id(tensor) in laid)
                    for change in laid.get(id(tensor), ()):
                        change(wide)
                    unmasked.discard(id(tensor))
                    placed = nn.Parameter(wide, False) if isinstance(tensor, nn.Parameter) else wide
                    table[name] = placed  # pyright: ignore[reportArgumentType]
                    names[id(placed)] = names.get(id(tensor), "")

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        parameters, buffers = held.pop()
        for table, before in ((module._parameters, parameters), (module._buffers, buffers)):
            for name, tensor in table.items():
                if tensor is not None and tensor is not before.get(name):
                    names.pop(id(tensor), None)
        module._parameters.update(parameters)
        module._buffers.update(buffers)

    hooks = []
    for module in model.modules():
        if module._parameters or module._buffers:
            hooks.append(module.register_forward_pre_hook(widen, prepend=True))
            hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if unmasked:
        missed = next(name for name, tensor in state.items() if id(tensor) in unmasked)
        raise _NotReached(f"{missed} is used by another module than its own")


def _as_wide(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type of a tensor in a network that runs in ``dtype``, or as it is if that is None.

    Complex numbers stay complex. (``Module.to`` would discard their imaginary parts.)
    """
    if dtype is None or not _has_fraction(tensor):
        return tensor.dtype
    return dtype.to_complex() if tensor.is_complex() else dtype


def _wide_outputs(
    model: nn.Module, inputs: ExampleInputs, precision: _Precision, kept: NormMasks, silent: Masks = NOTHING
) -> list[Tensor]:
    """The model's outputs in some precision. The model is not changed.

    ``kept`` gives the channels over which layer norms take statistics, and ``silent`` the masks of weights.
    """
    try:
        return _widened_outputs(model, inputs, precision, kept, silent)
    except InputError:
        # A module that uses tensors of another module would mix two precisions.
        return _copied_outputs(model, inputs, precision, kept, silent)


def _masked_outputs(
    model: nn.Module, inputs: ExampleInputs, precision: _Precision, kept: NormMasks, silent: Masks
) -> list[Tensor]:
    """The outputs without a converted copy of the whole model, which does not work for every model."""
    try:
        return _widened_outputs(model, inputs, precision, kept, silent)
    except _NotReached:
        return _copied_outputs(model, inputs, precision, kept, silent)


def _copied_outputs(
    model: nn.Module, inputs: ExampleInputs, precision: _Precision, kept: NormMasks, silent: Masks
) -> list[Tensor]:
    """The outputs of a copy that is converted as a whole."""
    wide = copy_model(model).eval()
    wide = apply_changes(wide._apply(lambda tensor: tensor.to(_as_wide(tensor, precision.dtype))), silent)
    with undisturbed(wide), plain_attention(), statistics_of_kept(wide, kept, _names(wide)), precision.mode:
        return outputs(wide, inputs)


def _widened_outputs(
    model: nn.Module, inputs: ExampleInputs, precision: _Precision, kept: NormMasks, silent: Masks
) -> list[Tensor]:
    names = _names(model)
    statistics, widened = statistics_of_kept(model, kept, names), _widened(model, names, silent, precision.dtype)
    with undisturbed(model), widened, plain_attention(), statistics, precision.mode:
        return outputs(model, inputs)


def _names(model: nn.Module) -> dict[int, str]:
    return {id(tensor): name for name, tensor in tensors_of(model).items()}


def _gap(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> str | None:
    """How outputs differ, in words; None if they do not."""
    if len(expected) != len(found):
        return f"{len(found)} outputs instead of {len(expected)}"
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape:
            return f"an output of shape {[*b.shape]} instead of {[*a.shape]}"
    gap = difference(expected, found)
    return None if gap <= tolerance else f"outputs differ by {gap:.2g} of their magnitude"


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest ratio of absolute difference to largest magnitude over all tensors; inf if shapes differ.

    Masked values (`lbyl.runtime.sentinels`) must be in the same places. If all outputs are whole numbers, it is the
    largest share of numbers that differ.
    """
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    pairs = list(zip(expected, found, strict=True))
    if not any(_has_fraction(t) for t in expected):
        return max((float((a != b).double().mean()) for a, b in pairs if a.numel()), default=0.0)
    worst = 0.0
    for a, b in pairs:
        if not _has_fraction(a):
            continue
        a, b = ((t.to(torch.complex128 if t.is_complex() else torch.float64)) for t in (a, b))
        here = meaningful(a)
        if not bool((here == meaningful(b)).all()):
            return float("inf")
        a, b = (a, b) if bool(here.all()) else (a[here], b[here])
        gap = (a - b).abs().max() / a.abs().max().clamp_min(1e-300) if a.numel() else torch.zeros(())
        worst = max(worst, float(gap) if bool(torch.isfinite(gap)) else float("inf"))
    return worst


def allowed_difference(expected: Sequence[Tensor]) -> float:
    """The largest :func:`difference` of networks that run in their own precision: 1e-4, and 0.01 in half precision."""
    half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in expected)
    return 1e-4 * (100 if half else 1)


def _has_fraction(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def verify(
    masked: nn.Module,
    smaller: nn.Module,
    inputs: ExampleInputs,
    selection: Selection,
    attribute: Follow = lambda selection: (),
    macs: int | None = None,
    silent: Masks = NOTHING,
    blame: bool = True,
) -> Verification:
    """Compare the cut network with the uncut one whose dropped columns are zero.

    Layer norms over dropped channels take their statistics over the others in both: see `lbyl.runtime.layer_norms`.

    Args:
        masked: the uncut network.
        smaller: the cut network.
        inputs: the inputs of both.
        selection: the dropped channels.
        attribute: gives the changes of attributes for a part of the selection.
        macs: multiply-accumulates of the uncut network on these inputs, if known.
        silent: masks to apply to the weights of ``masked``, which is copied only if the outputs differ.
        blame: if the outputs differ, find the group that causes it, which takes several more runs.

    Raises:
        VerificationError: the outputs differ; the error names the first group whose cut causes it.
        InputError: the outputs are not finite, so nothing can be compared.
    """
    reference = _reference(masked, inputs, selection, silent)

    def wrong(what: str) -> VerificationError:
        if not blame:
            return VerificationError(f"the cut network does not compute what the masked one computes ({what})")
        full = apply_changes(copy_model(masked).eval(), silent) if silent else masked
        return _error(_first_bad(full, reference, selection, attribute), what)

    try:
        found = _wide_outputs(smaller, reference.inputs, reference.precision, {})
        after = _count(smaller, reference.whole)
    except InputError as error:
        raise wrong(str(error)) from error
    gap = difference(reference.outputs, found)
    if gap > reference.tolerance:
        raise wrong(_gap(reference.outputs, found, reference.tolerance) or "")
    if elsewhere := reference.gap_elsewhere(smaller, {}):
        raise wrong(elsewhere)
    before = _count(masked, reference.whole) if macs is None else macs
    if before == after and _ignores_its_weights(smaller, inputs):
        raise VerificationError(
            "the cut network does not compute with its own weights, but with the original's, as where a forward holds "
            "the original network in a place that a copy does not reach; define it as a method of a class"
        )
    if not any(t.numel() for t in found):
        note = "not verified: the network's outputs on the example inputs are empty, so nothing was compared"
        return Verification(None, reference.tolerance, reference.dtype, (before, after), note)
    note = reference.note if gap > TOLERANCE or reference.precision.dtype != torch.float64 else ""
    return Verification(gap, reference.tolerance, reference.dtype, (before, after), note)


def cuttable(
    masked: nn.Module, inputs: ExampleInputs, selection: Selection, attribute: Follow = lambda selection: ()
) -> tuple[Selection, dict[str, str]]:
    """Find the part of a selection that can be cut, and for each other group what goes wrong.

    Groups at the same place in modules of one class share their code. So if one of them can't be cut, the others are
    tried together, in halves, and so on. Groups that can only be cut together, such as a residual connection and the
    heads that its width is divided into, are found by trying a residual connection with everything that it feeds.

    Args:
        masked: the uncut network in which the dropped columns of the whole selection are zero.
        inputs: its inputs.
        selection: the channels to drop.
        attribute: gives the changes of attributes for a part of the selection.
    """
    reference = _reference(masked, inputs, selection)
    modules = dict(masked.named_modules())

    def trouble(choices: Sequence[Choice]) -> str | None:
        return _trouble(masked, reference, Selection(tuple(choices), ()), attribute)

    def by_shapes(choices: Sequence[Choice]) -> str | None:
        return reference.outline.trouble(Selection(tuple(choices), ()), attribute)

    good, bad = list(selection.choices), dict[str, str]()
    if trouble(good) is None:
        return selection, bad
    settled = _settled_by_shapes(good, by_shapes)
    good.sort(key=lambda choice: choice.group.name not in settled)  # a stable sort
    while good and (why := by_shapes(good) or trouble(good)) is not None:
        if by_shapes(good) is None:  # shapes do not explain the failure, so settled groups are suspects too
            settled = set()
        culprit = _first_bad(masked, reference, Selection(tuple(good), ()), attribute, len(settled))
        # Nothing is computed as long as shapes fail.
        tried = by_shapes if by_shapes(good) else trouble
        alone = tried([culprit])
        bad[culprit.group.name] = alone or why
        good = [choice for choice in good if choice is not culprit]
        kind = _kind(culprit, modules)
        suspects = [c for c in good if _kind(c, modules) == kind and c.group.name not in settled]
        if alone is None:
            continue
        guilty = _guilty(suspects, tried)
        bad |= guilty
        good = [choice for choice in good if choice.group.name not in guilty]
    names = {choice.group.name for choice in good}
    return Selection(tuple(c for c in selection.choices if c.group.name in names), selection.left), bad


def _settled_by_shapes(good: Sequence[Choice], by_shapes: Callable[[Sequence[Choice]], str | None]) -> set[str]:
    """The groups of families that shapes allow to be cut; empty if shapes allow all groups."""
    if not by_shapes(good):
        return set()
    fine = [choice for family in _families(good) if by_shapes(family) is None for choice in family]
    return {choice.group.name for choice in fine} if fine and by_shapes(fine) is None else set()


def _kind(choice: Choice, modules: Mapping[str, nn.Module]) -> tuple[Any, ...]:
    """The classes of the modules that contain a group, and its name there; equal groups fail in the same way."""
    parent, _, name = choice.group.name.rpartition(".")
    above = parent.rpartition(".")[0]
    return type(modules.get(above)), type(modules.get(parent)), name


_FEW = 4


def _guilty(suspects: Sequence[Choice], tried: Callable[[Sequence[Choice]], str | None]) -> dict[str, str]:
    """The names of the groups that can't be cut, and what goes wrong.

    Of many that fail together, all count as guilty if the first and the last one fail by themselves.
    """
    why = tried(suspects) if suspects else None
    if why is None:
        return {}
    if len(suspects) == 1:
        return {suspects[0].group.name: why}
    if len(suspects) > _FEW and (first := tried(suspects[:1])) and tried(suspects[-1:]):
        return {choice.group.name: first for choice in suspects}
    half = len(suspects) // 2
    return {**_guilty(suspects[:half], tried), **_guilty(suspects[half:], tried)}


def _families(choices: Sequence[Choice]) -> list[list[Choice]]:
    """Each residual connection with the groups whose layers read or write it, and the groups that belong to none."""
    coupled = [choice for choice in choices if _is_stream(choice)]
    # Heads may be coupled too (a layer of their own adds to their scores), but they only feed a residual connection.
    streams = [a for a in coupled if not any(_consumers(a) <= _makers(b) for b in coupled if b is not a)]
    families = [[stream] for stream in streams]
    others: list[Choice] = []
    makes, reads = [_makers(stream) for stream in streams], [_consumers(stream) for stream in streams]
    for choice in choices:
        if choice in streams:
            continue
        makers, consumers = _makers(choice), _consumers(choice)
        met = (i for i in range(len(streams)) if makers & reads[i] or consumers & makes[i])
        found = next(met, None)
        (others if found is None else families[found]).append(choice)
    return [*families, others] if others else families


def _is_stream(choice: Choice) -> bool:
    return bool(choice.group.excluded_from_inner) and not choice.group.coupled_with


def _makers(choice: Choice) -> set[str]:
    return {producer.weight.parameter for producer in choice.group.producers}


def _consumers(choice: Choice) -> set[str]:
    return {slot.parameter for slot in choice.group.consumers}


def follower(model: nn.Module, graph: Graph) -> Follow:
    """A function that gives the changes of a model's attributes for a selection."""
    return lambda part: plan_attributes(model, graph, part)


def without_trouble(masked: nn.Module, inputs: ExampleInputs, graph: Graph, selection: Selection) -> Selection:
    """The selection without the groups that can't be cut, which it lists with the reasons.

    Raises:
        VerificationError: no group can be cut.
    """
    good, bad = cuttable(masked, inputs, selection, follower(masked, graph))
    left = (*selection.left, *((name, f"found by verification: {what}") for name, what in bad.items()))
    found = Selection(good.choices, left)
    if not found.choices:
        raise VerificationError(
            "no group can be cut: " + "; ".join(f"{name}: {what}" for name, what in list(bad.items())[:3])
        )
    return found


@dataclass(frozen=True)
class _Reference:
    """The masked network's outputs for some inputs, in a precision in which it runs.

    Attributes:
        inputs: the inputs in that precision.
        outputs: the masked network's outputs.
        other: inputs of another size and the masked network's outputs for them, if it takes such inputs.
        kept: the kept channels at its layer norms.
        whole: the full example inputs, on which the cut network must run as well.
        thinned: whether ``inputs`` are images with fewer pixels than ``whole``.
        outline: the masked network on the meta device.
        precision: the precision for both networks.
        tolerance: the allowed difference of their outputs.
        dtype: the name of the precision.
        why: why it is not float64; "" if it is, or if unknown.
    """

    inputs: ExampleInputs
    outputs: list[Tensor]
    kept: NormMasks
    whole: ExampleInputs
    thinned: bool
    outline: Outline
    precision: _Precision
    tolerance: float
    dtype: str
    why: str = ""
    other: tuple[ExampleInputs, list[Tensor]] | None = None

    def gap_elsewhere(self, smaller: nn.Module, kept: NormMasks) -> str | None:
        """How the outputs of a cut network differ for inputs of another size; None if they do not."""
        if self.other is None:
            return None
        inputs, expected = self.other
        try:
            gap = _gap(expected, _wide_outputs(smaller, inputs, self.precision, kept), self.tolerance)
        except InputError as error:
            gap = _fails(error)
        sizes = ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs.tensors())
        return f"on inputs of another size ({sizes}) {gap}" if gap else None

    @property
    def note(self) -> str:
        """A note about the precision."""
        text = f"verified in {self.dtype}, to {self.tolerance:.1e}"
        return f"{text}: the network does not run in float64 ({self.why})" if self.why else text


class Outline:
    """A network on the meta device, which only has shapes; it is made at its first use."""

    def __init__(self, model: nn.Module, inputs: ExampleInputs) -> None:
        self._model, self._inputs = model, inputs

    @cached_property
    def _made(self) -> tuple[nn.Module, ExampleInputs, list[torch.Size]] | None:
        """The network and its inputs on the meta device, and the shapes of its outputs; None if it does not run."""
        nothing = {name: tensor.detach().to("meta") for name, tensor in tensors_of(self._model).items()}
        ghost = copy_model(self._model, replacements_by_id(self._model, nothing)).eval()
        inputs = self._inputs.to(torch.device("meta"))
        try:
            return ghost, inputs, _shapes(ghost, inputs)
        except InputError:
            return None

    def trouble(self, part: Selection, attribute: Follow) -> str | None:
        """Why shapes do not allow a cut of this part of the selection; None if they do."""
        if self._made is None:
            return None
        ghost, inputs, expected = self._made
        try:
            found = _shapes(cut_copy(ghost, plan_cuts(part), attribute(part)), inputs)
        except LbylError as error:
            return _fails(error)
        different = ((a, b) for a, b in zip(expected, found, strict=False) if a != b)
        a, b = next(different, (None, None))
        if a is not None and b is not None:
            return f"an output of shape {[*b]} instead of {[*a]}"
        return None if len(found) == len(expected) else f"{len(found)} outputs instead of {len(expected)}"


def _shapes(model: nn.Module, inputs: ExampleInputs) -> list[torch.Size]:
    with undisturbed(model), plain_attention(), Float64Mode():  # which also knows shapes that PyTorch does not
        return [tensor.shape for tensor in outputs(model, inputs)]


def _fails(error: LbylError) -> str:
    """Why a network without some channels does not run."""
    if not isinstance(error, InputError):
        return str(error)
    place = line_of(error.__cause__)
    return f"without them the code fails ({said(error).rstrip('.')}{f', in {place}' if place else ''})"


def said(error: LbylError) -> str:
    """The message of an error, without the description of the inputs."""
    return str(error).rpartition("): ")[2] if isinstance(error, InputError) else str(error)


def _reference(masked: nn.Module, inputs: ExampleInputs, selection: Selection, silent: Masks = NOTHING) -> _Reference:
    """Run the masked network in the first precision that it runs in."""
    whys = list[InputError]()
    for precision in _precisions(masked):
        found = _attempted(precision, masked, inputs, selection, silent)
        if isinstance(found, _Reference):
            return replace(found, why=said(whys[0])) if whys else found
        whys.append(found)
    raise whys[-1]


def _attempted(
    precision: _Precision, masked: nn.Module, inputs: ExampleInputs, selection: Selection, silent: Masks
) -> _Reference | InputError:
    """The reference in one precision, or the error if the network does not run in it."""
    try:
        return _reference_in(precision, masked, inputs, selection, silent)
    except InputError as error:
        return error


def _reference_in(
    precision: _Precision, masked: nn.Module, inputs: ExampleInputs, selection: Selection, silent: Masks
) -> _Reference:
    """Run the masked network in this precision, on thinned images if it takes them."""
    kept = norm_masks(selection)
    device = next((p.device for p in masked.parameters()), torch.device("cpu"))
    whole, thinned = inputs.to(device), inputs.thinned(_THINNED)
    outline = Outline(masked, whole)

    if torch.finfo(_own_dtype(masked)).bits < 32:
        # The weights of norms that a cut corrects are rounded to this precision, in whichever one the network runs.
        precision.mode.narrower.add(_own_dtype(masked))

    def reference(made: ExampleInputs, expected: list[Tensor]) -> _Reference:
        tolerance, dtype = precision.tolerance(masked), precision.dtype or _own_dtype(masked)
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.float64 and precision.mode.narrower:
            name += f", with {precision.mode.narrowest} inside"
        known = _Reference(made, expected, kept, whole, made is not full, outline, precision, tolerance, name)
        return replace(known, other=_elsewhere(masked, known, silent))

    full = inputs.to(device, precision.dtype)
    if thinned is not None:
        wide = thinned.to(device, precision.dtype)
        try:
            expected = _masked_outputs(masked, wide, precision, kept, silent)
        except InputError:  # it insists on the size of its images
            pass
        else:
            if _finite(expected):
                return reference(wide, expected)
    expected = _wide_outputs(masked, full, precision, kept, silent)
    if not _finite(expected):
        raise InputError("the network's output on the example inputs is not finite (NaN or infinity in weights?)")
    return reference(full, expected)


def _elsewhere(masked: nn.Module, reference: _Reference, silent: Masks) -> tuple[ExampleInputs, list[Tensor]] | None:
    """Inputs of another size, and the masked network's outputs for them; None if it does not take such inputs.

    Very large networks are not run once more.
    """
    if sum(parameter.numel() for parameter in masked.parameters()) > _LARGEST:
        return None
    floating = next((t.dtype for t in reference.whole.tensors() if t.is_floating_point()), None)

    def taken(inputs: ExampleInputs) -> bool:
        try:
            _count(masked, inputs.to(inputs.tensors()[0].device, floating))
        except InputError:
            return False
        return True

    # Thinned images have another size than those on which the network was traced.
    other = of_another_size(reference.inputs, taken, lengths=not reference.thinned)
    if other is None:
        return None
    try:
        expected = _wide_outputs(masked, other, reference.precision, reference.kept, silent)
    except InputError:  # values do not allow it, such as indices
        return None
    return (other, expected) if _finite(expected) else None


def _count(model: nn.Module, inputs: ExampleInputs) -> int:
    with undisturbed(model):
        return macs_by_shapes(model, inputs)


def _ignores_its_weights(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether a network gives the same finite outputs whatever its weights are."""
    blank = copy_model(model).eval()
    weights = [tensor for tensor in tensors_of(blank).values() if tensor.is_floating_point()]
    with torch.no_grad():
        for tensor in weights:
            tensor.fill_(math.nan)
    found = outputs_if_taken(blank, inputs)
    return bool(weights) and found is not None and all(bool(torch.isfinite(t).all()) for t in found if _has_fraction(t))


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Whether outputs can be compared: neither NaN nor infinity, but minus infinity where something is masked."""
    return all(_comparable(t) for t in tensors if _has_fraction(t))


def _comparable(tensor: Tensor) -> bool:
    if bool(torch.isfinite(tensor).all()):
        return True
    masked = not tensor.is_complex() and not bool(tensor.isnan().any()) and not bool(tensor.isposinf().any())
    return masked and bool(meaningful(tensor).any())


def _trouble(masked: nn.Module, reference: _Reference, part: Selection, attribute: Follow) -> str | None:
    """What goes wrong if this part of the selection is cut from the masked network; None if nothing does."""
    try:
        cuts = plan_cuts(part)
        smaller = cut_copy(masked, cuts, attribute(part))
        # Layer norms over groups that are still masked leave out dropped channels.
        kept = still_masked(reference.kept, part)
        found = _wide_outputs(smaller, reference.inputs, reference.precision, kept)
        gap = _gap(reference.outputs, found, reference.tolerance)
        if gap is None and reference.thinned:
            _count(smaller, reference.whole)
    except LbylError as error:
        return _fails(error)
    return gap or reference.gap_elsewhere(smaller, kept)


def _first_bad(
    masked: nn.Module, reference: _Reference, selection: Selection, attribute: Follow, settled: int = 0
) -> Choice:
    """The first group that can't be cut, by halving: cutting a prefix of the groups works or fails.

    The first ``settled`` groups are known to work, together at least.
    """
    low, high = settled, len(selection.choices)  # cutting `low` groups works, cutting `high` fails
    by_shapes = reference.outline.trouble(selection, attribute) is not None
    while high - low > 1:
        middle = (low + high) // 2
        part = Selection(selection.choices[:middle], ())
        if by_shapes:
            works = reference.outline.trouble(part, attribute) is None
        else:
            works = _trouble(masked, reference, part, attribute) is None
        low, high = (middle, high) if works else (low, middle)
    return selection.choices[high - 1]


def _error(choice: Choice, what: str) -> VerificationError:
    group = choice.group.name
    return VerificationError(
        f"group {group!r}: the cut network does not compute what the masked one computes ({what}). "
        f"Leave the group out with ratio={{'*': ..., {group!r}: 0}}."
    )
