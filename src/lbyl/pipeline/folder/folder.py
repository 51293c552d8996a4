"""`compress_folder`: a language model from a folder to a smaller one in another, one decoder layer at a time."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lbyl.budget.budget import Budget
from lbyl.errors import InputError
from lbyl.io import artifact
from lbyl.io.experts import StackedShards
from lbyl.io.files import digest as files_digest
from lbyl.io.files import finish, writing
from lbyl.io.report.report import Report
from lbyl.io.shards import Shards, write_shard
from lbyl.moments.data import Data
from lbyl.pipeline.compress import compress
from lbyl.pipeline.folder.layers import LayerNetwork, Skeleton, pattern_names
from lbyl.pipeline.folder.probes import Batches, Streams, Text
from lbyl.pipeline.folder.stored import check_stored, check_values, stored_dtype
from lbyl.pipeline.folder.whole import assembled, check_plan_fits, ratio_for_budget, within
from lbyl.pipeline.folder.work import Done, Work, working_folder
from lbyl.pipeline.sweep.cache import digest
from lbyl.restore.least_squares.restorer import LeastSquares
from lbyl.runtime.checks import as_path, check_seed, check_switch, is_folder, named_kind
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.memory import give_back
from lbyl.runtime.progress import Progress
from lbyl.runtime.settings import described
from lbyl.runtime.version import library_version
from lbyl.selection.criteria.base import Criterion, SeeingCriterion
from lbyl.selection.select import Ratio, checked_ratio
from lbyl.surgery.cuts import cut_copy
from lbyl.surgery.plan import Plan


@dataclass(frozen=True)
class CompressedFolder:
    """A written folder, with its plan and its report.

    Attributes:
        path: the folder, which ``from_pretrained`` and :func:`lbyl.load` read.
        plan: the cuts and the settings.
        report: a row for each group, totals and notes.
    """

    path: Path
    plan: Plan
    report: Report


def compress_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    ratio: Ratio | None = None,
    budget: Budget | None = None,
    data: Batches = None,
    criterion: str | Criterion | SeeingCriterion = "auto",
    restore: LeastSquares | None = None,
    seed: int = 0,
    verify: bool = True,
    progress: Progress | None = None,
) -> CompressedFolder:
    """Compress a language model from a folder to a folder, in the memory that one decoder layer takes.

    Decoder layers are read, cut, restored and written one after the other. Besides a layer, memory holds the residual
    streams of all sequences, and at the beginning and the end the embedding. Weights and solutions are those of
    :func:`lbyl.compress` on the same text, with one difference: whether restoration, and for layers with a bias
    recalibration, lowers the error on held-out text is judged at the output of each layer, and not at the model's.

    A killed run leaves a hidden folder beside the target. The same call then goes on with the layer that was not
    finished. The target gets its name when everything is written.

    Args:
        source: a folder that ``save_pretrained`` wrote, with weights as safetensors, of a causal language model in the
            form of Llama (Llama, Mistral, Qwen2, Qwen3), also with mixtures of experts (Mixtral, Qwen-MoE, OLMoE,
            DeepSeek, gpt-oss); it is not changed.
        target: the new folder.
        ratio: share of the heads and hidden neurons that each layer loses; or ``{glob: share}`` over groups and layers.
        budget: ``Budget(params=...)`` or ``Budget(size_mb=...)`` in place of a ratio: the widest feed-forward layers
            with which the model keeps it, all narrower by the same share. Heads are left whole.
        data: a folder of texts, or batches of tokens (the last one is held out). None takes English sentences that
            come with lbyl. The model writes no text itself, because that takes the whole model.
        criterion: as for :func:`lbyl.compress`.
        restore: settings of the restoration; its source of moments is replaced by the data. None takes the defaults.
        seed: seed of all random numbers.
        verify: whether to compare each cut layer with the masked one.
        progress: called as ``progress(stage, done, total)`` for each layer; the stage says the time that is left.

    Raises:
        InputError: a setting can't be used, the folder holds no such model, or the target exists.
    """
    folder, place = as_path(source, "source"), as_path(target, "target")
    if restore is not None and not isinstance(restore, LeastSquares):
        raise InputError(f"restore is {named_kind(restore)}; pass lbyl.LeastSquares(...), or None for the defaults")
    check_seed(seed)
    check_switch("verify={}", verify)
    if progress is not None and not callable(progress):
        raise InputError(f"progress is {named_kind(progress)}; pass a function of stage, done and total")
    artifact.check_free(place)
    if not is_folder(folder):
        raise InputError(f"{folder} is not a folder; pass one that save_pretrained wrote")
    skeleton = Skeleton.of(folder)
    stored = StackedShards.over(Shards.of(folder), {n: tuple(t.shape) for n, t in skeleton.model.state_dict().items()})
    check_plan_fits(skeleton.base.layers)
    check_stored(skeleton, stored)
    skeleton.model.to(stored_dtype(skeleton, stored))
    shares, told = _shares(skeleton, ratio, budget)
    text = Text.of(data, skeleton.model, folder, seed)
    settings = _Settings(shares, criterion, restore or LeastSquares(), seed, verify)
    begun = _fingerprint(stored, settings, text)
    with working_folder(place, skeleton.count, begun) as work:
        run = _Run(skeleton, stored, settings, work, progress)
        check_values(skeleton, stored, progress)
        done, note = run.all_layers(text.batches)
        if _fingerprint(stored, settings, text) != begun:
            raise InputError(f"{folder} has changed meanwhile; remove {work.place} and begin again")
        notes = (f"one layer at a time, on {text.note}", *told, note)
        origin = f"hf:{folder}", text.batches[0].map(lambda tensor: tensor[:1]).describe()
        return _written(run, done, place, origin, notes)


@dataclass(frozen=True)
class _Settings:
    """The settings of all layers."""

    ratio: Ratio
    criterion: str | Criterion | SeeingCriterion
    restore: LeastSquares
    seed: int
    verify: bool


@dataclass(frozen=True)
class _Run:
    """One run over all layers."""

    skeleton: Skeleton
    stored: Shards
    settings: _Settings
    work: Work
    progress: Progress | None

    def all_layers(self, batches: Sequence[ExampleInputs]) -> tuple[list[Done], str]:
        """Compress what is not finished yet.

        Returns:
            What was done to each layer, and a note about the held-out batch.
        """
        embedding = self._read(self.skeleton.embedding)
        streams = Streams.start(self.skeleton.embedded(list(batches), embedding))
        write_shard(self.work.shard(0), embedding)
        del embedding
        give_back()
        found, started, solved = list[Done](), time.perf_counter(), 0
        for index in range(self.skeleton.count):
            self._report(index, time.perf_counter() - started, solved)
            known = self.work.done(index)
            solved += known is None
            streams, done = self._layer(index, streams, known)
            found.append(done)
            gc.collect()  # a traced layer refers to itself, and would keep its weights in memory
            give_back()
        rest = self._read(self.skeleton.rest(self.stored.files))
        write_shard(self.work.shard(self.skeleton.count + 1), rest)
        head = rest if "lm_head.weight" in rest else {**rest, **self._read(self.skeleton.embedding)}
        error, same = streams.compared(self.skeleton.head(head))
        return found, (
            f"on the held-out batch, {same:.1%} of the most likely next tokens are the original's; relative error "
            f"{error:.3g} after the last norm"
        )

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors, in the type that all of them get."""
        dtype = self.skeleton.model.get_parameter(self.skeleton.embedding[0]).dtype
        return {name: tensor.to(dtype) for name, tensor in self.stored.read(names).items()}

    def _report(self, index: int, seconds: float, solved: int) -> None:
        """Say which layer is next, and how long the rest takes if each layer takes as long as those before."""
        if self.progress:
            count = self.skeleton.count
            left = f", {_spoken(seconds / solved * (count - index))} left" if solved else ""
            self.progress(f"layer {index + 1} of {count}{left}", index, count)

    def _layer(self, index: int, streams: Streams, known: Done | None) -> tuple[Streams, Done]:
        """Compress a layer, or read it if it is finished, and run both versions of it."""
        tensors = self._read(self.skeleton.names(index))
        original = self.skeleton.layer(index, tensors)
        if known is not None:
            cut, done = self._finished(index, original, known), known
        else:
            cut, done = self._compressed(index, original, streams)
            write_shard(self.work.shard(index + 1), {n: t for n, t in cut.state_dict().items() if n in tensors})
            self.work.finish(index, done)
        return streams.after(original, cut), done

    def _finished(self, index: int, original: LayerNetwork, known: Done) -> nn.Module:
        """The smaller network of a layer that an earlier run finished."""
        file = self.work.shard(index + 1)
        tensors = Shards(file.parent, dict.fromkeys(self.skeleton.names(index), file.name)).read(
            self.skeleton.names(index)
        )
        plan = known.plan
        cut = original if plan is None else cut_copy(original, plan.cuts, plan.attributes)
        cut.load_state_dict(tensors, strict=True)
        return cut

    def _compressed(self, index: int, original: LayerNetwork, streams: Streams) -> tuple[nn.Module, Done]:
        """The smaller network of a layer."""
        ratio = within(self.settings.ratio, self.skeleton.layer_names(index))
        if not ratio:
            return original, Done(None, None)
        batches = streams.original
        result = compress(
            original,
            batches[0].map(lambda tensor: tensor[:1]),
            ratio=ratio,
            criterion=self.settings.criterion,
            restore=replace(self.settings.restore, moments=Data(batches, len(batches))),
            seed=self.settings.seed,
            verify=self.settings.verify,
            forecast=False,
        )
        return result.model, Done(result.plan, result.report)


