"""Which architectures can be pruned, how far, and how fast; side by side with Torch-Pruning.

    python benchmarks/coverage.py [--only GLOB] [--fresh] [--restore/--no-restore] [--peer/--no-peer]
    python benchmarks/coverage.py --check [--only GLOB] [--processes 2]

Every network of models.py gets random weights and loses 25 % of its channels by L2 norm: with scope="all" and
scope="inner", without restoration (what counts here is which channels can go), and once more with least squares on
a few noise probes, whose error on held-out probes must not be above that of plain pruning. A row passes when the cut
network equals the masked one in float64, runs on a batch of two, and on images 32 pixels larger where the uncut
network does. Where sums couple every group (RepVGG's parallel branches), scope="inner" has nothing to cut; a row that
says so passes, for nothing else would be right.

Torch-Pruning (`pip install torch-pruning`) gets the same networks with the layers that make the outputs left out, as
its manual asks, and nothing else by hand; it passes when it removes parameters and the network then runs.

Every cell runs in a process of its own, on one thread, so that its peak memory is its own and a crash is one row. The
results are written after every network and what stands there is not computed again. No data is needed.

--check cuts every network once more, by plain pruning with scope="all", and writes nothing but that it held. It exits
with 1 where a network fails that passed, or where less of it can be cut than the table says.
"""

from __future__ import annotations

import multiprocessing
import re
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from models import CLASSIFIERS, MODELS, build
from output import Cell, Run, Table, confirm, known_cells, measured
from rich.console import Console
from torch import Tensor, nn

import lbyl
from lbyl.errors import LbylError
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.macs import count_macs, count_parameters

OTHERS = [name for name in MODELS if name not in CLASSIFIERS]
RATIO = 0.25
ROUNDING = 0.005
"""A share that is lower by no more than this is the one in the table."""
NOTHING = "nothing to cut: sums or layer norms couple every group"
PATIENCE = {"all": 120, "inner": 180, "restored": 900}
"""Seconds after which a cell is given up, where it is not 60."""


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
    return int(lines[field].split()[0]) * 1024


def ours(name: str, scope: str, verify: bool = True) -> dict[str, Any]:
    """One compression without restoration."""
    net, x = build(name)
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        ExampleInputs.of(x).call(net)  # what the first run of a network costs is not for either tool to pay
    compress, wide = lbyl.compress, channels(net)  # nor is importing them
    start, started = memory("VmRSS"), time.perf_counter()
    try:
        result = compress(net, x, ratio=RATIO, scope=scope, restore="prune", verify=verify, forecast=False)
    except LbylError as error:
        nothing = scope == "inner" and all_coupled(net, x)
        return {"passed": nothing, "why": NOTHING if nothing else f"{type(error).__name__}: {error}"[:300]}
    seconds, report = time.perf_counter() - started, result.report
    touched = {cut.parameter for cut in result.plan.cuts} & parameters.keys()
    problem = runs_elsewhere(net, result.model, x)
    return {
        "passed": problem is None,
        "why": problem,
        "verified": report.verified,
        "groups": len(report.rows),
        "left": len(report.left),
        "reasons": sorted({why[:160] for _, why in report.left}),
        "found_by_verification": sum(why.startswith("found by verification") for _, why in report.left),
        "in_parts": "parts" in result.plan.settings,
        "prunable": sum(parameters[n].numel() for n in touched) / max(sum(p.numel() for p in parameters.values()), 1),
        "parameters": report.parameters,
        "channels": [wide, channels(result.model)],
        "macs": report.macs,
        "seconds": round(seconds, 2),
        "stages": {stage: round(value, 2) for stage, value in report.seconds.items()},
        "peak_mib": round((memory("VmHWM") - start) / 2**20, 1),
        "model_mib": round(sum(p.numel() * p.element_size() for p in parameters.values()) / 2**20, 1),
    }


def channels(net: nn.Module) -> int:
    """Channels of all convolutions and linear layers together."""
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    return sum(layer.weight.shape[0] for layer in layers)


def all_coupled(net: nn.Module, x: Any) -> bool:
    """Whether the inner scope leaves out every group that could be pruned."""
    prunable = [group for group in lbyl.inspect(net, x).graph.groups if group.prunable]
    return bool(prunable) and all(group.excluded_from_inner for group in prunable)


