"""The cut network must compute what the masked one computes: checked in float64, where the network runs in it.

In the masked network, consumers have zeros in place of dropped columns. Layer norms over dropped channels take their
statistics over the others (see `lbyl.runtime.layer_norms`).

Channels are wired alike at every pixel, so large images are compared with fewer of them, which is a tenth of the
work; then the cut network runs once on the example inputs as they are, where only the shapes count, so that layers
return zeros. Networks that insist on the size of their images are compared on that.

Networks that insist on a precision of their own are compared in that one, with a tolerance that follows from it.

Most of what can't be cut fails by its shapes: a width that the code takes from elsewhere. Which groups those are is
found out without computing anything, on PyTorch's meta device, where the network runs on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lbyl.errors import InputError, LbylError, VerificationError
from lbyl.graph import Graph
from lbyl.runtime.contexts import plain_attention, undisturbed
from lbyl.runtime.copying import apply_changes, copy_model, replacements_by_id, tensors_of
from lbyl.runtime.float64 import LARGE, Float64Mode
from lbyl.runtime.inputs import ExampleInputs, outputs
from lbyl.runtime.layer_norms import NormMasks, statistics_of_kept
from lbyl.runtime.macs import macs_by_shapes
from lbyl.selection.select import Choice, Selection
from lbyl.surgery.attributes import Attribute, plan_attributes
from lbyl.surgery.cuts import cut_copy, plan_cuts
from lbyl.surgery.masking import Masks, norm_masks, still_masked

TOLERANCE = 1e-6
"""In float64."""
_ROUNDINGS = 2**13
"""In other precisions, the tolerance is this many roundings of the largest output, and a tenth of it at most."""
_THINNED = 0.3
"""The share of their rows and columns that large images are compared with."""
NOTHING: Masks = MappingProxyType({})

Follow = Callable[[Selection], Sequence[Attribute]]
"""Which attributes follow the cut of a selection."""


@dataclass(frozen=True)
class Verification:
    """The largest difference of any output, relative to that output's largest magnitude.

    ``difference`` is None where all outputs are empty, so that nothing could be compared; ``macs`` are the
    multiply-accumulates on the example inputs, before and after the cut; ``note`` is what the user should know.
    """

    difference: float | None
    tolerance: float
    dtype: str
    macs: tuple[int, int]
    note: str = ""


@dataclass(frozen=True)
class _Precision:
    """The precision that a network is run in: ``dtype``, or its own where that is None."""

    dtype: torch.dtype | None
    mode: Float64Mode = field(default_factory=Float64Mode)

    def tolerance(self, model: nn.Module) -> float:
        """How much outputs may differ, judged by the coarsest precision that the run used."""
        own = _own_dtype(model) if self.dtype is None else self.dtype
        return max(_tolerance(dtype) for dtype in (own, *self.mode.narrower))


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE if dtype == torch.float64 else min(0.1, _ROUNDINGS * torch.finfo(dtype).eps)


def _own_dtype(model: nn.Module) -> torch.dtype:
    return next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.get_default_dtype())


def _precisions(model: nn.Module) -> list[_Precision]:
    """The precisions that a network is tried in, in this order."""
    coarse = [torch.float32] if torch.finfo(_own_dtype(model)).bits < 32 else []
    return [_Precision(dtype) for dtype in (torch.float64, *coarse, None)]


class _NotReached(InputError):
    """The module of a weight that has to be masked was never called."""


@contextmanager
def _widened(model: nn.Module, names: dict[int, str], silent: Masks, dtype: torch.dtype | None) -> Iterator[None]:
    """Each module's own tensors are ``dtype`` while it runs, so that no wide copy of the model is ever held.

    ``names`` are those of tensors by their ids; the wide ones are among them while they are in place. ``silent`` is
    laid on the wide ones. Large weights of linear layers stay narrow, for :class:`lbyl.runtime.float64.Float64Mode`.

    Raises:
        _NotReached: a weight of ``silent`` was not masked, for another module uses it than its own (Swin's attention
            calls functions with the weights of its linear layers).
    """
    state = tensors_of(model) if silent else {}
    laid = {id(state[name]): changes for name, changes in silent.items()}
    held: list[tuple[dict[str, Any], dict[str, Any]]] = []
    unmasked = set(laid)

    def widen(module: nn.Module, args: Any) -> None:
        tables = module._parameters, module._buffers
        held.append((dict(tables[0]), dict(tables[1])))
        for table in tables:
            for name, tensor in table.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                narrow = type(module) is nn.Linear and name == "weight" and tensor.numel() > LARGE
                if (not narrow and dtype is not None) or id(tensor) in laid:
                    wide = tensor.detach().to(dtype or tensor.dtype, copy=id(tensor) in laid)
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


def _wide_outputs(
    model: nn.Module, inputs: ExampleInputs, precision: _Precision, kept: NormMasks, silent: Masks = NOTHING
) -> list[Tensor]:
    """The model's outputs in some precision; the model itself stays as it is.

    ``kept`` tells which channels layer norms take their statistics over, ``silent`` what is zero in its weights.
    """
    try:
        return _widened_outputs(model, inputs, precision, kept, silent)
    except InputError:
        # A module that uses the tensors of another one meets two precisions.
        return _copied_outputs(model, inputs, precision, kept, silent)


def _masked_outputs(
    model: nn.Module, inputs: ExampleInputs, precision: _Precision, kept: NormMasks, silent: Masks
) -> list[Tensor]:
    """The same, without a widened copy of the whole model: the model may not run on these inputs."""
    try:
        return _widened_outputs(model, inputs, precision, kept, silent)
    except _NotReached:
        return _copied_outputs(model, inputs, precision, kept, silent)


def _copied_outputs(
    model: nn.Module, inputs: ExampleInputs, precision: _Precision, kept: NormMasks, silent: Masks
) -> list[Tensor]:
    """The outputs of a copy that is widened as a whole."""
    wide = copy_model(model).eval()
    wide = apply_changes(wide if precision.dtype is None else wide.to(precision.dtype), silent)
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


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest absolute difference over largest magnitude, tensor by tensor; inf where shapes differ.

    Where no output has a fraction, it is the largest share of numbers that are not the same.
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
        gap = (a - b).abs().max() / a.abs().max().clamp_min(1e-300) if a.numel() else torch.zeros(())
        worst = max(worst, float(gap) if bool(torch.isfinite(gap)) else float("inf"))
    return worst


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
        smaller: the cut one.
        inputs: what they are called with.
        selection: what was cut.
        attribute: which attributes follow the cut of a part of the selection.
        macs: multiply-accumulates of the uncut network on these inputs, where they are known.
        silent: what is zero in ``masked`` where its weights are whole; it is copied only if something is wrong then.
        blame: find out which group it is when something is wrong, which takes several more runs.

    Raises:
        VerificationError: the outputs differ; names the first group whose cut alone makes them differ.
        InputError: the outputs are not finite, so nothing can be compared.
    """
    reference = _reference(masked, inputs, selection, silent)

    def wrong(what: str) -> VerificationError:
        if not blame:
            return VerificationError(f"the cut network is not the masked one ({what})")
        full = apply_changes(copy_model(masked).eval(), silent) if silent else masked
        return _error(_first_bad(full, reference, selection, attribute), what)

    try:
        found = _wide_outputs(smaller, reference.inputs, reference.precision, {})
        after = _count(smaller, reference.whole)
    except InputError as error:
        raise wrong(str(error)) from error
    gap = difference(reference.outputs, found)
    if gap > reference.tolerance:
        raise wrong(f"outputs differ by {gap:.2g} of their magnitude")
    before = _count(masked, reference.whole) if macs is None else macs
    if not any(t.numel() for t in found):
        note = "not verified: the network's outputs on the example inputs are empty, so nothing was compared"
        return Verification(None, reference.tolerance, reference.dtype, (before, after), note)
    note = reference.note if gap > TOLERANCE or reference.precision.dtype != torch.float64 else ""
    return Verification(gap, reference.tolerance, reference.dtype, (before, after), note)


