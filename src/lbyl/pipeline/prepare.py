"""Checks and traces a model, which is the first step of `compress`, `inspect` and `sweep`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lbyl.errors import (
    ArtifactError,
    InputError,
    LbylError,
    RestorationError,
    SurgeryError,
    TraceError,
    VerificationError,
    first_line,
)
from lbyl.graph import Graph, trace
from lbyl.graph.computed_weights import Fold, fold_computed
from lbyl.graph.submodules import Submodule, submodule_of, traceable_submodules
from lbyl.io.network_files import check_network
from lbyl.moments.base import Probes
from lbyl.pipeline.forecast import Forecaster
from lbyl.pipeline.parts_data import on_parts
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Inputs
from lbyl.restore.base import Restorer
from lbyl.restore.registry import fallbacks
from lbyl.runtime.checks import check_module
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import shape_and_dtype, tensors_of, unwrapped
from lbyl.runtime.inputs import HUGE, ExampleInputs, outputs
from lbyl.runtime.memory import ROOM, reused_memory
from lbyl.runtime.progress import Clock, Progress
from lbyl.selection.criteria.base import Criterion, SeeingCriterion, needs_probes
from lbyl.surgery.coupling import with_coupled_heads

Made = TypeVar("Made")


@dataclass(frozen=True)
class Traced:
    """A model with its graph, or else the graphs of its traceable submodules and the reasons for the others."""

    model: nn.Module
    graph: Graph | None
    folds: tuple[Fold, ...] = ()
    parts: tuple[Submodule, ...] = ()
    untraced: tuple[tuple[str, str], ...] = ()
    why: str = ""


def trace_model(model: nn.Module, inputs: ExampleInputs, strict: bool, submodule: str | None) -> Traced:
    """Trace a model, or else those of its submodules that can be traced.

    Heads that can only be cut together with what they read are coupled with it.
    """
    found = _traced(model, inputs, strict, submodule)
    graph = None if found.graph is None else with_coupled_heads(found.model, inputs, found.graph)
    parts = tuple(
        replace(part, graph=with_coupled_heads(model.get_submodule(part.path), part.inputs, part.graph))
        for part in found.parts
    )
    return replace(found, graph=graph, parts=parts)


def _traced(model: nn.Module, inputs: ExampleInputs, strict: bool, submodule: str | None) -> Traced:
    if submodule is not None:
        return Traced(model, None, parts=(submodule_of(model, inputs, submodule),))
    try:
        with undisturbed(model):
            graph = trace(model, inputs, follow=not strict)
    except TraceError as error:
        if strict:
            raise
        try:
            parts, untraced = traceable_submodules(model, inputs)
        except InputError:  # the model does not run; the trace's error is clearer
            raise error from None
        if not parts:
            raise
        return Traced(model, None, (), tuple(parts), tuple(untraced.items()), f"{error} Only its parts were traced.")
    if not graph.computed:
        return Traced(model, graph)
    plain, folds = fold_computed(model, inputs, graph.computed)
    if folds:
        with undisturbed(plain):
            graph = trace(plain, inputs)
    return Traced(plain, graph, folds)


@dataclass(frozen=True)
class Subject:
    """A module that is compressed separately: a model that was traced as a whole, or a submodule of one that was not.

    Attributes:
        path: path of the submodule; "" for a whole model.
        model: the module.
        inputs: its inputs.
        graph: its channel graph.
        restorer: its restorer.
        criterion: its criterion.
        why: notes that say why "auto" chose the restorer.
        scored: a note that says which criterion "auto" chose; "" if the user chose it.
    """

    path: str
    model: nn.Module
    inputs: ExampleInputs
    graph: Graph
    restorer: Restorer
    criterion: Criterion | SeeingCriterion
    why: tuple[str, ...] = ()
    scored: str = ""

    @staticmethod
    def of(path: str, model: nn.Module, inputs: ExampleInputs, graph: Graph, request: CompressionRequest) -> Subject:
        """A traced module with the requested restorer and criterion, or with the best ones for it."""
        restorer, why = request.restorer(model, inputs)
        criterion, scored = request.scoring(model, inputs, restorer)
        return Subject(path, model, inputs, graph, restorer, criterion, (why,) if why else (), scored)

    @property
    def may_probe(self) -> bool:
        """Whether the restorer or the criterion runs the network on probes."""
        return self.restorer.takes_probes or needs_probes(self.criterion)

    def attempts(self, request: CompressionRequest) -> Iterator[Subject]:
        """The subject with each restorer to try in turn: only the requested one, if one was requested."""
        yield self
        if request.restore is None:
            for restorer in fallbacks(self.restorer):
                criterion, scored = request.scoring(self.model, self.inputs, restorer)
                yield replace(self, restorer=restorer, criterion=criterion, scored=scored)


@contextmanager
def restoring(restorer: Restorer, model: nn.Module) -> Iterator[None]:
    """Turn any exception of a restorer into one clear error; memory is used again, as its settings allow.

    Raises:
        RestorationError: the restorer failed; the error says what went wrong, and what to do.
    """
    try:
        with reused_memory(model, _memory(restorer)):
            yield
    except (VerificationError, SurgeryError, RestorationError, ArtifactError):
        raise
    except Exception as error:  # a user's model may raise anything on inputs that it was not made for
        why = first_line(error)
        own = isinstance(error, LbylError)
        name, moments = _named(restorer)
        whence = f" with moments from {moments}" if moments else ""
        text = why if own else f"{name} can't restore this network{whence}: {why}{_ADVICE}"
        raise RestorationError(text) from error


def _memory(restorer: Restorer) -> int:
    """Bytes that activations may take while restoring and while making probes; 0 if the restorer runs no network."""
    settings = restorer.settings
    if not restorer.runs_network:
        return 0
    return min(getattr(each, "memory", ROOM) for each in (settings, getattr(settings, "moments", None)))


_ADVICE = ". restore='lbyl' only needs the weights"


def _named(restorer: Restorer) -> tuple[str, str]:
    """The name of a restorer, and that of its source of moments ("" for none)."""
    moments = getattr(restorer.settings, "moments", None)
    undreamed = "(steps=0)" if getattr(moments, "steps", None) == 0 else ""
    return type(restorer.settings).__name__, "" if moments is None else f"{type(moments).__name__}{undreamed}"


def first_that_restores(
    subject: Subject, request: CompressionRequest, work: Callable[[Subject], Made]
) -> tuple[Subject, Made]:
    """The result of the first restorer that works for this network, and the subject with that restorer.

    Raises:
        RestorationError: no restorer works, or the requested one does not.
    """
    failed: list[str] = []
    for attempt in subject.attempts(request):
        if failed:
            name, moments = _named(attempt.restorer)
            used = f"{name} with moments from {moments}" if moments else name
            told = f"{failed[-1].removesuffix(_ADVICE)}; {used} was used instead"
            attempt = replace(attempt, why=(*subject.why, told))
        try:
            return attempt, work(attempt)
        except RestorationError as error:
            if request.restore is not None:
                raise
            failed.append(str(error))
    raise RestorationError(failed[-1])


def first_probes(
    model: nn.Module,
    inputs: ExampleInputs,
    restorers: Iterable[Restorer],
    seed: int,
    progress: Progress | None,
) -> tuple[Restorer, Probes]:
    """The first of these restorers on whose probes the network runs, and its probes.

    Raises:
        RestorationError: it runs on none; the error of the first restorer.
    """
    failed: list[RestorationError] = []
    for restorer in restorers:
        if not restorer.takes_probes:
            continue
        try:
            with restoring(restorer, model):
                return restorer, restorer.make_probes(model, inputs, seed, progress)
        except RestorationError as error:
            failed.append(error)
    raise failed[0]


def unless_refused(work: Callable[[], Made]) -> Made | LbylError:
    """The result of some work, or the error if this network and these settings do not allow it."""
    try:
        return work()
    except (InputError, VerificationError, SurgeryError) as error:
        return error


@dataclass(frozen=True)
class Prepared:
    """A checked and traced model, its inputs, and a forecaster if forecasts are wanted."""

    model: nn.Module
    inputs: ExampleInputs
    traced: Traced
    subjects: tuple[Subject, ...]
    forecaster: Forecaster | None = None


def prepare(
    model: nn.Module, example_inputs: Inputs, request: CompressionRequest, submodule: str | None, clock: Clock
) -> Prepared:
    """Check and trace a model. For arguments and errors see `compress`."""
    model = plain_module(model)
    inputs = ExampleInputs.of(example_inputs)
    check_weights(model)
    check_device(model, inputs)
    check_values(inputs)
    check_network(model, inputs)
    _check_precision(model, inputs)
    told: tuple[str, ...] = ()
    with undisturbed(model):
        floats = inputs.with_float_images(model)
    if floats is not None:
        inputs, told = floats, ("bytes of images are given as floats, from which the network computes the same",)
    with clock("trace"):
        traced = trace_model(model, inputs, request.strict, submodule)
    if traced.graph is not None:
        found = [("", traced.model, inputs, traced.graph)]
    else:
        found = [(part.path, model.get_submodule(part.path), part.inputs, part.graph) for part in traced.parts]
    subjects = tuple(Subject.of(*each, request) for each in found)
    subjects = tuple(replace(subject, why=(*told, *subject.why)) for subject in subjects)
    if traced.graph is None:
        seen = on_parts({each.path: each.restorer for each in subjects}, model, inputs)
        subjects = tuple(replace(subject, restorer=seen[subject.path]) for subject in subjects)
    if traced.graph is not None and (request.forecast or subjects[0].may_probe):
        # Only probes have other batch sizes than the example inputs.
        with undisturbed(traced.model):
            inputs = inputs.with_rows(traced.model)
        subjects = tuple(replace(subject, inputs=inputs) for subject in subjects)
    forecaster = Forecaster(model, inputs, request.seed, request.progress) if request.forecast else None
    return Prepared(model, inputs, traced, subjects, forecaster)


def plain_module(model: object) -> nn.Module:
    """The network without wrappers for training, such as DataParallel and torch.compile.

    Raises:
        InputError: it is not a module, or is one that can't be cut.
    """
    check_module(model)
    assert isinstance(model, nn.Module)
    model = unwrapped(model)
    for path, module in model.named_modules():
        if fault := _uncuttable(module):
            raise InputError(f"{repr(path) if path else 'the model'} is {fault}")
    return model


def _uncuttable(module: nn.Module) -> str:
    """Why a module can't be cut, and what to pass instead; "" if it can be cut."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module, which can't be cut; pass the nn.Module that was scripted or traced"
    if "eval" in vars(module):  # torch.export replaces the method by one that raises an error
        return (
            "the module of an exported program, whose mode can't be set; pass the nn.Module that was exported, or "
            "lbyl.load_source('model.pt2') after torch.export.save(program, 'model.pt2')"
        )
    own = (*module._parameters.values(), *module._buffers.values())
    if any(tensor is not None and is_lazy(tensor) for tensor in own):
        return "lazy: its width is not known yet; run the model once on the example inputs, then pass it"
    if any(tensor is not None and tensor.is_inference() for tensor in own):
        return "made inside torch.inference_mode(), where no copy of it can be changed; make or load it outside of that"
    place = type(module).__module__
    if place.startswith(_QUANTIZED) and not place.endswith(".stubs"):
        return "prepared for quantization or quantized; compress the float model first, then prepare the result"
    return ""


