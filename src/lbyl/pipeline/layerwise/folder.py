"""`compress_folder`: a language model from a folder to a smaller one in another, one decoder layer at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from lbyl.pipeline.layerwise.layers import LayerNetwork, Skeleton
from lbyl.pipeline.layerwise.probes import Batches, Text
from lbyl.pipeline.layerwise.run import LayerSettings, LayerwiseRun, check_settings, shares
from lbyl.pipeline.layerwise.stored import check_stored, check_values, stored_dtype
from lbyl.pipeline.layerwise.whole import check_plan_fits, joined, written_config
from lbyl.pipeline.layerwise.work import Done, Work, working_folder
from lbyl.pipeline.sweep.cache import digest
from lbyl.restore.least_squares.restorer import LeastSquares
from lbyl.runtime.checks import as_path, is_folder
from lbyl.runtime.contexts import own_settings
from lbyl.runtime.progress import Progress, cancelable
from lbyl.runtime.settings import described
from lbyl.runtime.version import library_version
from lbyl.selection.criteria.base import Criterion, SeeingCriterion
from lbyl.selection.select import Ratio
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


@cancelable
@own_settings()
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
    check_settings(restore, seed, verify, progress)
    artifact.check_free(place)
    if not is_folder(folder):
        raise InputError(f"{folder} is not a folder; pass one that save_pretrained wrote")
    skeleton = Skeleton.of(folder)
    stored = StackedShards.over(Shards.of(folder), {n: tuple(t.shape) for n, t in skeleton.model.state_dict().items()})
    check_plan_fits(skeleton.base.layers)
    check_stored(skeleton, stored)
    skeleton.model.to(stored_dtype(skeleton, stored))
    ratio, told = shares(skeleton, ratio, budget)
    text = Text.of(data, skeleton.model, folder, seed)
    settings = LayerSettings(ratio, criterion, restore or LeastSquares(), seed, verify)
    begun = _fingerprint(stored, settings, text)
    with working_folder(place, skeleton.count, begun) as work:
        check_values(skeleton.all_names(stored.files), lambda name: stored.read([name])[name], progress)
        run = LayerwiseRun(skeleton, _Files(skeleton, stored, work), settings, progress)
        done, note = run.all_layers(text.batches)
        if _fingerprint(stored, settings, text) != begun:
            raise InputError(f"{folder} has changed meanwhile; remove {work.place} and begin again")
        notes = (f"one layer at a time, on {text.note}", *told, note)
        origin = f"hf:{folder}", text.batches[0].map(lambda tensor: tensor[:1]).describe()
        return _written(skeleton.model, work, done, place, origin, notes)


@dataclass(frozen=True)
class _Files:
    """Weights that are read from the files of one folder, and written to those of another."""

    skeleton: Skeleton
    stored: Shards
    work: Work

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors, in the type that all of them get."""
        dtype = self.skeleton.model.get_parameter(self.skeleton.embedding[0]).dtype
        return {name: tensor.to(dtype) for name, tensor in self.stored.read(names).items()}

    def rest(self) -> list[str]:
        """Last norm, and the output layer unless it is tied."""
        return self.skeleton.rest(self.stored.files)

    def finished(self, index: int, original: LayerNetwork) -> tuple[nn.Module, Done] | None:
        """The smaller network of a layer whose file is written."""
        done = self.work.done(index)
        if done is None:
            return None
        names, file = self.skeleton.names(index), self.work.shard(index + 1)
        tensors = Shards(file.parent, dict.fromkeys(names, file.name)).read(names)
        cut = original if done.plan is None else cut_copy(original, done.plan.cuts, done.plan.attributes)
        cut.load_state_dict(tensors, strict=True)
        return cut, done

    def keep(self, index: int, cut: nn.Module, done: Done) -> None:
        """Write a layer, and say that it is finished."""
        names = set(self.skeleton.names(index))
        write_shard(self.work.shard(index + 1), {n: t for n, t in cut.state_dict().items() if n in names})
        self.work.finish(index, done)

    def keep_whole(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that stay as they are."""
        write_shard(self.work.shard(index + 1), dict(tensors))


def _fingerprint(stored: Shards, settings: LayerSettings, text: Text) -> dict[str, Any]:
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
    model: nn.Module,
    work: Work,
    done: Sequence[Done],
    target: Path,
    origin: tuple[str, str],
    notes: tuple[str, ...],
) -> CompressedFolder:
    """Write configuration, index and documents, and give the folder its name."""
    content = work.content
    whole = joined(model, done, *origin)
    told = written_config(whole, content, work.shards())
    plan, report = whole.plan, replace(whole.report, notes=(*whole.report.notes, told, *notes))
    with writing(target):
        artifact.write_documents(content, target, plan, report)
        finish(content)
        artifact.check_free(target)
        content.rename(target)
    return CompressedFolder(target, plan, report)