def cuttable(
    masked: nn.Module, inputs: ExampleInputs, selection: Selection, attribute: Follow = lambda selection: ()
) -> tuple[Selection, dict[str, str]]:
    """The part of a selection that can be cut, and what happens when each other group is.

    Groups that stand at the same place of modules of one class share their code, so when one of them can't be cut,
    the others are only tried together, in halves. Groups that can only be cut together, such as a stream and the heads
    that its width is divided into, are found as a stream with all that it feeds.

    Args:
        masked: the uncut network in which the dropped columns of the whole selection are zero.
        inputs: what it is called with.
        selection: what should go.
        attribute: which attributes follow the cut of a part of the selection.
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
        if by_shapes(good) is None:  # then what shapes say of those that are settled is not all
            settled = set()
        culprit = _first_bad(masked, reference, Selection(tuple(good), ()), attribute, len(settled))
        # Where shapes tell, nothing is computed until no more of them fail.
        tried = by_shapes if by_shapes(good) else trouble
        alone = tried([culprit])
        bad[culprit.group.name] = alone or why
        good = [choice for choice in good if choice is not culprit]
        kind = _kind(culprit, modules)
        suspects = [c for c in good if _kind(c, modules) == kind and c.group.name not in settled]
        if alone is None or not suspects or tried(suspects) is None:
            continue
        guilty = _guilty_halves(suspects, tried)
        bad |= {choice.group.name: alone for choice in guilty}
        good = [choice for choice in good if choice not in guilty]
    names = {choice.group.name for choice in good}
    return Selection(tuple(c for c in selection.choices if c.group.name in names), selection.left), bad


def _settled_by_shapes(good: Sequence[Choice], by_shapes: Callable[[Sequence[Choice]], str | None]) -> set[str]:
    """The groups of those families that shapes allow to be cut, where they do not allow all groups."""
    if not by_shapes(good):
        return set()
    fine = [choice for family in _families(good) if by_shapes(family) is None for choice in family]
    return {choice.group.name for choice in fine} if fine and by_shapes(fine) is None else set()


def _kind(choice: Choice, modules: Mapping[str, nn.Module]) -> tuple[Any, ...]:
    """The classes of the modules that a group lies in, and its name there: groups alike fail alike."""
    parent, _, name = choice.group.name.rpartition(".")
    above = parent.rpartition(".")[0]
    return type(modules.get(above)), type(modules.get(parent)), name


def _guilty_halves(suspects: Sequence[Choice], tried: Callable[[Sequence[Choice]], str | None]) -> list[Choice]:
    """The choices of those halves that can't be cut."""
    half = len(suspects) // 2
    pieces = [piece for piece in (suspects[:half], suspects[half:]) if piece]
    return [choice for piece in pieces if tried(piece) is not None for choice in piece]


