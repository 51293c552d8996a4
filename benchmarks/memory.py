"""Memory of `lbyl compress --low-memory`: peaks for random bfloat16 models of the sizes of Llama 3.2.

    python benchmarks/memory.py [--sizes 1B,3B] [--place DIR] [--sequences 16] [--length 64] [--keep]

Each model is written layer by layer, so that it is never in memory, and compressed in a process of its own, whose peak
of resident memory is measured from after the imports. The bound is 1.3 times the needs of one layer (the same
compression of a model with that one layer and hardly a vocabulary, measured in the same way), the embedding, and the
residual streams of all sequences. A run that is stopped goes on with the layer where it was when it is repeated.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from output import Run, Table, known_cells
from peak import PeakMemory, alone
from rich.console import Console

import lbyl

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
VOCABULARY, SMALL = 128_256, 256
RATIO = 0.25


def write(folder: Path, size: str, layers: int | None, vocabulary: int) -> None:
    """A random model, one file for each layer."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    more = {"num_hidden_layers": layers} if layers else {}
    settings = {**SIZES[size], **more, "vocab_size": vocabulary, "num_key_value_heads": 8, "max_position_embeddings": 512}
    config = LlamaConfig(**settings, tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"])  # type: ignore[arg-type]
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


def measure(folder: Path, target: Path, sequences: int, length: int, vocabulary: int) -> dict[str, Any]:
    """Compress one folder in this process."""
    import transformers  # noqa: F401

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (sequences, length), generator=generator)
    torch.set_num_threads(1)
    from lbyl.pipeline.folder.folder import compress_folder

    peak, started = PeakMemory(), time.perf_counter()
    peak.start()
    batches = [{"input_ids": part} for part in tokens.split(4)]
    made = compress_folder(folder, target, ratio={"*.mlp.*": RATIO}, data=batches, progress=lambda *a: print(*a, flush=True))
    return {
        "peak_mib": peak.mebibytes(),
        "seconds": round(time.perf_counter() - started, 1),
        "before": made.report.parameters[0],
        "after": made.report.parameters[1],
    }


def main(
    sizes: Annotated[str, typer.Option(help="Which models.")] = "1B,3B",
    place: Annotated[Path | None, typer.Option(help="Where models are written.")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences of random tokens.")] = 16,
    length: Annotated[int, typer.Option(help="Their length.")] = 64,
    keep: Annotated[bool, typer.Option("--keep", help="Do not remove the folders.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is known.")] = False,
    inner: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure what is not known yet."""
    where = place or Path(tempfile.mkdtemp())
    if inner:
        source, vocabulary = inner.split(":")
        print(json.dumps(measure(where / source, where / f"{source}-cut", sequences, length, int(vocabulary))))
        return
    settings = {"sequences": sequences, "length": length, "ratio": RATIO}
    cells = {} if fresh else known_cells("memory", settings)
    run = Run("memory", settings)
    for size in sizes.split(","):
        for name, layers, vocabulary in ((f"{size}-layer", 1, SMALL), (size, None, VOCABULARY)):
            if name in cells:
                continue
            if not (where / name).exists():
                write(where / name, size, layers, vocabulary)
            given = ["--sequences", str(sequences), "--length", str(length), "--inner", f"{name}:{vocabulary}"]
            cells[name] = alone(__file__, "--place", str(where), *given)
            run.write(cells)
            for made in (where / name, where / f"{name}-cut") if not keep else ():
                shutil.rmtree(made)
