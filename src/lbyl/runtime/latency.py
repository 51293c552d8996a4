"""Measures how long a model takes on this machine, as a whole and layer by layer.

Hooks read the time, and are removed afterwards. Several models are measured in turns (A B A B ...), so that
disturbances of the machine affect all of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lbyl.errors import InputError
from lbyl.runtime.contexts import plain_attention, undisturbed
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.inputs import ExampleInputs, outputs
from lbyl.runtime.intercept import module_hooks
from lbyl.runtime.macs import MacCounter
from lbyl.runtime.progress import Progress
from lbyl.runtime.registry import make

TORCH, ONNXRUNTIME = "torch", "onnxruntime"
RUNTIMES = (TORCH, ONNXRUNTIME)
RUNS = 20
LEAST_RUNS = 3
WARM_UP = 3


@dataclass(frozen=True)
class Runs:
    """Measurements from several runs: seconds, or ratios of seconds.

    >>> runs = Runs((1.0, 2.0, 3.0, 4.0, 9.0))
    >>> runs.median, runs.quartiles, runs.spread, round(runs.margin, 2)
    (3.0, (2.0, 4.0), 2.0, 1.4)
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, which a few disturbed runs do not change."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """The interquartile range."""
        low, high = self.quartiles
        return high - low

    @property
    def margin(self) -> float:
        """Margin of error of the median at about 95% (McGill et al. 1978): 1.57 * spread / sqrt(number of runs)."""
        return 1.57 * self.spread / math.sqrt(len(self.values))

    def over(self, other: Runs) -> Runs:
        """The ratios to other runs, one by one, so that disturbances of both cancel."""
        pairs = zip(self.values, other.values, strict=True)
        return Runs(tuple(a / b if b else 1.0 for a, b in pairs))

    def to_dict(self) -> dict[str, Any]:
        """Median, its margin, quartiles and the single runs."""
        quartiles = list(self.quartiles)
        return {"median": self.median, "margin": self.margin, "quartiles": quartiles, "runs": list(self.values)}


@dataclass(frozen=True)
class LayerLatency:
    """The latency of one layer: a module that holds parameters, without the time of such modules inside it.

    Attributes:
        name: the module's name.
        kind: its class.
        seconds: seconds of each run, summed over all calls of the layer.
        macs: multiply-accumulates of one run.
    """

    name: str
    kind: str
    seconds: Runs
    macs: int


@dataclass(frozen=True)
class Latency:
    """The latency of one model.

    Attributes:
        seconds: seconds of the whole model, in runs without hooks.
        layers: the layers, in the order in which they first end. Hooks turn off the fused path of torch's own
            transformer layers, so there the layers may add up to more than the whole.
        rest: seconds outside of layers (activations, sums, pooling), in the runs with hooks.
        macs: multiply-accumulates of one run.
        device: the device of the model.
        threads: number of threads that PyTorch uses within one operation.
    """

    seconds: Runs
    layers: tuple[LayerLatency, ...]
    rest: Runs
    macs: int
    device: str
    threads: int


def measure_latencies(
    models: Sequence[nn.Module],
    inputs: ExampleInputs,
    *,
    runs: int = RUNS,
    warm_up: int = WARM_UP,
    progress: Progress | None = None,
) -> tuple[Latency, ...]:
    """Measure several models in turns, as a whole and layer by layer, in evaluation mode.

    Args:
        models: the models, on the device where they are to be measured; none of them is changed.
        inputs: the inputs of all models, on the same device.
        runs: how often each model is timed, at least 3.
        warm_up: how often each model runs before it is timed.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        InputError: there are too few runs, or a model does not run on the inputs.
    """
    check_runs(runs)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(undisturbed(model))
        # Counting comes first, so that a model that does not run fails before anything is timed.
        counted, inputs = [_macs(model, inputs.cloned()) for model in models], inputs.cloned()
        for _ in range(warm_up):
            for model in models:
                outputs(model, inputs, given_away=True)
        whole: list[list[float]] = [[] for _ in models]
        apart: list[list[tuple[float, Mapping[str, float]]]] = [[] for _ in models]
        clocks = [clock_of(model, inputs) for model in models]
        for done in range(runs):
            for index, model in enumerate(models):
                whole[index].append(_timed(partial(outputs, model, inputs, True), clocks[index]))
            for index, model in enumerate(models):
                apart[index].append(_attributed(model, inputs, clocks[index]))
            if progress:
                progress("measuring latency", done + 1, runs)
    return tuple(
        _latency(model, inputs, seconds, layers, macs)
        for model, seconds, layers, macs in zip(models, whole, apart, counted, strict=True)
    )


def measure_modules(
    model: nn.Module, inputs: ExampleInputs, names: Iterable[str], *, runs: int = RUNS
) -> dict[str, float]:
    """The share of each module, with all that it holds, in the time of a run of the model: the median over the runs.

    A module that is called several times gets the sum of its calls.
    """
    check_runs(runs)
    modules = {name: model.get_submodule(name) for name in names}
    inputs, read = inputs.cloned(), clock_of(model, inputs)
    spent: dict[str, float] = {}
    begun: list[float] = []

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        begun.append(read())

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        spent[name] += read() - begun.pop()

    found: list[dict[str, float]] = []
    with undisturbed(model), module_hooks(modules, enter, leave, leave_first=True):
        for _ in range(WARM_UP + runs):
            spent = dict.fromkeys(modules, 0.0)
            total = _timed(partial(outputs, model, inputs, True), read)
            found.append({name: seconds / total for name, seconds in spent.items()})
    return {name: statistics.median(each[name] for each in found[WARM_UP:]) for name in modules}


def check_runtime(runtime: object) -> None:
    """Raise InputError for a runtime that is not known, or that is not installed."""
    if runtime not in RUNTIMES:
        raise InputError(f"runtime={runtime!r}: choose one of {', '.join(map(repr, RUNTIMES))}")
    if runtime == ONNXRUNTIME:
        make("format", "onnx").check_available()


def measure_whole(
    models: Sequence[nn.Module],
    inputs: ExampleInputs,
    *,
    runs: int = RUNS,
    warm_up: int = WARM_UP,
    runtime: str = TORCH,
    known: dict[int, Callable[[], Any]] | None = None,
) -> tuple[Runs, ...]:
    """Measure several whole models in turns, in seconds; see :func:`measure_latencies`.

    ``known`` holds the onnxruntime sessions of models by their ids; the first model's is added to it.
    """
    check_runs(runs)
    if runtime == ONNXRUNTIME:
        kind, ready = make("format", "onnx"), {} if known is None else known
        if id(models[0]) not in ready:
            ready[id(models[0])] = kind.runner(models[0], inputs)
        calls = [ready[id(models[0])], *(kind.runner(model, inputs) for model in models[1:])]
        return interleaved(calls, [time.perf_counter] * len(calls), runs, warm_up)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(undisturbed(model))
        inputs = inputs.cloned()
        calls = [partial(outputs, model, inputs, True) for model in models]
        return interleaved(calls, [clock_of(model, inputs) for model in models], runs, warm_up)


def interleaved(
    calls: Sequence[Callable[[], Any]], clocks: Sequence[Callable[[], float]], runs: int, warm_up: int = WARM_UP
) -> tuple[Runs, ...]:
    """Time several calls in turns (A B A B ...), in seconds.

    Args:
        calls: the calls.
        clocks: for each call, a function that returns the time in seconds.
        runs: how often each call is timed.
        warm_up: how often each call runs before it is timed.
    """
    for _ in range(warm_up):
        for call in calls:
            call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        for taken, call, clock in zip(seconds, calls, clocks, strict=True):
            taken.append(_timed(call, clock))
    return tuple(Runs(tuple(taken)) for taken in seconds)


def clock_of(model: nn.Module, inputs: ExampleInputs) -> Callable[[], float]:
    """A clock that waits until the model's devices are done, and then returns the time in seconds."""
    devices = {tensor.device for tensor in (*tensors_of(model).values(), *inputs.tensors())}
    waiting = [wait for device in devices for wait in waits(device)]

    def now() -> float:
        for wait in waiting:
            wait()
        return time.perf_counter()

    return now


