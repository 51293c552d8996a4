"""Pruning, and int8 after it: accuracy, time and size of pruned + int8 against int8 alone.

    python benchmarks/quantization.py --data DIR [--network resnet56] [--runtime torch] [--images 1000] [--keep DIR]
        [--fresh]

Each network is cut by default to 70 % of its multiply-accumulates, with widths in multiples of 8. Then the unpruned
network and the smaller one are quantized in the same ways: by onnxruntime (static, 8-bit weights of each channel and
8-bit activations), calibrated with `lbyl.calibration_batches` of the network, and for comparison with as many test
images that accuracy is not measured on; and by torchao, whose int8 configurations for CPUs, weight-only and dynamic,
take linear layers and no convolutions. Accuracy is that of the file or module that is timed. All forms of one runtime
are timed in turns, at batch 1 on one thread, by the processor's time, which other programs disturb less.

DIR (or LBYL_DATA) is what accuracy.py describes. Evenly spaced test images are used, at most --images of them. Results
are written network by network and not measured again. --keep stores what takes long, the smaller
networks and the inputs made up for both, or uses what is stored there.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accuracy import NETWORKS
from networks import Images
from output import Run, Table, known_cells
from provenance import ROOMS
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lbyl
from lbyl.io.artifact import read_manifest
from lbyl.runtime.latency import Runs, interleaved

SHARE = 0.7
RUNS, SECONDS = (20, 200), 20.0
"""As many runs as fit into so many seconds, within these bounds."""
FORMS = {
    "float32": "onnxruntime, float32",
    "static": "onnxruntime, int8, made-up inputs",
    "static, real": "onnxruntime, int8, real images",
    "eager": "PyTorch, float32",
    "weights": "torchao, int8 weights",
    "dynamic": "torchao, int8 dynamic",
}
RUNTIMES = {"onnxruntime": ("float32", "static", "static, real"), "torch": ("eager", "weights", "dynamic")}


def portion(images: Images, most: int) -> tuple[Images, Tensor]:
    """Evenly spaced test images, and images between them that are not among these, for calibration."""
    count = len(images.labels)
    chosen = torch.arange(min(most, count // 2)) * count // min(most, count // 2)
    others = torch.ones(count, dtype=torch.bool)
    others[chosen] = False
    return Images(images.pixels[chosen], images.labels[chosen]), images.pixels[others]


def smaller(net: nn.Module, x: Tensor, layers: str | None, kept: Path | None) -> tuple[nn.Module, lbyl.Report]:
    """The network with the share of its multiply-accumulates, cut as by default, or the one that was kept."""
    if kept is not None and kept.is_dir():
        return lbyl.load(kept, net), read_manifest(kept).report
    groups = lbyl.inspect(net, x).graph.groups
    exclude = tuple(group.name for group in groups if layers and not fnmatchcase(group.name, layers))
    result = lbyl.compress(net, x, budget=lbyl.Budget(macs=SHARE, exclude=exclude, round_to=8), forecast=False)
    if kept is not None:
        result.save(kept)
    return result.model, result.report


def session(file: Path) -> Any:
    """A file in onnxruntime, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def quantized(file: Path, name: str, batches: Sequence[Tensor], to: Path) -> Path:
    """The file in int8 by static quantization, calibrated with these batches."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[dict[str, np.ndarray]] = iter([{name: batch.numpy()} for batch in batches])

        def get_next(self) -> Any:
            return next(self.left, None)

    plain = to.with_suffix(".plain.onnx")
    quant_pre_process(file, plain, skip_symbolic_shape=True)
    settings: dict[str, Any] = {"quant_format": QuantFormat.QDQ, "per_channel": True}
    settings |= {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(plain, to, Batches(), **settings)
    return to


def accuracy(answer: Callable[[Tensor], Tensor], images: Images, batch: int) -> float:
    """Top-1 in percent."""
    parts = zip(images.pixels.split(batch), images.labels.split(batch), strict=True)
    right = sum(int((answer(pixels).argmax(1) == labels).sum()) for pixels, labels in parts)
    return round(100 * right / len(images.labels), 2)


def in_turns(measure: Callable[[int, int], tuple[Runs, ...]]) -> tuple[Runs, ...]:
    """As many runs as the time allows; finding out how many warms up."""
    once = sum(found.median for found in measure(3, 1))
    return measure(min(max(int(SECONDS / once), RUNS[0]), RUNS[1]), 0)


def with_torchao(net: nn.Module) -> dict[str, nn.Module]:
    """The network in PyTorch, as it is and in both ways of torchao."""
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]  # it is only installed on Linux
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    found = {"eager": net}
    for form, config in (("weights", Int8WeightOnlyConfig()), ("dynamic", Int8DynamicActivationInt8WeightConfig())):
        found[form] = copy.deepcopy(net)
        quantize_(found[form], config)
    return found


def made_up(net: nn.Module, x: Tensor, kept: Path | None) -> list[Tensor]:
    """Inputs for calibration, or those that were kept."""
    if kept is None or not kept.is_file():
        made = lbyl.calibration_batches(net, x, batch_size=8)
        if kept is None:
            return made
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({"inputs": torch.cat(made)}, kept)
    return list(load_file(kept)["inputs"].split(8))


def with_onnxruntime(net: nn.Module, x: Tensor, real: Tensor, made: list[Tensor], place: Path) -> dict[str, Path]:
    """The network as files: float32, and int8 by made-up inputs and by real ones."""
    file = lbyl.export(net, to=place / "float32.onnx", inputs=x).file
    name = session(file).get_inputs()[0].name
    count = 8 * len(made)
    images = real[torch.arange(min(count, len(real))) * len(real) // min(count, len(real))]
    return {
        "float32": file,
        "static": quantized(file, name, made, place / "static.onnx"),
        "static, real": quantized(file, name, images.split(8), place / "real.onnx"),
    }


def in_onnxruntime(
    nets: dict[float, nn.Module], images: Images, real: Tensor, batch: int, kept: Path | None
) -> list[dict[str, Any]]:
    """Both networks as files: accuracy, size, and time in turns."""
    x, found = images.pixels[:1], list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as place:
        files = dict[tuple[float, str], Path]()
        for share, net in nets.items():
            folder = Path(place) / str(share)
            folder.mkdir()
            made = made_up(net, x, kept and kept.with_name(f"{kept.name}-{share}.safetensors"))
            files |= {(share, form): file for form, file in with_onnxruntime(net, x, real, made, folder).items()}
        sessions = {key: session(file) for key, file in files.items()}
        name = next(iter(sessions.values())).get_inputs()[0].name
        calls = [lambda s=s: s.run(None, {name: x.numpy()}) for s in sessions.values()]
        times = in_turns(lambda n, w: interleaved(calls, [time.process_time] * len(calls), n, w))
        for ((share, form), each), runs in zip(sessions.items(), times, strict=True):
            right = accuracy(lambda p, s=each: torch.from_numpy(s.run(None, {name: p.numpy()})[0]), images, batch)
            size = files[share, form].stat().st_size
            found.append({"share": share, "form": form, "accuracy": right, "seconds": runs.to_dict(), "bytes": size})
    return found


def in_torch(nets: dict[float, nn.Module], images: Images, batch: int) -> list[dict[str, Any]]:
    """Both networks in PyTorch and torchao: accuracy, and time in turns."""
    modules = {(share, form): each for share, net in nets.items() for form, each in with_torchao(net).items()}
    x, found = images.pixels[:1], list[dict[str, Any]]()
    with torch.no_grad():
        calls = [partial(each, x) for each in modules.values()]
        times = in_turns(lambda n, w: interleaved(calls, [time.process_time] * len(calls), n, w))
        for ((share, form), each), runs in zip(modules.items(), times, strict=True):
            right = accuracy(each, images, batch)
            found.append({"share": share, "form": form, "accuracy": right, "seconds": runs.to_dict(), "bytes": None})
    return found


def tabulate(run: Run) -> None:
    """One table a network."""
    run.tables = []
    for name in NETWORKS:
        cells = {(c["share"], c["form"]): c for c in run.measurements if c["network"] == name}
        if not cells:
            continue
        rows = []
        for form, title in FORMS.items():
            if (1.0, form) not in cells:
                continue
            whole, cut = cells[1.0, form], cells[SHARE, form]
            row: list[Any] = [title, whole["accuracy"], cut["accuracy"]]
            row += [f"{1000 * each['seconds']['median']:,.2f}" for each in (whole, cut)]
            row += [each["bytes"] and f"{each['bytes'] / 2**20:,.2f}" for each in (whole, cut)]
            rows.append(row)
        columns = ["runtime and form", "top-1, unpruned", "top-1, pruned", "ms, unpruned", "ms, pruned"]
        columns += ["MiB, unpruned", "MiB, pruned"]
        first = next(iter(cells.values()))
        note = (
            f"Top-1 in percent of {first['images']:,} test images; milliseconds of one thread at batch 1, medians of "
            f"runs in turns; {first['macs']:.0%} of the multiply-accumulates are left. Made-up inputs are those of "
            "`lbyl.calibration_batches`. torchao takes linear layers only."
        )
        run.tables.append(Table(NETWORKS[name].title, columns, rows, note))


def main(
    data: Annotated[Path, typer.Option(envvar="LBYL_DATA", help="Folder with weights/ and data/.")],
    network: Annotated[list[str] | None, typer.Option(help="resnet56, efficientnet_lite0; both.")] = None,
    runtime: Annotated[list[str] | None, typer.Option(help=f"{', '.join(RUNTIMES)}; both.")] = None,
    images: Annotated[int, typer.Option(min=10, help="Largest number of test images.")] = 1000,
    keep: Annotated[Path | None, typer.Option(help="Folder for the smaller networks.")] = None,
    fresh: Annotated[bool, typer.Option(help="Measure again what is known, for these networks.")] = False,
) -> None:
    """Fill the tables network by network."""
    torch.set_num_threads(1)
    console, names = Console(), network or ["resnet56", "efficientnet_lite0"]
    run = Run("quantization", "Pruning and int8", "python benchmarks/quantization.py --data DIR", pieced=True)
    run.rooms = (*ROOMS, "budget")
    run.settings = {"networks": {name: NETWORKS[name].title for name in ("resnet56", "efficientnet_lite0")}}
    run.measurements = [c for c in known_cells("quantization") if not (fresh and c["network"] in names)]
    for name in names:
        known = {cell["form"] for cell in run.measurements if cell["network"] == name}
        missing = [each for each in runtime or RUNTIMES if not known & set(RUNTIMES[each])]
        if not missing:
            continue
        spec = NETWORKS[name]
        net, (chosen, real) = spec.build(data), portion(spec.images(data), images)
        cut, report = smaller(net, chosen.pixels[:1], spec.layers, keep and keep / name)
        assert report.macs is not None
        about = {
            "lbyl": version("lbyl"),
            "images": len(chosen.labels),
            "threads": torch.get_num_threads(),
            "macs": round(report.macs[1] / report.macs[0], 4),
            "onnxruntime": version("onnxruntime"),
            "torchao": version("torchao"),
        }
        nets, kept = {1.0: net, SHARE: cut}, keep and keep / name
        found = []
        if "onnxruntime" in missing:
            found.append(in_onnxruntime(nets, chosen, real, spec.batch, kept))
        if "torch" in missing:
            found.append(in_torch(nets, chosen, spec.batch))
        for cell in chain.from_iterable(found):
            run.measurements.append({"network": name, **cell, **about})
            seconds = cell["seconds"]["median"]
            console.print(f"{name} {cell['share']} {cell['form']}: {cell['accuracy']:.2f} %, {1000 * seconds:.2f} ms")
        run.save(tabulate)
    run.save(tabulate)


if __name__ == "__main__":
    typer.run(main)
