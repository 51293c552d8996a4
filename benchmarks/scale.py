"""How cost grows with layers, width, channels, probes and points, and what 70 billion parameters would take.

    python benchmarks/scale.py

Decoders of transformers' Llama, with random weights, lose half of the neurons of every layer by least squares on random
tokens, all consumers at once. One size at a time grows from a base. The seconds of each stage are fitted by
``log t = c + sum over sizes of exponent * log(size)``; a network that is larger in every size is held out, and its
seconds are compared with what the fit predicts. The fit then gives the seconds of a decoder with the sizes of Llama 3
70B, beside what the largest products alone take at the speed at which this machine multiplies matrices. Needs no data.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from output import Run, Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lbyl

RATIO, LENGTH, REPEATS = 0.5, 128, 2
STAGES = ("trace", "probe", "select", "verify", "cut", "solve", "renorm")


@dataclass(frozen=True)
class Size:
    """The sizes of a decoder, and of its probes."""

    layers: int
    width: int
    channels: int
    tokens: int

    def model(self, vocabulary: int = 256, heads: int = 0, key_heads: int = 0) -> nn.Module:
        """A decoder of this size with random weights."""
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.width,
            intermediate_size=self.channels,
            num_hidden_layers=self.layers,
            num_attention_heads=heads or self.width // 32,
            num_key_value_heads=key_heads or self.width // 64,
            max_position_embeddings=2048,
            use_cache=False,
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


AXES = ("layers", "width", "channels", "tokens")
BASE = Size(4, 256, 1024, 4096)
GROWN = {"layers": (8, 16), "width": (384, 512), "channels": (2048, 4096), "tokens": (8192, 16384)}
HELD_OUT = Size(8, 384, 2048, 8192)
TARGET, TARGET_NAME = Size(80, 8192, 28672, 65536), "70 billion parameters"
POINTS = (1, 2, 4, 8)


def inputs(tokens: int) -> list[dict[str, torch.Tensor]]:
    """Batches of four sequences of random tokens."""
    drawn = torch.randint(256, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part} for part in drawn.split(4)]


def restorer(batches: list[dict[str, torch.Tensor]]) -> lbyl.LeastSquares:
    """Least squares on these batches, all consumers at once."""
    return lbyl.LeastSquares(moments=lbyl.Data(batches, batches=len(batches)), sequential=False)


def measure(size: Size) -> dict[str, float]:
    """Median seconds of each stage of a compression."""
    model, batches = size.model(), inputs(size.tokens)
    example = {"input_ids": batches[0]["input_ids"][:1]}
    found = [
        lbyl.compress(model, example, ratio={"*.mlp.*": RATIO}, restore=restorer(batches), forecast=False)
        for _ in range(REPEATS)
    ]
    stages = {stage: median(each.report.seconds.get(stage, 0.0) for each in found) for stage in STAGES}
    return {stage: round(seconds, 4) for stage, seconds in stages.items()}


def fitted(cells: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The constant and the exponents of each stage, by least squares on logarithms."""
    rows = torch.tensor([[1.0, *(math.log(cell[axis]) for axis in AXES)] for cell in cells], dtype=torch.float64)
    found = {}
    for stage in STAGES:
        logs = torch.tensor([math.log(max(cell["seconds"][stage], 1e-4)) for cell in cells], dtype=torch.float64)
        found[stage] = torch.linalg.lstsq(rows, logs[:, None]).solution.flatten().tolist()
    return found


def predicted(fit: dict[str, list[float]], size: Size) -> dict[str, float]:
    """Seconds of each stage at a size."""
    values = asdict(size)
    return {
        stage: math.exp(constant + sum(e * math.log(values[axis]) for e, axis in zip(exponents, AXES, strict=True)))
        for stage, (constant, *exponents) in fit.items()
    }


def speed() -> dict[str, float]:
    """Floating-point operations a second in products of matrices, by precision."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        a = torch.randn(1536, 1536, dtype=dtype)
        torch.mm(a, a)
        started = time.perf_counter()
        for _ in range(3):
            torch.mm(a, a)
        found[name] = 3 * 2 * 1536**3 / (time.perf_counter() - started)
    return found


def arithmetic(size: Size, parameters: int, rate: dict[str, float]) -> dict[str, float]:
    """Seconds of the largest products alone: one forward pass, products of channels, one solution a layer."""
    kept = size.channels * (1 - RATIO)
    solution = kept**3 / 3 + 2 * kept**2 * size.width
    return {
        "one forward pass": 2 * parameters * size.tokens / rate["float32"],
        "products of channels": 2 * size.layers * size.tokens * size.channels**2 / rate["float32"],
        "solutions": size.layers * solution / rate["float64"],
    }


def measure_points() -> list[dict[str, Any]]:
    """Seconds of a sweep over a number of points."""
    found = []
    for count in POINTS:
        model, batches = BASE.model(), inputs(BASE.tokens)
        budgets = [lbyl.Budget(params=0.9 - 0.05 * number) for number in range(count)]
        with tempfile.TemporaryDirectory() as place:
            started = time.perf_counter()
            example = {"input_ids": batches[0]["input_ids"][:1]}
            out = Path(place) / "points"
            swept = lbyl.sweep(model, example, budgets, out, restore=restorer(batches), forecast=False)
            seconds = time.perf_counter() - started
        found.append(
            {"kind": "points", "points": count, "made": len(swept.made), "seconds": {"all": round(seconds, 2)}}
        )
    return found


def hours(seconds: float) -> str:
    """Seconds as text."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 600 else f"{seconds:,.1f} s"


