"""Whole blocks against narrower layers, at equal cost and without data.

    python benchmarks/depth.py --data DIR [--model FOLDER] [--networks resnet56,vit,smollm2,smollm2_read] [--fresh]

`DIR` is as for `language.py` and `accuracy.py`. ResNet-56 is the network of `accuracy.py`; the small ViT is trained
here on scikit-learn's digits, without batch norms; SmolLM2-135M is the network of `language.py`. ResNet-56 and the ViT
give up a share of their multiply-accumulates, SmolLM2 a share of its decoder layers' parameters. Every method looks at
the same probes, which the default makes for the network; what SmolLM2 writes itself is kept in `--probes`. As
`smollm2_read` it reads as many texts of WikiText-2's validation set in their place. How fast it writes is measured in
turns with the unpruned model, with one text at a time and with sixteen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from language import LENGTH, WINDOW, Scores, load, spread
from networks import cifar10, digits, held_out_digits, resnet56
from output import Run, Table, known_cells
from provenance import ROOMS
from rich.console import Console
from torch import Tensor, nn

import lbyl
from lbyl.graph.blocks import child_path, first_float
from lbyl.moments import Probes
from lbyl.pipeline.depth.drop import shallower
from lbyl.pipeline.depth.ground import DepthGround, ground_for_depth
from lbyl.pipeline.prepare import prepare
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.together import Way, attempt, weighed
from lbyl.restore.registry import choose_restorer
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.intercept import module_hooks
from lbyl.runtime.latency import interleaved
from lbyl.runtime.progress import Clock
from lbyl.selection.blocks import Chosen, influence
from lbyl.surgery.blocks import without_blocks

METHODS = ("Plain", "Restored", "ShortGPT", "ReplaceMe", "Width", "Both")
WAYS = {"Restored": "depth", "Both": "both", "Width": "width"}
"""What `lbyl.Budget(depth=True)` chooses from."""
NAMES = {
    "resnet56": "ResNet-56",
    "vit": "ViT on digits",
    "smollm2": "SmolLM2-135M",
    "smollm2_read": "SmolLM2-135M, on real text",
}
TEXTS = ("smollm2", "smollm2_read")


def digits_vit(epochs: int = 40) -> nn.Module:
    """A ViT of eight blocks, trained on scikit-learn's digits but those that the examples hold out."""
    images = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape: dict[str, Any] = {
            "img_size": 8,
            "patch_size": 2,
            "in_chans": 1,
            "embed_dim": 48,
            "depth": 8,
            "num_heads": 4,
            "global_pool": "avg",
            "class_token": False,
        }
        net = timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)
        # The usual deviation of 0.02 makes such small patches too faint to learn from in a few epochs.
        nn.init.normal_(net.patch_embed.proj.weight, std=0.5)  # pyright: ignore
        nn.init.normal_(net.pos_embed, std=0.5)  # pyright: ignore
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * -(-len(images.labels) // 64))
        for _ in range(epochs):
            for chosen in torch.randperm(len(images.labels)).split(64):
                down, right = torch.randint(-1, 2, (2,)).tolist()
                x = torch.roll(images.pixels[chosen], (down, right), (2, 3))
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), images.labels[chosen]).backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                schedule.step()
    return net.eval()


@dataclass(frozen=True)
class Kept:
    """A moment source of probes that are there already."""

    made: Probes = field(repr=False)

    def probes(self, model: object, inputs: object, generator: object, progress: object) -> Probes:
        """The probes."""
        return self.made


def written(model: nn.Module, example: ExampleInputs, texts: int, file: Path | None) -> Probes:
    """Text that the model writes itself, from a file if it is there."""
    if file is not None and file.is_file():
        stored = torch.load(file, weights_only=True)
        batches = tuple(ExampleInputs((), batch) for batch in stored["b"])
        return Probes(batches, ExampleInputs((), stored["h"]), False, matches_training_statistics=True)
    restorer = lbyl.LeastSquares(moments=lbyl.Generated(sequences=texts, length=LENGTH))
    made = restorer.make_probes(model, example, 0)
    if file is not None:
        torch.save({"b": [dict(b.kwargs) for b in made.batches], "h": dict(made.held_out.kwargs)}, file)
    return made


