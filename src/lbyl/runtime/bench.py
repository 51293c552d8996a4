"""`bench`: measures two models in turns and compares them layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lbyl.errors import visible
from lbyl.runtime.checks import check_module, check_number
from lbyl.runtime.contexts import own_settings
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.latency import (
    RUNS,
    TORCH,
    WARM_UP,
    LayerLatency,
    Runs,
    check_runtime,
    measure_latencies,
    measure_whole,
)
from lbyl.runtime.macs import count_macs
from lbyl.runtime.progress import Progress, cancelable

REST = "(no layer's)"
_FELL = 0.98
"""A layer was cut if it has less than this share of its multiply-accumulates left."""
_CLEAR = 0.15
"""A layer whose median time fell by this share counts as faster, however much its runs vary."""
_NAMED = 5


@dataclass(frozen=True)
class Change:
    """The time of a layer, or of the whole model, before and after.

    Attributes:
        name: the layer's name.
        kind: its class.
        before: seconds of each run of the first model; None where only the second one has the layer.
        after: seconds of each run of the second model; None where only the first one has it.
        macs: multiply-accumulates, before and after.
    """

    name: str
    kind: str
    before: Runs | None
    after: Runs | None
    macs: tuple[int, int]

    @property
    def ratio(self) -> Runs | None:
        """The ratio of the times after and before, run by run."""
        return self.after.over(self.before) if self.before and self.after else None

    @property
    def macs_ratio(self) -> float | None:
        """The ratio of the multiply-accumulates after and before; None where there were none before."""
        return self.macs[1] / self.macs[0] if self.macs[0] else None

    @property
    def no_speed(self) -> bool:
        """Whether it lost multiply-accumulates without becoming faster by more than the margin of the measurement."""
        ratio = self.ratio
        return ratio is not None and self.was_cut and ratio.median + min(ratio.margin, _CLEAR) >= 1

    @property
    def was_cut(self) -> bool:
        """Whether it lost at least 2% of its multiply-accumulates."""
        return 0 < self.macs[1] < _FELL * self.macs[0]

    def to_dict(self) -> dict[str, Any]:
        """Medians, quartiles and runs as plain data; times in seconds."""
        ratio = self.ratio
        return {
            "name": self.name,
            "kind": self.kind,
            "before": self.before and self.before.to_dict(),
            "after": self.after and self.after.to_dict(),
            "ratio": ratio and ratio.to_dict(),
            "macs": list(self.macs),
            "macs_ratio": self.macs_ratio,
            "no_speed": self.no_speed,
        }


@dataclass(frozen=True)
class Bench:
    """The latency of two models; print it with Rich, or read the fields.

    Attributes:
        whole: both models as a whole.
        layers: every layer that runs in either model, in the order of the first model.
        rest: the time outside of layers: activations, sums, pooling.
        device: the device on which they were measured, and the runtime if it is not PyTorch.
        threads: number of threads that PyTorch uses within one operation.
        runs: how often each model was timed.
    """

    whole: Change
    layers: tuple[Change, ...]
    rest: Change
    device: str
    threads: int
    runs: int

    @property
    def no_speed(self) -> tuple[Change, ...]:
        """The layers that were cut and did not become faster."""
        return tuple(layer for layer in self.layers if layer.no_speed)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data; times in seconds."""
        return {
            "device": self.device,
            "threads": self.threads,
            "runs": self.runs,
            "whole": self.whole.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "rest": self.rest.to_dict(),
            "no_speed": [layer.name for layer in self.no_speed],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=box.SIMPLE_HEAD, title="Latency in ms, median", title_justify="left")
        for name in ("layer", "before", "after", "ratio", "±", "MACs", ""):
            left = name in ("layer", "")
            table.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
        for row in (*self.layers, self.rest) if self.layers else ():
            table.add_row(*map(_shown, _cells(row)))
        table.add_section()
        table.add_row(*map(_shown, _cells(self.whole)))
        yield table
        yield from map(_shown, self.summary())

    def summary(self) -> list[str]:
        """Lines of text: the latency of the whole network, and the layers that did not become faster."""
        lines = [
            f"latency: {self.latency()}",
            f"measured on {self.place()}; ± is the margin of the median ratio",
        ]
        if self.whole.no_speed:
            lines.append("the network as a whole is no faster")
        if self.no_speed:
            lines.append(f"cut, but not faster: {self.without_speed()}")
        elif any(layer.was_cut for layer in self.layers):
            lines.append("every layer that lost multiply-accumulates is faster")
        return lines

    def latency(self) -> str:
        """The latency of the whole network as text: 12.0 ms → 6.2 ms (0.52 ± 0.01), MACs 0.50."""
        before, ratio = self.whole.before, self.whole.ratio
        assert before
        assert ratio
        share = f", MACs {self.whole.macs_ratio:.2f}" if self.whole.macs_ratio is not None else ""
        times = f"{_ms(before.median)} ms → {_ms(before.median * ratio.median)} ms"
        return f"{times} ({ratio.median:.2f} ± {ratio.margin:.2f}){share}"

    def place(self) -> str:
        """Where and how it was measured, as text: cpu with 2 threads, 20 runs of each in turns."""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return f"{self.device} with {threads}, {self.runs} runs of each in turns"

    def timing(self) -> Timing:
        """The result in the form that a report holds."""
        before, ratio = self.whole.before, self.whole.ratio
        assert before
        assert ratio
        after = before.median * ratio.median
        return Timing(before.median, after, ratio.median, ratio.margin, self.place(), self.without_speed())

    def without_speed(self) -> str:
        """The layers that were cut and did not become faster, as text, the slowest first."""
        slow = sorted(self.no_speed, key=lambda layer: -(layer.after.median if layer.after else 0.0))
        named = [
            f"{layer.name} (MACs {layer.macs_ratio:.0%}, time {layer.ratio.median:.0%})"
            for layer in slow[:_NAMED]
            if layer.ratio
        ]
        return ", ".join(named) + (f" and {len(slow) - _NAMED} more" if len(slow) > _NAMED else "")


