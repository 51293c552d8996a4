"""Whole experts dropped from a small mixture that is trained here, without data.

    python benchmarks/experts.py [--steps 1200] [--probes FILE] [--network FILE]

The network is a Mixtral of two layers with eight experts each, two for every token. It reads the bytes of Python's own
documentation (`pydoc_data.topics`) and is trained on nine tenths of it; perplexity is that of the rest. Experts are
scored, and those that stay are solved, on text that the network writes itself. With `--network` and `--probes`, the
trained weights and this text are kept in files for the next run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from pydoc_data import topics
from statistics import mean
from typing import Annotated, Any

import torch
import transformers
import typer
from depth import Kept, written
from output import Run, Table
from provenance import ROOMS
from rich.console import Console
from torch import Tensor, nn

import lbyl
from lbyl.pipeline.experts import ExpertGround, fewer_experts, ground_for_experts
from lbyl.pipeline.prepare import prepare
from lbyl.pipeline.request import CompressionRequest
from lbyl.restore.prune import Prune
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Clock
from lbyl.selection.experts import highest
from lbyl.surgery.experts import Kept as KeptExperts

LENGTH, EXPERTS = 128, 8
SEEDS = (0, 1, 2)
METHODS = ("Random", "Router-weighted", "Restored")


@dataclass(frozen=True)
class Texts:
    """Bytes to learn from, and others to measure on, in windows."""

    learned: Tensor
    held_out: Tensor

    @staticmethod
    def of_python() -> Texts:
        """Python's documentation, in the order of its topics."""
        text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
        data = torch.tensor(list(text.encode()))
        border = len(data) * 9 // 10
        rest = data[border:]
        return Texts(data[:border], rest[: len(rest) // LENGTH * LENGTH].view(-1, LENGTH))

    def score(self, network: Any) -> dict[str, float]:
        """Perplexity, and the share of next bytes that are right, in percent."""
        losses, hits = [], []
        with torch.no_grad():
            for part in self.held_out.split(64):
                logits = network(input_ids=part).logits[:, :-1].flatten(0, 1)
                losses.append(nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="none"))
                hits.append(logits.argmax(-1) == part[:, 1:].flatten())
        return {
            "perplexity": float(torch.cat(losses).mean().exp()),
            "accuracy": 100 * float(torch.cat(hits).float().mean()),
        }


def trained(texts: Texts, steps: int, file: Path | None) -> Any:
    """The mixture, trained here or read from a file."""
    hf: Any = transformers
    sizes = {"vocab_size": 256, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ends = {"bos_token_id": 10, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
    config = hf.MixtralConfig(
        num_local_experts=EXPERTS, num_experts_per_tok=2, router_aux_loss_coef=0.01, **sizes, **heads, **ends
    )
    torch.manual_seed(0)
    network = hf.MixtralForCausalLM(config)
    if file is not None and file.is_file():
        network.load_state_dict(torch.load(file, weights_only=True))
        return network.eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for _ in range(steps):
        starts = torch.randint(len(texts.learned) - LENGTH, (16,)).tolist()
        x = torch.stack([texts.learned[start : start + LENGTH] for start in starts])
        loss = network(input_ids=x, labels=x, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if file is not None:
        torch.save(network.state_dict(), file)
    return network.eval()


def grounded(network: Any, example: dict[str, Tensor], texts: int, file: Path | None) -> ExpertGround:
    """Scores and probes."""
    probes = written(network, ExampleInputs.of(example), texts, file)
    restore = lbyl.LeastSquares(moments=Kept(probes))
    budget = lbyl.Budget(params=0.5, experts=True)
    request = CompressionRequest({"*": 0.5}, budget, "inner", None, restore, 0, True, False, None, None, False)
    return ground_for_experts(prepare(network, example, request, None, Clock()), request, Clock())


def random_experts(ground: ExpertGround, count: int, seed: int) -> KeptExperts:
    """As many experts of each mixture, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        each.experts: tuple(sorted(torch.randperm(each.count, generator=generator)[:count].tolist()))
        for each in ground.mixtures
    }


def cut(ground: ExpertGround, method: str, count: int, seed: int) -> Any:
    """The network with so many experts in each mixture."""
    best = {path: highest(scores, count) for path, scores in ground.scores.items()}
    kept = random_experts(ground, count, seed) if method == "Random" else best
    plain = replace(ground, request=replace(ground.request, restore=Prune()))
    return fewer_experts(ground if method == "Restored" else plain, kept, Clock()).model


def main(
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 1200,
    texts: Annotated[int, typer.Option(help="Sequences of 256 bytes that the network writes.")] = 96,
    network: Annotated[Path | None, typer.Option(help="File that keeps the trained weights.")] = None,
    probes: Annotated[Path | None, typer.Option(help="File that keeps what the network wrote.")] = None,
) -> None:
    """Measure all, and write the file."""
    settings = {"steps": steps, "texts": texts}
    rooms = (*ROOMS, "budget")
    run = Run("experts", "Whole experts", "python benchmarks/experts.py", settings, rooms=rooms)
    bytes_ = Texts.of_python()
    model = trained(bytes_, steps, network)
    ground = grounded(model, {"input_ids": bytes_.held_out[:1]}, texts, probes)
    wanted = [("Unpruned", EXPERTS, 0)]
    wanted += [
        (method, count, seed)
        for count in (6, 4)
        for method in METHODS
        for seed in (SEEDS if method == "Random" else SEEDS[:1])
    ]
    for method, count, seed in wanted:
        started = time.perf_counter()
        made = model if method == "Unpruned" else cut(ground, method, count, seed)
        cell = {"method": method, "kept": count, "seed": seed, **bytes_.score(made)}
        cell |= {"seconds": round(time.perf_counter() - started, 1), "lbyl": version("lbyl")}
        run.measurements.append(cell)
        Console().print(cell)
    Console().print(run.save(tabulate))


def tabulate(run: Run) -> None:
    """A table a measure: a row a share, a column a method."""
    run.tables = []
    for measure, title in (
        ("perplexity", "perplexity, lower is better"),
        ("accuracy", "next bytes that are right (%)"),
    ):
        found: dict[tuple[str, int], list[float]] = {}
        for cell in run.measurements:
            found.setdefault((cell["method"], cell["kept"]), []).append(cell[measure])
        rows = [
            [
                f"{1 - kept / EXPERTS:.0%}",
                kept,
                found["Unpruned", EXPERTS][0],
                *(mean(found[method, kept]) for method in METHODS),
            ]
            for kept in sorted({kept for _, kept in found} - {EXPERTS}, reverse=True)
        ]
        columns: Sequence[str] = ["dropped", "experts left", "unpruned", *METHODS]
        name = f"Mixture of 8 experts on Python's documentation: {title}"
        run.tables.append(Table(name, columns, rows, _NOTE if not run.tables else ""))


_NOTE = (
    "Dropped is the share of the experts of each of two layers; each token gets two. Random: experts are drawn at "
    "random and nothing is restored (mean of three draws). Router-weighted: those with the least mean norm of their "
    "output times the router's weight go (REAP), and nothing is restored. Restored: the same, and those that stay are "
    "solved, which is what lbyl.Budget(experts=True) does. Scores and solutions are of text that the network wrote."
)


if __name__ == "__main__":
    typer.run(main)
