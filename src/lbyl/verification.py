"""The cut network must compute what the masked one computes: checked in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbyl.errors import InputError, LbylError, VerificationError
from lbyl.graph import Graph
from lbyl.inputs import ExampleInputs, output_tensors
from lbyl.macs import MacCounter
from lbyl.modes import plain_attention, undisturbed
from lbyl.selection import Choice, Selection
from lbyl.surgery import Attribute, cut_copy, plan_attributes, plan_cuts

TOLERANCE = 1e-6

Follow = Callable[[Selection], Sequence[Attribute]]
"""Which attributes follow the cut of a selection."""


@dataclass(frozen=True)
class Verification:
    """The largest difference of any output, relative to that output's largest magnitude.

    ``macs`` are the multiply-accumulates of the two runs that were compared, before and after the cut.
    """

    difference: float
    tolerance: float
    dtype: str
    macs: tuple[int, int]


def outputs(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """The model's output tensors, detached.

    Raises:
        InputError: the model fails on these inputs.
    """
    try:
        with torch.no_grad():
            return [tensor.detach() for tensor in output_tensors(inputs.call(model))]
    except LbylError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the model does not run on the example inputs ({inputs.describe()}): {line}") from error


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """Each module's own tensors are float64 while it runs, so that no wide copy of the model is ever held."""
    held: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def widen(module: nn.Module, args: Any) -> None:
        tables = module._parameters, module._buffers
        held.append((dict(tables[0]), dict(tables[1])))
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and tensor.is_floating_point():
                    wide = tensor.detach().double()
                    table[name] = nn.Parameter(wide, False) if isinstance(tensor, nn.Parameter) else wide  # pyright: ignore[reportArgumentType]

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        parameters, buffers = held.pop()
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


def _wide_outputs(model: nn.Module, inputs: ExampleInputs) -> tuple[list[Tensor], int]:
    """The model's outputs in float64, and its multiply-accumulates; the model itself stays as it is."""
    try:
        with undisturbed(model), _widened(model), plain_attention(), MacCounter() as counter:
            return outputs(model, inputs), counter.total
    except InputError:
        # A module that uses the tensors of another one meets two precisions: there a whole copy is widened.
        with plain_attention(), MacCounter() as counter:
            return outputs(copy.deepcopy(model).double(), inputs), counter.total


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest absolute difference over largest magnitude, tensor by tensor; inf where shapes differ."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if not a.is_floating_point():
            continue
        gap = (a - b).abs().max() / a.abs().max().clamp_min(1e-300) if a.numel() else torch.zeros(())
        worst = max(worst, float(gap) if bool(torch.isfinite(gap)) else float("inf"))
    return worst


def verify(
    masked: nn.Module,
    smaller: nn.Module,
    inputs: ExampleInputs,
    selection: Selection,
    attribute: Follow = lambda selection: (),
) -> Verification:
    """Compare the cut network with the uncut one whose dropped columns are zero.

    ``attribute`` tells which attributes follow the cut of a part of the selection.

    Raises:
        VerificationError: the outputs differ; names the first group whose cut alone makes them differ.
        InputError: the outputs are not finite, so nothing can be compared.
    """
    wide, expected, before = _reference(masked, inputs)
    try:
        found, after = _wide_outputs(smaller, wide)
    except InputError as error:
        raise _error(_first_bad(masked, wide, selection, expected, attribute), str(error)) from error
    gap = difference(expected, found)
    if gap > TOLERANCE:
        what = f"outputs differ by {gap:.2g} of their magnitude"
        raise _error(_first_bad(masked, wide, selection, expected, attribute), what)
    return Verification(gap, TOLERANCE, "float64", (before, after))


def cuttable(
    masked: nn.Module, inputs: ExampleInputs, selection: Selection, attribute: Follow = lambda selection: ()
) -> tuple[Selection, dict[str, str]]:
    """The part of a selection that can be cut, and what happens when each other group is.

    Groups that stand at the same place of modules of one class share their code, so when one of them can't be cut,
    the others are only tried together, in halves.

    Args:
        masked: the uncut network in which the dropped columns of the whole selection are zero.
        inputs: what it is called with.
        selection: what should go.
        attribute: which attributes follow the cut of a part of the selection.
    """
    wide, expected, _ = _reference(masked, inputs)
    modules = dict(masked.named_modules())

    def trouble(choices: Sequence[Choice]) -> str | None:
        return _trouble(masked, wide, Selection(tuple(choices), ()), expected, attribute)

    def kind(choice: Choice) -> tuple[Any, ...]:
        parent, _, name = choice.group.name.rpartition(".")
        above = parent.rpartition(".")[0]
        return type(modules.get(above)), type(modules.get(parent)), name

    good, bad = list(selection.choices), dict[str, str]()
    while good and (why := trouble(good)) is not None:
        culprit = _first_bad(masked, wide, Selection(tuple(good), ()), expected, attribute)
        suspects = [choice for choice in good if kind(choice) == kind(culprit) and choice is not culprit]
        alone = trouble([culprit])
        bad[culprit.group.name] = alone or why
        good = [choice for choice in good if choice is not culprit]
        if alone is None or not suspects:
            continue
        rest = [choice for choice in good if choice not in suspects]
        half = len(suspects) // 2
        pieces = [p for p in (suspects[:half], suspects[half:]) if p]
        if trouble(suspects) is None:
            continue
        for piece in pieces:
            if trouble(piece) is None:
                rest += piece
            else:
                bad |= {choice.group.name: alone for choice in piece}
        good = [choice for choice in selection.choices if choice in rest]
    return Selection(tuple(good), selection.left), bad


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


def _reference(masked: nn.Module, inputs: ExampleInputs) -> tuple[ExampleInputs, list[Tensor], int]:
    """The inputs in float64, what the masked network makes of them, and with how many multiply-accumulates."""
    device = next((p.device for p in masked.parameters()), torch.device("cpu"))
    wide = inputs.to(device, torch.float64)
    expected, macs = _wide_outputs(masked, wide)
    if not all(bool(torch.isfinite(t).all()) for t in expected if t.is_floating_point()):
        raise InputError("the network's output on the example inputs is not finite (NaN or infinity in weights?)")
    return wide, expected, macs


def _trouble(
    masked: nn.Module, wide: ExampleInputs, part: Selection, expected: list[Tensor], attribute: Follow
) -> str | None:
    """What goes wrong when this part of the groups is cut out of the masked network; None where nothing does."""
    try:
        found, _ = _wide_outputs(cut_copy(masked, plan_cuts(part), attribute(part)), wide)
        gap = difference(expected, found)
    except LbylError as error:
        return str(error).rpartition("): ")[2] if isinstance(error, InputError) else str(error)
    return None if gap <= TOLERANCE else f"outputs differ by {gap:.2g} of their magnitude"


def _first_bad(
    masked: nn.Module, wide: ExampleInputs, selection: Selection, expected: list[Tensor], attribute: Follow
) -> Choice:
    """The first group that can't be cut, by halving: cutting a prefix of the groups works or fails."""
    low, high = 0, len(selection.choices)  # cutting `low` groups works, cutting `high` fails
    while high - low > 1:
        middle = (low + high) // 2
        works = _trouble(masked, wide, Selection(selection.choices[:middle], ()), expected, attribute) is None
        low, high = (middle, high) if works else (low, middle)
    return selection.choices[high - 1]


def _error(choice: Choice, what: str) -> VerificationError:
    group = choice.group.name
    return VerificationError(
        f"group {group!r}: the cut network is not the masked one ({what}). "
        f"Leave the group out with ratio={{'*': ..., {group!r}: 0}}."
    )