@cancelable
@own_settings()
def bench(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | ExampleInputs,
    *,
    against: nn.Module,
    runs: int = RUNS,
    warm_up: int = WARM_UP,
    runtime: str = TORCH,
    progress: Progress | None = None,
) -> Bench:
    """Measure on this machine how much faster a compressed network is than the original.

    The two run in turns, in evaluation mode, so that disturbances of the machine affect both. Layers are matched
    by name. The time of a layer excludes layers that it calls.

    Args:
        model: the compressed network; it is not changed.
        example_inputs: the inputs of both: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        against: the unpruned network; it is not changed. The values of its weights do not matter.
        runs: how often each network is timed, at least 3.
        warm_up: how often each network runs before it is timed.
        runtime: "torch", or "onnxruntime", which runs both networks as ONNX files on the CPU. Then only whole networks
            are timed.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        InputError: too few runs, inputs that one of them does not run on, or a runtime that is not installed or can't
            run one of them.

    Examples:
        >>> import torch, lbyl
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> x = torch.randn(4, 8)
        >>> result = lbyl.compress(net, x, ratio=0.25)
        >>> found = lbyl.bench(result.model, x, against=net, runs=5)
        >>> [(layer.name, layer.macs) for layer in found.layers]
        [('0', (512, 384)), ('2', (128, 96))]
    """
    check_module(model)
    check_module(against, "against")
    check_number("warm_up={}", warm_up, whole=True, least=0)
    check_runtime(runtime)
    inputs = ExampleInputs.of(example_inputs)
    if runtime != TORCH:
        return _as_files(model, against, inputs, runs, warm_up, runtime)
    before, after = measure_latencies((against, model), inputs, runs=runs, warm_up=warm_up, progress=progress)
    first, second = ({layer.name: layer for layer in found.layers} for found in (before, after))
    return Bench(
        Change("whole", type(model).__name__, before.seconds, after.seconds, (before.macs, after.macs)),
        tuple(_change(first.get(name), second.get(name)) for name in {**first, **second}),
        Change(REST, "", before.rest, after.rest, (0, 0)),
        before.device,
        before.threads,
        runs,
    )


def _as_files(
    model: nn.Module, against: nn.Module, inputs: ExampleInputs, runs: int, warm_up: int, runtime: str
) -> Bench:
    """Both networks as a whole, in another runtime than PyTorch."""
    macs = tuple(count_macs(network, inputs) for network in (against, model))
    before, after = measure_whole((against, model), inputs, runs=runs, warm_up=warm_up, runtime=runtime)
    whole = Change("whole", type(model).__name__, before, after, (macs[0], macs[1]))
    nothing = Change(REST, "", None, None, (0, 0))
    return Bench(whole, (), nothing, f"cpu in {runtime}", torch.get_num_threads(), runs)


def _change(before: LayerLatency | None, after: LayerLatency | None) -> Change:
    one = before or after
    assert one
    macs = (before.macs if before else 0, after.macs if after else 0)
    return Change(one.name, one.kind, before and before.seconds, after and after.seconds, macs)


def _cells(change: Change) -> tuple[str, ...]:
    ratio, before, after = change.ratio, change.before, change.after
    # What the ratio of runs that were next to each other leaves: the ratio of two medians may be another.
    left = before.median * ratio.median if before and ratio else after and after.median
    return (
        change.name,
        _ms(before and before.median),
        _ms(left),
        f"{ratio.median:.2f}" if ratio else "–",
        f"{ratio.margin:.2f}" if ratio else "–",
        "–" if change.macs_ratio is None else f"{change.macs_ratio:.2f}",
        "not faster" if change.no_speed else "",
    )


def _shown(text: str) -> Text:
    return Text(visible(" ".join(text.split())))


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.3f}"


@dataclass(frozen=True)
class Timing:
    """The latency of both networks, measured in turns; see :func:`lbyl.bench`.

    Attributes:
        before: median seconds of the unpruned network.
        after: seconds of the compressed network: ``before`` times ``ratio``.
        ratio: median of ``after / before``, run by run.
        margin: margin of error of the ratio, at about 95%.
        place: where and how it was measured, as text.
        no_speed: the layers that were cut and did not become faster, with figures, the slowest first; "" for none.
    """

    before: float
    after: float
    ratio: float
    margin: float
    place: str
    no_speed: str = ""

    def __str__(self) -> str:
        times = f"{1000 * self.before:.3g} ms → {1000 * self.after:.3g} ms"
        return f"{times} ({self.ratio:.0%} ± {self.margin:.0%})"
