"""Memory for language models: peaks for random bfloat16 models of the sizes of Llama 3.2.

    python benchmarks/memory.py [--sizes 1B,3B] [--ways folder,memory] [--place DIR] [--sequences 16] [--length 64]

Each model is written layer by layer, so that it is never in memory, and compressed in a process of its own, whose peak
of resident memory is measured from after the imports. The bound is 1.3 times the needs of one layer (the same
compression of a model with that one layer and hardly a vocabulary, measured in the same way), the embedding, and the
residual streams of all sequences. A run that is stopped goes on with the layer where it was when it is repeated.
That is `lbyl compress --low-memory`. In memory, the same model is loaded by transformers and compressed in its place,
and the peak counts the model itself; the bound is 1.5 times the model.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from output import Run, Table, known_cells
from peak import PeakMemory, alone

import lbyl

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
VOCABULARY, SMALL = 128_256, 256
RATIO = 0.25
NEURONS = {"*.mlp.*": RATIO}
IN_MEMORY = "-in-memory"


def write(folder: Path, size: str, layers: int | None, vocabulary: int) -> None:
    """A random model, one file for each layer."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    more = {"num_hidden_layers": layers} if layers else {}
    common = {"num_key_value_heads": 8, "max_position_embeddings": 512, "tie_word_embeddings": True}
    settings: dict[str, Any] = {**SIZES[size], **more, **common, "vocab_size": vocabulary}
    config = LlamaConfig(**settings, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shapes.pop("lm_head.weight")
    files: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        file = f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors"
        files.setdefault(file, {})[name] = shape
    generator = torch.Generator().manual_seed(0)
    for file, named in files.items():
        made = {}
        for name, shape in named.items():
            std = 0.02 if len(shape) > 1 else 0.0
            made[name] = torch.randn(shape, generator=generator, dtype=torch.float32).mul_(std).to(torch.bfloat16)
            made[name] += 1 if len(shape) == 1 else 0
        save_file(made, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, named in files.items() for name in named}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def loaded(folder: Path) -> Any:
    """A model in memory of its own: what transformers loads lies in the files until it is used."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def measure(folder: Path, target: Path | None, sequences: int, length: int, vocabulary: int) -> dict[str, Any]:
    """Compress one folder in this process, into another, or its model in place if there is none."""
    import transformers  # noqa: F401

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (sequences, length), generator=generator)
    torch.set_num_threads(1)
    tiny = folder.with_name("warm")  # libraries that are loaded once are no data
    write(tiny, "tiny", None, SMALL)
    lbyl.compress_folder(tiny, tiny.with_name("warm-cut"), ratio=RATIO, data=[{"input_ids": tokens[:4] % SMALL}] * 2)
    for used in (tiny, tiny.with_name("warm-cut")):
        shutil.rmtree(used)
    model = loaded(folder) if target is None else None
    held = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20 if model is not None else 0
    gc.collect()
    peak, started = PeakMemory(), time.perf_counter()
    peak.start()
    batches = [{"input_ids": part} for part in tokens.split(4)]
    told = lambda *words: print(*words, file=sys.stderr, flush=True)  # noqa: E731
    if model is not None:
        report = lbyl.compress_in_place(model, ratio=NEURONS, data=batches, progress=told).report
    else:
        assert target is not None
        report = lbyl.compress_folder(folder, target, ratio=NEURONS, data=batches, progress=told).report
    rise = peak.mebibytes()
    return {
        "peak_mib": None if rise is None else round(held + rise, 1),
        "seconds": round(time.perf_counter() - started, 1),  # of the last run only, if others were stopped before
        "before": report.parameters[0],
        "after": report.parameters[1],
    }


def tabulate(run: Run) -> None:
    """One row for each model and way, with its bound."""
    known = {cell["network"]: cell for cell in run.measurements}
    rows, whole = [], []
    for name, cell in known.items():
        if name.endswith(IN_MEMORY):
            size = name.removesuffix(IN_MEMORY)
            whole.append([size, *map(round, (cell["model_mib"], 1.5 * cell["model_mib"], cell["peak_mib"]))])
        layer = known.get(f"{name}-layer")
        if layer is None:
            continue
        bound = 1.3 * layer["peak_mib"] + cell["embedding_mib"] + cell["streams_mib"]
        sizes = [cell["model_mib"], layer["peak_mib"], cell["embedding_mib"], cell["streams_mib"], bound]
        rows.append([name, *map(round, sizes), round(cell["peak_mib"])])
    columns = ("Model", "Weights", "One layer", "Embedding", "Streams", "Bound", "Peak")
    note = "MiB, above what the process had after its imports. Random weights in bfloat16, one thread."
    run.tables = [Table("From folder to folder, layer by layer", columns, rows, note)]
    if whole:
        note = "MiB, above what the process had after its imports; the peak counts the model itself."
        run.tables.append(Table("A model in memory, in its place", ("Model", "Weights", "Bound", "Peak"), whole, note))


def main(
    sizes: Annotated[str, typer.Option(help="Which models.")] = "1B,3B",
    ways: Annotated[str, typer.Option(help="From folder to folder, in memory in place, or both.")] = "folder,memory",
    place: Annotated[Path | None, typer.Option(help="Where models are written.")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences of random tokens.")] = 16,
    length: Annotated[int, typer.Option(help="Their length.")] = 64,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is known.")] = False,
    inner: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure what is not known yet."""
    where = place or Path(tempfile.mkdtemp())
    if inner:
        source, way, vocabulary = inner.split(":")
        target = where / f"{source}-cut" if way == "folder" else None
        print(json.dumps(measure(where / source, target, sequences, length, int(vocabulary))))
        return
    run = Run(
        "memory",
        "Memory from folder to folder",
        "python benchmarks/memory.py",
        {"sequences": sequences, "length": length, "ratio": RATIO},
    )
    run.measurements = [] if fresh else known_cells("memory")
    for size in sizes.split(","):
        cells = [("folder", f"{size}-layer", 1, SMALL), ("folder", size, None, VOCABULARY)]
        cells.append(("memory", f"{size}{IN_MEMORY}", None, VOCABULARY))
        for way, name, layers, vocabulary in cells:
            if way not in ways.split(",") or any(cell["network"] == name for cell in run.measurements):
                continue
            source = where / name
            if not source.exists():
                write(source, size, layers, vocabulary)
            given = ["--sequences", str(sequences), "--length", str(length), "--inner", f"{name}:{way}:{vocabulary}"]
            found = alone(__file__, "--place", str(where), *given)
            width = SIZES[size]["hidden_size"] * 2 / 2**20
            found["model_mib"] = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 2**20
            found |= {"embedding_mib": vocabulary * width, "streams_mib": sequences * length * width}
            run.measurements.append({"network": name, "lbyl": version("lbyl"), **found})
            run.pieced = len(run.measurements) > 1
            run.save(tabulate)
            shutil.rmtree(source)
            if way == "folder":
                shutil.rmtree(where / f"{name}-cut")
    for table in run.tables:
        print(table.columns, *table.rows, sep="\n")


if __name__ == "__main__":
    typer.run(main)