def _shares(skeleton: Skeleton, ratio: Ratio | None, budget: Budget | None) -> tuple[Ratio, tuple[str, ...]]:
    """The ratio of every layer, and a note on how it follows from a budget."""
    if (ratio is None) == (budget is None):
        raise InputError("give either a ratio or a budget")
    if budget is not None:
        return ratio_for_budget(skeleton, budget)
    assert ratio is not None
    ratio = checked_ratio(ratio)
    known = pattern_names(skeleton.model)
    for pattern in ratio if isinstance(ratio, Mapping) else ():
        if not any(fnmatchcase(name, pattern) for name in known):
            raise InputError(f"ratio: {pattern!r} matches no layer of the model")
    if not any(ratio.values() if isinstance(ratio, Mapping) else [ratio]):
        raise InputError("ratio: nothing is dropped at ratio 0")
    if not any(within(ratio, skeleton.layer_names(index)) for index in range(skeleton.count)):
        raise InputError("ratio: its patterns drop nothing in the decoder layers, and only these lose channels")
    return ratio, ()


def _spoken(seconds: float) -> str:
    """An estimated time."""
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


def _fingerprint(stored: Shards, settings: _Settings, text: Text) -> dict[str, Any]:
    """Everything that the finished layers depend on, as plain data."""
    stats = {path.name: path.stat() for path in stored.paths()}
    return {
        "lbyl": library_version(),
        "configuration": files_digest(stored.folder / "config.json"),
        "source": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "ratio": dict(settings.ratio) if isinstance(settings.ratio, Mapping) else settings.ratio,
        "criterion": repr(settings.criterion),
        "restore": repr(described(settings.restore)),
        "seed": int(settings.seed),
        "verify": settings.verify,
        "data": digest(tensor for batch in text.batches for tensor in batch.tensors()),
    }


def _written(
    run: _Run, done: Sequence[Done], target: Path, origin: tuple[str, str], notes: tuple[str, ...]
) -> CompressedFolder:
    """Write configuration, index and documents, and give the folder its name."""
    content = run.work.content
    plan, report = assembled(run.skeleton.model, done, content, run.work.shards(), *origin)
    report = replace(report, notes=(*report.notes, *notes))
    with writing(target):
        artifact.write_documents(content, target, plan, report)
        finish(content)
        artifact.check_free(target)
        content.rename(target)
    return CompressedFolder(target, plan, report)