def runs_elsewhere(net: nn.Module, smaller: nn.Module, x: Any) -> str | None:
    """None when the smaller network takes what the original takes besides the example; else what fails."""

    def twice(t: Tensor) -> Tensor:
        return torch.cat([t, t]) if t.dim() else t

    inputs = ExampleInputs.of(x)
    variants: dict[str, Callable[[], ExampleInputs]] = {"a batch of two": lambda: inputs.map(twice)}
    if isinstance(x, Tensor) and x.dim() == 4:
        variants["larger images"] = lambda: ExampleInputs.of(torch.randn(1, 3, x.shape[2] + 32, x.shape[3] + 32))
    for what, make in variants.items():
        with torch.no_grad():
            try:
                wanted = [t.shape for t in output_tensors(make().call(net))]
            except Exception:  # the original does not take it either
                continue
            try:
                found = [t.shape for t in output_tensors(make().call(smaller))]
            except Exception as error:
                return f"fails on {what}: {error}"[:200]
        if wanted != found and "Detection" not in type(net).__name__:
            return f"other output shapes on {what}"
    return None


def restored(name: str) -> dict[str, Any]:
    """One compression with least squares on a few noise probes; errors are on held-out probes."""
    net, x = build(name)
    started = time.perf_counter()
    # Few and cheap: whether it works on this architecture is the question, not how well.
    images = 4 if max(t.numel() for t in ExampleInputs.of(x).tensors()) > 10_000 else 128
    settings = lbyl.LeastSquares(moments=lbyl.Noise(images=images), positions=4000, budget=64 * 2**20)
    try:
        result = lbyl.compress(net, x, ratio=RATIO, scope="all", restore=settings, forecast=False)
    except LbylError as error:
        return {"passed": False, "why": f"{type(error).__name__}: {error}"[:300]}
    with torch.no_grad():
        outputs = output_tensors(ExampleInputs.of(x).call(result.model))
    finite = all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point())
    found = result.report.assessment
    better = found is None or found.restored <= found.pruned + 1e-6
    return {
        "passed": finite and better,
        "why": None if finite and better else "not finite" if not finite else "larger error than plain pruning",
        "errors": None if found is None else [found.pruned, found.restored],
        "seconds": round(time.perf_counter() - started, 2),
    }


def peer(name: str) -> dict[str, Any]:
    """The same cut by Torch-Pruning."""
    import torch_pruning  # pyright: ignore[reportMissingImports]

    net, x = build(name)
    before, wide = (count_parameters(net), count_macs(net, ExampleInputs.of(x))), channels(net)
    start, started = memory("VmRSS"), time.perf_counter()
    try:
        with torch.no_grad():
            shapes = [t.shape for t in output_tensors(net(x))]
        classes = {shape[1] for shape in shapes if len(shape) > 1}
        heads: list[nn.Module] = [
            module
            for module in net.modules()
            if (isinstance(module, nn.Linear) and module.out_features in classes)
            or (isinstance(module, nn.Conv2d) and module.out_channels in classes and module.kernel_size == (1, 1))
        ]
        pruner = torch_pruning.pruner.BasePruner(
            net,
            x,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=heads[-1:] if len(heads) > 3 else heads,
        )
        pruner.step()
        seconds = time.perf_counter() - started
        with torch.no_grad():
            found = [t.shape for t in output_tensors(net(x))]
    except Exception as error:
        return {"passed": False, "why": f"{type(error).__name__}: {error}"[:200]}
    after = count_parameters(net), count_macs(net, ExampleInputs.of(x))
    passed = found == shapes and after[0] < before[0]
    return {
        "passed": passed,
        "why": None if passed else "other output shapes" if found != shapes else "nothing removed",
        "parameters": [before[0], after[0]],
        "macs": [before[1], after[1]],
        "channels": [wide, channels(net)],
        "seconds": round(seconds, 2),
        "peak_mib": round((memory("VmHWM") - start) / 2**20, 1),
    }


CELLS: dict[str, Callable[[str], dict[str, Any]]] = {
    "all": lambda name: ours(name, "all"),
    "unverified": lambda name: ours(name, "all", verify=False),
    "inner": lambda name: ours(name, "inner"),
    "restored": restored,
    "peer": peer,
}


