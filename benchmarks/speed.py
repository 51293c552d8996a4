"""How long restoration takes, and how much memory.

    python benchmarks/speed.py

1. One 512 -> 512 layer with 3x3 kernels and batch norm at 50 %: the closed form (one Cholesky for all dropped
   filters, effective filters included) against scikit-learn's ``Ridge`` filter by filter, in the same process. Must
   be at least 50 times as fast.
2. torchvision's ResNet-50 (random weights, random batch-norm statistics) at 50 % inside the blocks by ``LBYL()``,
   verification included, in a process of its own: under 60 s, and with a peak resident memory of less than 4 times
   the model's own bytes above what the process held right before the model was built (so the model itself counts
   once). torch.export loads Python code the first time it runs, which is no data of ours, so a tiny network is
   compressed before the measurement starts; the figure without that is written, too.

Needs no data. Exits with 1 where a bound is missed. Writes ``benchmarks/results/speed.json``.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from output import Cell, Run, Table
from peak import alone, size
from torch import nn

import lbyl
from lbyl.runtime.copying import tensors_of
from lbyl.selection.filters import describe

LEAST_SPEEDUP = 50.0
MOST_SECONDS = 60.0
MOST_MEMORY = 4.0
REPEATS = 5
RIDGE_BUDGET = 60.0
"""Seconds for the loop over filters; beyond them it stops, and the rest is extrapolated."""


def settle(net: nn.Module) -> nn.Module:
    """Random batch-norm statistics: fresh ones would make every effective filter trivial."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.eval()