_QUANTIZED = ("torch.ao.quantization", "torch.ao.nn.qat", "torch.ao.nn.quantized", "torch.ao.nn.intrinsic.q")


def check_widths(model: nn.Module) -> None:
    """Raise InputError for a layer without inputs or outputs."""
    for name, tensor in tensors_of(model).items():
        is_weight = isinstance(tensor, nn.Parameter) and name.rpartition(".")[2] == "weight"
        if is_weight and tensor.dim() > 1 and not tensor.numel():
            raise InputError(f"{name} is {shape_and_dtype(tensor)}: there is nothing to cut in a width of zero")


def check_weights(model: nn.Module) -> None:
    """Raise InputError for weights and statistics that are not finite or too large, and for negative variances."""
    check_widths(model)
    buffers = dict(model.named_buffers())
    for name, tensor in tensors_of(model).items():
        if tensor.is_meta:
            raise InputError(f"{name} is on the meta device, where it has no values; {_how_to_load(model)}")
        if tensor.is_floating_point() and tensor.numel() and tensor.layout == torch.strided:
            check_weight(name, tensor.detach(), is_buffer=name in buffers)


def check_weight(name: str, tensor: torch.Tensor, is_buffer: bool = False) -> None:
    """Raise InputError for a weight or statistic that is not finite or too large, and for negative variances."""
    if type(tensor).__module__.startswith("torchao"):
        kind = type(tensor).__name__
        raise InputError(f"{name} is quantized (a {kind}); compress the float model first, then quantize the result")
    low, high = (float(value) for value in tensor.aminmax())
    is_statistic = name.rpartition(".")[2] in ("running_mean", "running_var")
    if math.isnan(low) or (not math.isfinite(high - low) and (not is_buffer or is_statistic)):
        # -inf is allowed in buffers, because attention masks use it.
        raise InputError(f"{name} holds NaN or infinity; lbyl can't restore from such weights")
    if name.endswith("running_var") and low < 0:
        raise InputError(f"{name} holds {low:.3g}, but a variance can't be negative; load the right statistics")
    if not is_buffer and max(-low, high) > HUGE and tensor.dtype != torch.float64:
        raise InputError(
            f"{name} holds values as large as {max(-low, high):.1e}, whose squares are infinite in float32; "
            "lbyl can't restore from such weights"
        )