def _child(cell: str, name: str, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        pipe.send(CELLS[cell](name))
    except BaseException as error:
        pipe.send({"passed": False, "why": f"{type(error).__name__}: {error}"[:300]})


def isolated(cell: str, name: str, patience: int = 0) -> dict[str, Any]:
    """Run one cell in a process of its own."""
    patience = patience or PATIENCE.get(cell, 60)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(cell, name, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(patience) else None
    except EOFError:
        found = {"passed": False, "why": "the process died"}
    process.kill()
    process.join()
    return found or {"passed": False, "why": f"more than {patience} seconds"}


def check(only: str, processes: int) -> int:
    """Plain pruning of every network again; how many rows of the table no longer hold."""
    console = Console()
    known = {cell["network"]: cell for cell in measured("coverage") if cell["cell"] == "all"}
    names = sorted((name for name in MODELS if fnmatch(name, only)), key=lambda name: -known_seconds(known.get(name)))
    failed, started = 0, time.perf_counter()
    # Threads only wait: each cell is a process of its own.
    with ThreadPoolExecutor(processes) as pool:
        for name, found in zip(names, pool.map(lambda name: isolated("all", name, 600), names), strict=True):
            lost = what_was_lost(known.get(name), found)
            failed += lost is not None
            console.print(f"{name:52} {'holds' if lost is None else f'FAILED {lost}'}", soft_wrap=True, markup=False)
    console.print(f"{len(names) - failed} of {len(names)} hold, in {time.perf_counter() - started:.0f} s")
    if not failed and only == "*":
        confirm("coverage", "by plain pruning, scope all")
    return failed


def known_seconds(cell: dict[str, Any] | None) -> float:
    """How long a network took, so that those that take longest come first."""
    return cell.get("seconds", 0.0) if cell else 0.0


def what_was_lost(before: dict[str, Any] | None, now: dict[str, Any]) -> str | None:
    """What the table says of a network and no longer holds; None where all does."""
    if before is None or not before["passed"]:
        return None if now["passed"] else f"(not in the table as one that passes) {now['why']}"
    if not now["passed"]:
        return now["why"]
    for what, then, today in (
        ("of the parameters go", share_removed(before), share_removed(now)),
        ("of the parameters can be pruned", before["prunable"], now["prunable"]),
    ):
        if then is not None and (today or 0.0) < then - ROUNDING:
            return f"{percent(today)} {what}, {percent(then)} in the table"
    return None


def share_removed(cell: dict[str, Any] | None) -> float | None:
    """Share of the parameters that went."""
    if not cell or "parameters" not in cell or not cell["passed"]:
        return None
    before, after = cell["parameters"]
    return 1 - after / before


def as_asked(cell: dict[str, Any]) -> bool:
    """Whether no more channels went than were asked for."""
    before, after = cell.get("channels", (1, 1))
    return 1 - after / before <= RATIO + 1e-6


def percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def tabulate(run: Run) -> None:
    """The tables of the 79 classifiers and of the others, and the totals of the 79."""
    titles = {"The 79 classifiers": CLASSIFIERS, "Transformers, detection, segmentation": OTHERS}
    run.tables = [network_table(run, title, names) for title, names in titles.items()]
    run.details = [totals(run)]
    run.about = " ".join((__doc__ or "").partition("\n\n    python")[2].partition("\n\n")[2].split("\n\n")[0].split())
    run.sections = {"What stays whole, and why": left_whole(run), "What Torch-Pruning says": peer_failures(run)}


def left_whole(run: Run) -> str:
    """The reasons, without names and figures, by how many networks have them."""
    found: dict[str, set[str]] = {}
    for cell in run.measurements:
        if cell["cell"] != "all":
            continue
        for why in cell.get("reasons", []) if cell["passed"] else [cell["why"]]:
            general = re.sub(r"'[^']*'", "…", why)
            general = re.sub(r"\[[^\]]*\]|\d+(\.\d+)?(e-?\d+)?", "n", general)
            found.setdefault(general, set()).add(cell["network"])
    ranked = sorted(found.items(), key=lambda item: -len(item[1]))
    rows = [
        [why, len(names), ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")] for why, names in ranked
    ]
    return "\n".join(
        ["| reason | networks | among them |", "|---|--:|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    )


def peer_failures(run: Run) -> str:
    """Where the other tool stops, in its own words."""
    failed = [c for c in run.measurements if c["cell"] == "peer" and not c["passed"]]
    lines = [f"| {c['network']} | {c['why'].splitlines()[0][:120].replace('|', ' ')} |" for c in failed]
    return "\n".join(["| network | message |", "|---|---|", *lines])


def network_table(run: Run, title: str, names: list[str]) -> Table:
    """One row a network."""
    cells = {name: {c["cell"]: c for c in run.measurements if c["network"] == name} for name in names}
    rows = []
    for name in names:
        here = cells[name]
        whole, inner, probed, other = (here.get(key) for key in ("all", "inner", "restored", "peer"))
        if not whole:
            continue
        macs = whole.get("macs")
        rows.append(
            [
                name,
                "yes" if whole["passed"] else f"no: {whole['why'][:48]}",
                percent(whole.get("prunable")),
                percent(share_removed(whole)),
                percent(1 - macs[1] / macs[0]) if macs and macs[0] else None,
                whole.get("seconds"),
                (here.get("unverified") or {}).get("seconds"),
                whole.get("peak_mib"),
                "nothing to cut" if inner and inner["why"] == NOTHING else percent(share_removed(inner)),
                " → ".join(f"{error:.2f}" for error in probed["errors"]) if probed and probed.get("errors") else None,
                percent(share_removed(other)) or ("no" if other else None),
                other.get("seconds") if other and other["passed"] else None,
            ]
        )
    columns = [
        "network",
        "verified and runs",
        "prunable",
        "parameters removed",
        "MACs removed",
        "seconds",
        "unverified",
        "peak MiB",
        "removed, inner",
        "error pruned → restored",
        "Torch-Pruning removed",
        "its seconds",
    ]
    note = "Random weights, 25 % of the channels of every group, scope all unless it says inner, one thread."
    return Table(title, columns, rows, note)


def totals(run: Run) -> Table:
    """How many pass, and the medians beside those of Torch-Pruning."""
    cells = {name: {c["cell"]: c for c in run.measurements if c["network"] == name} for name in CLASSIFIERS}
    done = [cell for cell in cells.values() if "all" in cell]
    both = [cell for cell in done if cell["all"]["passed"] and cell.get("peer", {}).get("passed")]

    def passed(key: str) -> str:
        measured = [cell[key] for cell in done if key in cell]
        return f"{sum(bool(cell['passed']) for cell in measured)} of {len(measured)}"

    rows: list[list[Cell]] = [
        ["networks", str(len(done)), None],
        ["pass", passed("all"), passed("peer")],
        ["pass, inner", passed("inner"), None],
    ]
    if any("restored" in cell for cell in done):
        rows.append(["restored, error no larger than pruned", passed("restored"), None])
    if both:
        shares = [[share_removed(cell[key]) or 0.0 for cell in both] for key in ("all", "peer")]
        seconds = [[cell[key]["seconds"] for cell in both] for key in ("all", "peer")]
        rows.append(["median parameters removed, where both pass", *(f"{median(s):.1%}" for s in shares)])
        fair = [cell for cell in both if all(as_asked(cell[key]) for key in ("all", "peer"))]
        shares = [[share_removed(cell[key]) or 0.0 for cell in fair] for key in ("all", "peer")]
        if fair and len(fair) < len(both):
            text = f"the same, where neither drops more channels than asked ({len(fair)} networks)"
            rows.append([text, *(f"{median(s):.1%}" for s in shares)])
        rows.append(["median seconds, where both pass", *(f"{median(s):.2f}" for s in seconds)])
        unverified = [cell["unverified"]["seconds"] for cell in both if "seconds" in cell.get("unverified", {})]
        if unverified:
            rows.append(["the same, nothing verified", f"{median(unverified):.2f}", f"{median(seconds[1]):.2f}"])
        for key, text in (("all", "verified"), ("unverified", "nothing verified")):
            ratios = [c[key]["seconds"] / c["peer"]["seconds"] for c in both if "seconds" in c.get(key, {})]
            if ratios:
                rows.append([f"median of seconds over its seconds, {text}", f"{median(ratios):.2f}", None])
        rows.append(["largest seconds, where both pass", *(f"{max(s):.1f}" for s in seconds)])
    return Table("Totals of the 79 classifiers", ["", "lbyl", "Torch-Pruning"], rows)


def main(
    only: Annotated[str, typer.Option(help="Glob over the networks' names.")] = "*",
    fresh: Annotated[bool, typer.Option(help="Compute again what is known, for these networks.")] = False,
    restore: Annotated[bool, typer.Option(help="The column with least squares.")] = True,
    peer: Annotated[bool, typer.Option(help="The column of Torch-Pruning.")] = True,
    check_rows: Annotated[bool, typer.Option("--check", help="Only see whether the rows still hold.")] = False,
    processes: Annotated[int, typer.Option(help="Networks that --check cuts at once.")] = 2,
) -> None:
    """Fill the table network by network."""
    if check_rows:
        raise typer.Exit(1 if check(only, processes) else 0)
    console = Console()
    names = [name for name in MODELS if fnmatch(name, only)]
    run = Run("coverage", "Coverage", "python benchmarks/coverage.py", pieced=True)
    run.settings = {"ratio": RATIO, "criterion": "l2"}
    current = version("lbyl")
    run.measurements = [cell for cell in known_cells("coverage") if not (fresh and cell["network"] in names)]
    wanted = ["all", "unverified", *(["peer"] if peer else []), "inner", *(["restored"] if restore else [])]
    # What is compared is measured one right after the other, for the machine may be slower an hour later.
    for name in names:
        for cell in wanted:
            if any(c["network"] == name and c["cell"] == cell for c in run.measurements):
                continue
            if cell in ("peer", "unverified") and name not in CLASSIFIERS:
                continue  # the manual of Torch-Pruning does not cover tokens and lists of images
            found = isolated(cell, name)
            run.measurements.append({"network": name, "cell": cell, "lbyl": current, **found})
            text = percent(share_removed(found)) if "parameters" in found else found.get("errors")
            verdict = f"{text} in {found.get('seconds')} s" if found["passed"] else f"FAILED {found['why']}"
            console.print(f"{name:40} {cell:9} {verdict}", soft_wrap=True)
            run.save(tabulate)
    run.save(tabulate)


if __name__ == "__main__":
    typer.run(main)