def one_layer() -> dict[str, Any]:
    """Seconds of the closed form and of the loop, and how far their answers are apart."""
    from sklearn.linear_model import Ridge

    width, bn, ridge = 512, 1e-4, 1e-2  # the paper's form; scikit-learn has no constants
    restorer = lbyl.LBYL(bn, ridge)
    net = nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
    )
    settle(net)
    state, group = tensors_of(net), lbyl.inspect(net, torch.zeros(1, width, 4, 4)).graph.group("0")
    order = torch.randperm(width)
    keep, drop = order[: width // 2].sort().values, order[width // 2 :].sort().values
    seconds, matrix = [], torch.empty(0)
    with torch.no_grad():
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            matrix = restorer.deliver(describe(group, state), keep, drop, torch.Generator()).matrix
            seconds.append(time.perf_counter() - started)
    ours = median(seconds[1:])  # the first run warms up

    started = time.perf_counter()
    filters = describe(group, state)
    # The batch-norm error is one more equation for each filter, of weight sqrt(bn).
    rows = torch.cat([filters.weight, math.sqrt(bn) * filters.offset[:, None]], 1).numpy()
    inputs, targets = np.ascontiguousarray(rows[keep].T), rows[drop]
    solved = []
    for target in targets:
        solved.append(Ridge(alpha=ridge, fit_intercept=False).fit(inputs, target).coef_)
        if time.perf_counter() - started > RIDGE_BUDGET:
            break
    loop = (time.perf_counter() - started) * len(targets) / len(solved)
    started = time.perf_counter()
    Ridge(alpha=ridge, fit_intercept=False).fit(inputs, targets.T)
    together = time.perf_counter() - started
    gap = float(np.abs(matrix.numpy()[:, : len(solved)] - np.stack(solved, 1)).max())
    return {
        "closed_form_seconds": round(ours, 4),
        "ridge_seconds": round(loop, 2),
        "ridge_all_at_once_seconds": round(together, 3),
        "ridge_filters_solved": len(solved),
        "ridge_filters": len(targets),
        "ratio": round(loop / ours, 1),
        "largest_difference": gap,
    }


def whole_network(warm: bool) -> dict[str, Any]:
    """Seconds and memory of one compression; meant for a process that does nothing else."""
    from torchvision.models import resnet50

    if warm:
        tiny = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
        lbyl.compress(tiny.eval(), torch.zeros(1, 3, 8, 8), restore=lbyl.LBYL(), ratio=0.5, forecast=False)
    torch.manual_seed(0)
    process = psutil.Process()
    before, peak_before = process.memory_info().rss, _peak()
    net = settle(resnet50(weights=None))
    model = size(tensors_of(net).values())
    started = time.perf_counter()
    result = lbyl.compress(net, torch.randn(1, 3, 224, 224), restore=lbyl.LBYL(), ratio=0.5, forecast=False)
    seconds = time.perf_counter() - started
    peak = _peak()
    if peak <= peak_before:
        raise RuntimeError("the process was larger before the model was built; nothing can be said about its peak")
    return {
        "seconds": round(seconds, 1),
        "stages": {stage: round(value, 2) for stage, value in result.report.seconds.items()},
        "model_mib": round(model / 2**20, 1),
        "peak_mib": round((peak - before) / 2**20, 1),
        "ratio": round((peak - before) / model, 2),
        "parameters": result.report.parameters,
        "verified": result.report.verified,
    }


def _peak() -> int:
    """Largest resident set so far, in bytes; Linux counts in KiB, macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> int:
    """Measure, write, compare."""
    if "--whole" in sys.argv:
        print(json.dumps(whole_network("--cold" not in sys.argv)))
        return 0
    torch.manual_seed(0)
    run = Run("speed", "Time and memory", "python benchmarks/speed.py")
    layer, warm, cold = one_layer(), alone(__file__, "--whole"), alone(__file__, "--whole", "--cold")
    run.settings = {"restore": repr(lbyl.LBYL()), "ratio": 0.5, "repeats": REPEATS}
    run.measurements = [
        {"what": "layer", **layer},
        {"what": "resnet50", **warm},
        {"what": "resnet50, cold", **cold},
    ]

    rows: list[list[Cell]] = [
        [
            "one 512 → 512 layer, 3x3: scikit-learn's Ridge, filter by filter",
            f"{layer['ridge_seconds']:.2f} s",
            "",
        ],
        ["the same: closed form, effective filters included", f"{layer['closed_form_seconds']:.3f} s", ""],
        ["ratio of the two", f"{layer['ratio']:.0f} x", f"≥ {LEAST_SPEEDUP:.0f} x"],
        ["ResNet-50 compressed and verified", f"{warm['seconds']:.1f} s", f"< {MOST_SECONDS:.0f} s"],
        [
            "peak memory above the process before the model",
            f"{warm['peak_mib']:.0f} MiB = {warm['ratio']:.2f} x model",
            f"< {MOST_MEMORY:.0f} x",
        ],
        [
            "the same, with the code that torch.export loads at its first run",
            f"{cold['peak_mib']:.0f} MiB = {cold['ratio']:.2f} x model",
            "",
        ],
    ]
    note = (
        "Filter by filter is how the paper's code solves. Ridge given all filters at once, filters ready-made, takes "
        f"{layer['ridge_all_at_once_seconds']:.3f} s. "
    )
    note += f"Both ways of solving the layer agree to {layer['largest_difference']:.0e}."
    if layer["ridge_filters_solved"] < layer["ridge_filters"]:
        note += f" Ridge was timed on {layer['ridge_filters_solved']} of {layer['ridge_filters']} filters, and scaled."
    run.tables.append(Table("Restoration at 50 %", ("what", "measured", "bound"), rows, note))
    for row in rows:
        print(*row, sep="\t")
    print(f"wrote {run.write()}")

    trouble = []
    if layer["largest_difference"] > 1e-6:
        trouble.append(f"the two solutions differ by {layer['largest_difference']:.1e}")
    if layer["ratio"] < LEAST_SPEEDUP:
        trouble.append(f"the closed form is only {layer['ratio']:.0f} times as fast")
    if warm["seconds"] >= MOST_SECONDS:
        trouble.append(f"ResNet-50 took {warm['seconds']:.1f} s")
    if warm["ratio"] >= MOST_MEMORY:
        trouble.append(f"the peak is {warm['ratio']:.2f} times the model")
    for line in trouble:
        print(f"error: {line}", file=sys.stderr)
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
