"""The same words in llama.cpp: SmolLM2-135M, whole and compressed, as a GGUF file.

    python benchmarks/greedy.py --model FOLDER [--words 24] [--fresh]

`FOLDER` is a folder of transformers with the model and its tokenizer. It is exported as it is, and after it was
compressed from folder to folder, with equal widths and with widths that differ from layer to layer. llama.cpp continues
the same prompts greedily with each file (PyPI package xllamacpp, which holds llama.cpp), and transformers with each
folder. Arithmetic differs in the last digits, so that a near tie may break another way.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from output import Run, Table, known_cells

import lbyl
from lbyl.moments.sentences import sentences
from lbyl.runtime.tokenizers import packed_tokens, tokenizer_at

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "In 1969, two men",
    "def add(a, b):\n    return",
    "Roses are red, violets are",
    "The opposite of cold is",
    "A prime number is a number that",
    "Once upon a time, there was a",
)
VARIANTS: dict[str, Any] = {
    "whole": None,
    "a fifth of neurons and heads less": 0.2,
    "half of the layers narrower": {f"model.layers.{index}.mlp.*": 0.2 for index in range(0, 30, 2)},
}


def text(folder: Path) -> list[dict[str, torch.Tensor]]:
    """A little text to restore on: how good the smaller model is does not matter here."""
    tokens = packed_tokens(tokenizer_at(folder), sentences(), 64, 64)
    return [{"input_ids": part} for part in tokens.split(16)]


def in_transformers(folder: Path, words: int) -> list[str]:
    """The continuations, token by token."""
    import transformers

    hf: Any = transformers
    whole = (folder / "config.json").exists()
    model: Any = hf.AutoModelForCausalLM.from_pretrained(folder) if whole else lbyl.load(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=words, do_sample=False)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def in_llama_cpp(file: Path, words: int) -> list[str]:
    """The continuations of a file."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.sampling.temp = str(file), 512, 1, 0.0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    asked = [{"prompt": prompt, "max_tokens": words, "temperature": 0} for prompt in PROMPTS]
    return [server.handle_completions(each)["choices"][0]["text"] for each in asked]


def tabulate(run: Run) -> None:
    """One row for each variant."""
    rows = [[cell["network"], cell["same"], len(PROMPTS), cell["architecture"]] for cell in run.measurements]
    columns = ("SmolLM2-135M", "Prompts continued as in transformers", "of", "Architecture in llama.cpp")
    run.tables = [Table("GGUF in llama.cpp", columns, rows)]


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    words: Annotated[int, typer.Option(help="Tokens of each continuation.")] = 24,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is known.")] = False,
) -> None:
    """Measure what is not known yet."""
    run = Run("greedy", "The same words in llama.cpp", "python benchmarks/greedy.py --model FOLDER", {"words": words})
    run.measurements = [] if fresh else known_cells("greedy")
    for name, ratio in VARIANTS.items():
        if any(cell["network"] == name for cell in run.measurements):
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = model if ratio is None else Path(place) / "smaller"
            if ratio is not None:
                lbyl.compress_folder(model, folder, ratio=ratio, data=text(model))
            lbyl.export(folder, format="gguf", to=Path(place) / "model.gguf")
            theirs, ours = in_llama_cpp(Path(place) / "model.gguf", words), in_transformers(folder, words)
            kind = "deci" if isinstance(ratio, dict) else "llama"
        for prompt, first, second in zip(PROMPTS, ours, theirs, strict=True):
            print(name, repr(prompt), "same" if first == second else f"\n  {first!r}\n  {second!r}", flush=True)
        same = sum(first == second for first, second in zip(ours, theirs, strict=True))
        run.measurements.append({"network": name, "lbyl": version("lbyl"), "same": same, "architecture": kind})
        run.pieced = len(run.measurements) > 1
        run.save(tabulate)


if __name__ == "__main__":
    typer.run(main)