def waits(device: torch.device) -> tuple[Callable[[], Any], ...]:
    """Functions that wait until a device is done; none for a CPU, whose calls return when they are done."""
    if device.type == "cuda":
        return (partial(torch.cuda.synchronize, device),)
    return () if device.type == "cpu" else (torch.get_device_module(device).synchronize,)


def check_runs(runs: int) -> None:
    """Raise InputError if there are too few runs to compute a spread."""
    if not isinstance(runs, int) or runs < LEAST_RUNS:
        raise InputError(f"runs={runs!r}: a spread needs at least {LEAST_RUNS} runs")


def _timed(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    started = clock()
    call()
    return clock() - started


def _attributed(
    model: nn.Module, inputs: ExampleInputs, read: Callable[[], float]
) -> tuple[float, Mapping[str, float]]:
    """The increase of a clock or a counter in one run: in total, and in each layer's own code."""
    spent: dict[str, float] = defaultdict(float)
    running: list[list[float]] = []  # for each running layer: the reading at its start, the increase in inner layers

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        running.append([read(), 0.0])

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        started, inside = running.pop()
        taken = read() - started
        spent[name] += taken - inside
        if running:
            running[-1][1] += taken

    # Innermost, so that the time of the user's own hooks is not counted.
    with module_hooks(_layers_of(model), enter, leave, leave_first=True):
        started = read()
        outputs(model, inputs, given_away=True)
        return read() - started, dict(spent)


def _layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold parameters, except the model itself, which would take the rest of the time."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and any(parameter is not None for parameter in module._parameters.values())
    }


def _macs(model: nn.Module, inputs: ExampleInputs) -> tuple[int, Mapping[str, float]]:
    with plain_attention(), MacCounter() as counter:
        total, layers = _attributed(model, inputs, lambda: float(counter.total))
    return int(total), layers


def _latency(
    model: nn.Module,
    inputs: ExampleInputs,
    seconds: Sequence[float],
    apart: Sequence[tuple[float, Mapping[str, float]]],
    counted: tuple[int, Mapping[str, float]],
) -> Latency:
    total, macs = counted
    layers = tuple(
        LayerLatency(
            name,
            type(model.get_submodule(name)).__name__,
            Runs(tuple(spent.get(name, 0.0) for _, spent in apart)),
            int(count),
        )
        for name, count in macs.items()
    )
    rest = Runs(tuple(max(0.0, taken - sum(spent.values())) for taken, spent in apart))
    tensors = [*tensors_of(model).values(), *inputs.tensors()]
    return Latency(Runs(tuple(seconds)), layers, rest, total, str(tensors[0].device), torch.get_num_threads())