def tabulate(run: Run) -> None:
    """Measurements, exponents, and the large network."""
    cells = [cell for cell in run.measurements if cell["kind"] == "size"]
    (held,) = (cell for cell in run.measurements if cell["kind"] == "held out")
    points = [cell for cell in run.measurements if cell["kind"] == "points"]
    (target,) = (cell for cell in run.measurements if cell["kind"] == "target")
    fit = fitted(cells)
    measured = [[*(cell[axis] for axis in AXES), *(round(cell["seconds"][s], 2) for s in STAGES)] for cell in cells]
    exponents = [[stage, *(round(e, 2) for e in fit[stage][1:])] for stage in STAGES]
    guess, actual = sum(predicted(fit, size_of(held)).values()), sum(held["seconds"].values())
    first, last = points[0], points[-1]
    each = (last["seconds"]["all"] - first["seconds"]["all"]) / (last["points"] - first["points"])
    run.tables = [
        Table("Seconds by stage", [*AXES, *STAGES], measured, f"One thread, median of {REPEATS}."),
        Table(
            "Exponents",
            ["stage", *AXES],
            exponents,
            f"Fitted to the table above. Held out, with {size_text(held)}: {guess:.1f} s predicted, {actual:.1f} s "
            "measured. Where a stage takes hundredths of a second, its exponents are noise.",
        ),
        Table(
            "Points",
            ["points of a sweep", "seconds"],
            [[cell["points"], cell["seconds"]["all"]] for cell in points],
            f"{each:.2f} s for each further point, and {first['seconds']['all'] - each:.2f} s that all points share.",
        ),
        large(fit, target),
    ]


def large(fit: dict[str, list[float]], target: dict[str, Any]) -> Table:
    """What the large network would take."""
    stages = predicted(fit, size_of(target))
    products, parameters = target["arithmetic"], target["parameters"]
    gram = 8 * target["channels"] ** 2
    rows = [
        *([f"{stage}, extrapolated", hours(seconds)] for stage, seconds in stages.items()),
        ["all stages, extrapolated", hours(sum(stages.values()))],
        *([f"{name}, by arithmetic", hours(seconds)] for name, seconds in products.items()),
        ["weights in 16 bits", f"{2 * parameters / 1e9:,.0f} GB"],
        ["products of one layer's channels, float64", f"{gram / 1e9:,.1f} GB"],
        ["products of all layers' channels", f"{gram * target['layers'] / 1e9:,.0f} GB"],
    ]
    rate = target["rate"]
    note = (
        f"{parameters / 1e9:.1f} billion parameters: {size_text(target)}. Seconds are those of one thread, which "
        f"multiplies matrices at {rate['float32'] / 1e9:,.0f} GFLOP/s in float32 and {rate['float64'] / 1e9:,.0f} in "
        "float64. By arithmetic, the largest products alone take that long. Small networks spend much of their time on "
        "what grows slowly, so their exponents are too low for large ones: expect the larger of both figures, or more."
    )
    return Table(TARGET_NAME, ["", "takes"], rows, note)


def size_of(cell: dict[str, Any]) -> Size:
    """The size in a cell."""
    return Size(*(cell[axis] for axis in AXES))


def size_text(cell: dict[str, Any]) -> str:
    """The size in words."""
    return f"{cell['layers']} layers, width {cell['width']:,}, {cell['channels']:,} channels, {cell['tokens']:,} tokens"


def main() -> None:
    """Measure, fit, write."""
    torch.set_num_threads(1)
    run = Run("scale", "Scale", "python benchmarks/scale.py")
    run.settings = {"ratio": RATIO, "length": LENGTH}
    stamp = {"lbyl": version("lbyl")}
    measure(BASE)  # what is done once in a process is not measured
    sizes = [BASE, *(replace(BASE, **{axis: value}) for axis, values in GROWN.items() for value in values)]
    for kind, each in [*(("size", size) for size in sizes), ("held out", HELD_OUT)]:
        run.measurements.append({"kind": kind, **stamp, **asdict(each), "seconds": measure(each)})
        print(kind, each, run.measurements[-1]["seconds"], flush=True)
    run.measurements += [{**stamp, **cell} for cell in measure_points()]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in TARGET.model(128256, 64, 8).parameters())
    rate = speed()
    products = arithmetic(TARGET, parameters, rate)
    target = {"parameters": parameters, "rate": rate, "arithmetic": products}
    run.measurements.append({"kind": "target", **stamp, **asdict(TARGET), **target})
    run.save(tabulate)
    print(run.tables[1], run.tables[3], sep="\n")


if __name__ == "__main__":
    main()