def _how_to_load(model: nn.Module) -> str:
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate has offloaded it: load the model with a device_map that offloads nothing, such as 'cpu'"
    return "load the weights first"


_WITHOUT_FLOAT64 = ("mps",)
"""Types of devices that can't compute in float64, in which sums, solutions and verification are."""


def check_device(model: nn.Module, inputs: ExampleInputs) -> None:
    """Raise InputError for a network or inputs on a device without float64."""
    tensors = (*tensors_of(model).values(), *inputs.tensors())
    found = next((tensor.device for tensor in tensors if tensor.device.type in _WITHOUT_FLOAT64), None)
    if found is not None:
        raise InputError(
            f"the network or its inputs are on {found}, which has no float64; move both to the CPU first "
            f"(model.cpu()), and then the smaller network back (result.model.to({str(found)!r}))"
        )


def _check_precision(model: nn.Module, inputs: ExampleInputs) -> None:
    """Raise InputError if inputs and weights differ in precision, and the model does not run on them for that.

    Tracing does not always see it, and verification runs everything in float64.
    """
    own = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    given = {tensor.dtype for tensor in inputs.tensors() if tensor.is_floating_point()}
    if len(own) > 1 or (own and given - own):
        try:
            with undisturbed(model):
                outputs(model, inputs)
        except InputError as error:
            if len(own) > 1:
                names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in own))
                raise InputError(f"{error}; the weights are {names}") from error
            name = str(own.pop()).removeprefix("torch.")
            raise InputError(f"{error}; the weights are {name}, so pass inputs of {name}") from error


def check_values(inputs: ExampleInputs) -> None:
    """Raise InputError for example inputs on which two networks can't be compared."""
    if inputs.has_faults():
        raise InputError(f"example_inputs hold NaN or infinity ({inputs.describe()})")