def _families(choices: Sequence[Choice]) -> list[list[Choice]]:
    """Each stream with the groups whose layers read it or write it; and all that belong to no stream."""
    coupled = [choice for choice in choices if _is_stream(choice)]
    # Heads are coupled where a layer of their own makes what is added to their scores, but all they feed is a stream.
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
    """Which attributes of a model follow the cut of a selection."""
    return lambda part: plan_attributes(model, graph, part)


def without_trouble(masked: nn.Module, inputs: ExampleInputs, graph: Graph, selection: Selection) -> Selection:
    """The selection without the groups that can't be cut, which are left whole by name.

    Raises:
        VerificationError: none of them can be cut.
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
    """What the masked network makes of some inputs in a precision that it runs in.

    Attributes:
        inputs: the inputs in that precision.
        outputs: the masked network's.
        kept: which channels stay at its layer norms.
        whole: the example inputs as they are, on which the cut network must run as well.
        thinned: whether ``inputs`` are images with fewer pixels than those.
        outline: the masked network without numbers.
        precision: what both networks are run in.
        tolerance: how much their outputs may differ.
        dtype: the precision's name.
        why: why it is not float64, as far as that is known.
    """

    inputs: ExampleInputs
    outputs: list[Tensor]
    kept: NormMasks
    whole: ExampleInputs
    thinned: bool
    outline: _Outline
    precision: _Precision
    tolerance: float
    dtype: str
    why: str = ""

    @property
    def note(self) -> str:
        """What the user should know of the precision."""
        text = f"verified in {self.dtype}, to {self.tolerance:.1e}"
        return f"{text}: the network does not run in float64 ({self.why})" if self.why else text


class _Outline:
    """A network of which only the shapes are left; made when it is first asked for."""

    def __init__(self, model: nn.Module, inputs: ExampleInputs) -> None:
        self._model, self._inputs = model, inputs

    @cached_property
    def _made(self) -> tuple[nn.Module, ExampleInputs, list[torch.Size]] | None:
        """The network and its inputs on the meta device, and the shapes of its outputs; None where it can't run."""
        nothing = {name: tensor.detach().to("meta") for name, tensor in tensors_of(self._model).items()}
        ghost = copy_model(self._model, replacements_by_id(self._model, nothing)).eval()
        inputs = self._inputs.to(torch.device("meta"))
        try:
            return ghost, inputs, _shapes(ghost, inputs)
        except InputError:
            return None

    def trouble(self, part: Selection, attribute: Follow) -> str | None:
        """Why shapes do not allow this part of the groups to be cut; None where they do."""
        if self._made is None:
            return None
        ghost, inputs, expected = self._made
        try:
            found = _shapes(cut_copy(ghost, plan_cuts(part), attribute(part)), inputs)
        except LbylError as error:
            return said(error)
        return None if found == expected else f"outputs of shapes {found} instead of {expected}"