@dataclass
class Subject:
    """A network, and what the methods share.

    `kind` is the cost that is limited, `free` the part of it that no share is taken of.
    """

    name: str
    model: nn.Module
    example: Any
    kind: str
    score: Callable[[Any], dict[str, float]]
    shares: Sequence[float]
    free: float = 0.0
    probes: Callable[[ExampleInputs], Probes] | None = None

    def budget(self, share: float) -> lbyl.Budget:
        """The budget that takes this share away."""
        return lbyl.Budget(**{self.kind: 1 - share * (1 - self.free)}, depth=True)  # pyright: ignore[reportArgumentType]

    @cached_property
    def ground(self) -> DepthGround:
        """Blocks and probes, for the largest share."""
        inputs = ExampleInputs.of(self.example)
        made = self.probes(inputs) if self.probes else None
        restore = lbyl.LeastSquares(moments=Kept(made)) if made else choose_restorer(self.model, inputs)[0]
        budget = self.budget(max(self.shares))
        request = CompressionRequest({"*": 0.5}, budget, "inner", None, restore, 0, True, False, None, None, False)
        return ground_for_depth(prepare(self.model, self.example, request, None, Clock()), request, Clock())

    @cached_property
    def chosen(self) -> Chosen:
        """The blocks of the largest share; smaller shares lose the first ones of them."""
        return self.ground.choose()[0]

    def at(self, share: float) -> DepthGround:
        """The same for another share."""
        budget = self.budget(share)
        return replace(self.ground, budget=budget, request=replace(self.ground.request, budget=budget))

    def count(self, share: float, blocks: Sequence[str]) -> int:
        """How many of these blocks have to go."""
        ground, costs = self.at(share), self.ground.costs
        left = ground.whole - torch.tensor([0, *(costs[name] for name in blocks)]).cumsum(0)
        return int((left > ground.limit * (1 + 1e-9)).sum())

    @cached_property
    def streams(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Input and output of every block on held-out probes, channels last."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        given: dict[str, Tensor] = {}
        judged = self.ground.judged

        def rows(value: object) -> Tensor:
            tensor = first_float(value)
            assert tensor is not None
            tensor = tensor.detach() if tensor.dim() < 4 else tensor.detach().movedim(1, -1)
            return tensor.reshape(-1, tensor.shape[-1])[:4096].clone()

        def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[path] = rows((args, kwargs))

        def leave(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found[path] = given[path], rows(output)

        blocks = {block.name: judged.get_submodule(block.name) for block in self.ground.good}
        with module_hooks(blocks, enter, leave), torch.no_grad():
            self.ground.effect.parts[0].cloned().call(judged)
        return found

    def shortgpt(self, share: float) -> tuple[str, ...]:
        """The blocks of the least influence (arXiv 2403.03853)."""
        order = sorted(self.streams, key=lambda name: influence(*self.streams[name]))
        return tuple(order[: self.count(share, order)])

    def replaceme(self, share: float) -> tuple[str, ...]:
        """The run of blocks whose input and output are closest by cosine (arXiv 2505.02819); () if none is so long."""
        runs: dict[tuple[str, ...], float] = {}
        stacks = {block.stack for block in self.ground.good}
        for stack in stacks:
            names = [block.name for block in self.ground.good if block.stack == stack]
            for first in range(1, len(names)):
                number = self.count(share, names[first:])
                run = tuple(names[first : first + number])
                whole = (
                    [child_path(stack, str(int(run[0].rpartition(".")[2]) + i)) for i in range(number)] if run else []
                )
                if number <= len(names) - first and list(run) == whole and self._meets(share, run):
                    runs[run] = influence(self.streams[run[0]][0], self.streams[run[-1]][1])
        return min(runs, key=lambda run: runs[run]) if runs else ()

    def _meets(self, share: float, names: Sequence[str]) -> bool:
        ground = self.at(share)
        return ground.whole - sum(self.ground.costs[name] for name in names) <= ground.limit * (1 + 1e-9)

    def cut(self, method: str, share: float) -> tuple[nn.Module, int, float | None] | None:
        """The smaller network, its number of dropped blocks, and its effect on held-out probes, if there is one."""
        ground, count = self.at(share), self.count(share, self.chosen.blocks)
        if method in ("Plain", "ShortGPT"):
            names = self.chosen.blocks[:count] if method == "Plain" else self.shortgpt(share)
            cuts = ground.cuts(names)
            return without_blocks(self.model, cuts), len(names), ground.effect(without_blocks(ground.judged, cuts))
        if method == "ReplaceMe":
            names = self.replaceme(share)
            done = shallower(ground, Chosen(names), Clock()) if names else None
            return (done.model, len(names), done.effect) if done else None
        blocks = {"Restored": count, "Width": 0, "Both": count // 2}[method]
        try:
            made = attempt(ground, Way(self.chosen.first(blocks)), Clock())
        except lbyl.LbylError as error:
            Console().print(f"{self.name} {method} {share}: {error}")
            return None
        return made.result.model, blocks, made.effect


def subjects(named: Sequence[str], data: Path, model: Path | None, probes: Path | None, texts: int) -> list[Subject]:
    """The networks."""
    made = []
    if "vit" in named:
        held = held_out_digits()
        made.append(
            Subject(
                "vit", digits_vit(), held.pixels[:1], "macs", lambda n: {"accuracy": held.accuracy(n)}, (0.2, 0.3, 0.5)
            )
        )
    if "resnet56" in named:
        test = cifar10(data)
        test = replace(test, pixels=test.pixels[:2000], labels=test.labels[:2000])
        net = resnet56(data)
        made.append(
            Subject("resnet56", net, test.pixels[:1], "macs", lambda n: {"accuracy": test.accuracy(n)}, (0.2, 0.3, 0.5))
        )
    for name in (each for each in TEXTS if each in named):
        net, tokenizer = load(model)
        text = next(folder for folder in (data, data / "data") if (folder / "wikitext2_test.txt").is_file())
        tokens = {
            split: tokenizer((text / f"wikitext2_{split}.txt").read_text(), return_tensors="pt", verbose=False)
            for split in ("test", "valid")
        }
        read = tokens["test"].input_ids[0]
        example = {"input_ids": read[:64][None], "attention_mask": torch.ones(1, 64, dtype=torch.long)}
        total = sum(p.numel() for p in net.parameters())
        free = 1 - sum(p.numel() for p in net.model.layers.parameters()) / total
        source = lambda inputs, net=net: written(net, inputs, texts, probes)  # noqa: E731
        if name == "smollm2_read":
            rows = spread(tokens["valid"].input_ids[0], texts, LENGTH)
            parts = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(8)]
            restorer = lbyl.LeastSquares(moments=lbyl.Data(parts, len(parts)))
            source = lambda inputs, net=net, own=restorer: own.make_probes(net, inputs, 0)  # noqa: E731
        score = TextScore(net, Scores(spread(read, 16, WINDOW)))
        made.append(Subject(name, net, example, "params", score, (0.2, 0.1, 0.3, 0.4), free, source))
    return made


@dataclass(frozen=True)
class TextScore:
    """Perplexity and next words of a language model, and how fast it writes beside the unpruned one."""

    whole: Any
    scores: Scores

    def __call__(self, model: Any) -> dict[str, float]:
        """The scores, and the tokens a second with one text at a time and with sixteen."""
        if not self.scores.choices:
            self.scores(self.whole)  # what the others are compared with, also where its own cell is known
        return {**self.scores(model), **{f"pace_{rows}": pace(model, self.whole, rows) for rows in (1, 16)}}


def pace(model: Any, whole: Any, rows: int, tokens: int = 24, runs: int = 5) -> float:
    """How many times as fast as the unpruned model one writes, greedily with a cache: the median over runs in turns."""
    ids = torch.arange(rows * 32).reshape(rows, 32) % 1000 + 100
    settings: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    settings |= {"attention_mask": torch.ones_like(ids), "use_cache": True}
    calls = [lambda net=net: net.generate(ids, **settings) for net in (whole, model)]
    with torch.no_grad():
        before, after = interleaved(calls, [time.perf_counter] * 2, runs, 1)
    return before.over(after).median


def main(
    data: Annotated[Path, typer.Option(envvar="LBYL_DATA", help="Folder with weights, images and texts.")],
    model: Annotated[Path | None, typer.Option(help="Folder of a Llama model in place of SmolLM2-135M.")] = None,
    networks: Annotated[str, typer.Option(help="Which to measure.")] = ",".join(NAMES),
    methods: Annotated[str, typer.Option(help="Which to measure.")] = ",".join(METHODS),
    shares: Annotated[str | None, typer.Option(help="Which to measure; by default, three a network.")] = None,
    texts: Annotated[int, typer.Option(help="Sequences of 256 tokens that SmolLM2 writes.")] = 32,
    probes: Annotated[Path | None, typer.Option(help="File that keeps what SmolLM2 wrote.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is known.")] = False,
) -> None:
    """Measure what is not known yet, and write the file after each cell."""
    rooms, asked = (*ROOMS, "budget"), [float(share) for share in shares.split(",")] if shares else []
    run = Run(
        "depth", "Whole blocks", "python benchmarks/depth.py --data DIR", {"texts": texts}, pieced=True, rooms=rooms
    )
    for subject in subjects(networks.split(","), data, model, probes, texts):
        wanted = [("Unpruned", 0.0), *((m, s) for s in asked or subject.shares for m in methods.split(","))]
        for method, share in wanted:
            run.measurements = known_cells("depth")
            key = subject.name, method, share
            if any((c["network"], c["method"], c["share"]) == key for c in run.measurements) and not fresh:
                continue
            started = time.perf_counter()
            made = (subject.model, 0, 0.0) if method == "Unpruned" else subject.cut(method, share)
            found = subject.score(made[0].eval()) if made else {}
            about = {"blocks": made[1], "effect": made[2]} if made else {}
            cell = {"network": subject.name, "method": method, "share": share, **about, **found}
            cell |= {"seconds": round(time.perf_counter() - started, 1), "lbyl": version("lbyl")}
            others = [c for c in known_cells("depth") if (c["network"], c["method"], c["share"]) != key]
            run.measurements = [*others, cell]
            run.tables = tables(run.measurements)
            Console().print(run.write(), cell)


def tables(cells: Sequence[dict[str, Any]]) -> list[Table]:
    """A table a network and measure: a row a share, a column a method, and what the budget chooses."""
    made = []
    measures = [(n, "perplexity" if n in TEXTS else "accuracy") for n in NAMES]
    measures += [(n, m) for n in TEXTS for m in ("agreement", "pace_1", "pace_16")]
    for network, measure in measures:
        found = {(c["method"], c["share"]): c for c in cells if c["network"] == network and measure in c}
        if ("Unpruned", 0.0) not in found:
            continue
        rows = []
        for share in sorted({share for _, share in found} - {0.0}):
            values = [found.get((method, share), {}).get(measure) for method in METHODS]
            blocks = next(
                (c["blocks"] for m in ("Restored", "Plain") if (c := found.get((m, share), {})).get("blocks")), None
            )
            effects = {way: found.get((m, share), {}).get("effect") for m, way in WAYS.items()}
            known = {
                way: weighed(effect, way != "width", network == "smollm2")
                for way, effect in effects.items()
                if effect is not None
            }
            best = min(known, key=lambda way: known[way]) if len(known) == len(WAYS) else None
            rows.append([f"{share:.0%}", blocks, found["Unpruned", 0.0][measure], *values, best])
        columns = ["removed", "blocks", "unpruned", *METHODS, "chosen"]
        made.append(Table(f"{NAMES[network]}: {_MEASURES[measure]}", columns, rows, _NOTE if not made else ""))
    return made


_MEASURES = {
    "perplexity": "perplexity, lower is better",
    "accuracy": "accuracy (%)",
    "agreement": "share of next words that are the unpruned model's",
    "pace_1": "times as many tokens a second, one text at a time",
    "pace_16": "times as many tokens a second, sixteen texts at a time",
}
_NOTE = (
    "Removed is the share of the multiply-accumulates, and for SmolLM2 of the decoder layers' parameters. Plain: the "
    "blocks that lbyl chooses are dropped. Restored: what they did is left to the layer before them. ShortGPT: the "
    "blocks of the least influence are dropped plainly. ReplaceMe: its choice of one run of blocks, restored as ours "
    "are. Width: narrower layers alone. Both: half of the blocks, and narrower layers. Chosen is what lbyl keeps of "
    "Restored, Width and Both: what changes held-out probes least, but where the model wrote the probes itself, blocks "
    "are only dropped if they change them clearly less. lbyl.Budget(depth=True) tries a run of blocks as well. "
    "Tokens a second are beside those of the unpruned model, measured in turns on a CPU."
)


if __name__ == "__main__":
    typer.run(main)