def _shapes(model: nn.Module, inputs: ExampleInputs) -> list[torch.Size]:
    with undisturbed(model), plain_attention():
        return [tensor.shape for tensor in outputs(model, inputs)]


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
    """The same in one precision, or why it does not run in it."""
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
    outline = _Outline(masked, whole)

    def reference(made: ExampleInputs, expected: list[Tensor]) -> _Reference:
        tolerance, dtype = precision.tolerance(masked), precision.dtype or _own_dtype(masked)
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.float64 and precision.mode.narrower:
            name += f", with {precision.mode.narrowest} inside"
        return _Reference(made, expected, kept, whole, made is not full, outline, precision, tolerance, name)

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


def _count(model: nn.Module, inputs: ExampleInputs) -> int:
    with undisturbed(model):
        return macs_by_shapes(model, inputs)


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if _has_fraction(t))


def _trouble(masked: nn.Module, reference: _Reference, part: Selection, attribute: Follow) -> str | None:
    """What goes wrong when this part of the groups is cut out of the masked network; None where nothing does."""
    try:
        cuts = plan_cuts(part)
        smaller = cut_copy(masked, cuts, attribute(part))
        # Layer norms over channels of the groups that are only masked go on without these.
        kept = still_masked(reference.kept, part)
        gap = difference(reference.outputs, _wide_outputs(smaller, reference.inputs, reference.precision, kept))
        if gap <= reference.tolerance and reference.thinned:
            _count(smaller, reference.whole)
    except LbylError as error:
        return said(error)
    return None if gap <= reference.tolerance else f"outputs differ by {gap:.2g} of their magnitude"


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
        f"group {group!r}: the cut network is not the masked one ({what}). "
        f"Leave the group out with ratio={{'*': ..., {group!r}: 0}}."
    )
