"""What concerns all layers together: which ratio each one has, and the plan, report and configuration of the whole."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from lbyl.budget.budget import Budget
from lbyl.errors import BudgetError, InputError
from lbyl.graph.experts import ALIGNED
from lbyl.graph.mixtures import stacked_experts
from lbyl.io.huggingface import write_config
from lbyl.io.report.report import Report
from lbyl.io.shards import write_index
from lbyl.pipeline.layerwise.layers import Skeleton
from lbyl.pipeline.layerwise.work import Done
from lbyl.runtime.checks import named_kind
from lbyl.runtime.documents import LARGEST
from lbyl.runtime.macs import count_parameters
from lbyl.selection.select import Ratio, kept_count
from lbyl.surgery.cuts import cut_copy
from lbyl.surgery.plan import Plan, architecture_of

_NEURONS = "*.mlp.*"
"""The groups of hidden neurons of feed-forward layers."""


def within(ratio: Ratio, names: Sequence[str]) -> Ratio | None:
    """The part of a ratio that concerns a layer with these names; None if the layer loses nothing."""
    if not isinstance(ratio, Mapping):
        return ratio or None
    own = {glob: share for glob, share in ratio.items() if any(fnmatchcase(name, glob) for name in names)}
    # The last pattern that matches a name counts.
    lost = ([share for glob, share in own.items() if fnmatchcase(name, glob)] for name in names)
    return own if any(shares and shares[-1] for shares in lost) else None


def ratio_for_budget(skeleton: Skeleton, budget: Budget) -> tuple[Ratio, tuple[str, ...]]:
    """The ratio of the feed-forward layers that keeps a budget of parameters or bytes, and a note about it.

    Raises:
        InputError: the budget limits something else, or has settings that need all layers at once.
        BudgetError: the feed-forward layers can't be narrow enough.
    """
    if not isinstance(budget, Budget):
        raise InputError(f"budget is {named_kind(budget)}; pass lbyl.Budget(params=...) or lbyl.Budget(size_mb=...)")
    name, amount = budget.limited
    other = budget.beyond_width or budget.exclude or budget.uniform_layers is False
    if name not in ("params", "size_mb") or other:
        raise InputError(
            "layer by layer, a budget is Budget(params=...) or Budget(size_mb=...), with one width for all layers and "
            "without depth, experts, head_dim or exclude; give a ratio, or use lbyl.compress"
        )
    model = skeleton.model
    size = next(p.element_size() for p in model.parameters())
    whole, neurons = count_parameters(model), list(_hidden_neurons(skeleton.base.layers))
    if not neurons:
        raise InputError(
            f"{type(model).__name__} has no feed-forward layers that are known by their names; give a ratio"
        )
    most = whole * amount if name == "params" else amount * 1e6 / size
    width = max(each.width for each in neurons)

    def left(kept: int) -> int:
        """The parameters that are left if all layers keep this share of their neurons."""
        return whole - sum((each.width - each.kept(1 - kept / width)) * each.cost for each in neurons)

    multiple = budget.multiple(width)
    steps = range(0, width + 1, multiple)
    kept = steps[max(0, bisect_right(steps, most, key=left) - 1)]
    least = max(budget.min_keep, kept_count(width, budget.max_ratio))
    if kept < least:
        reached = left(least) / whole
        raise BudgetError(
            f"Budget({name}={amount:g}): with {least} of {width} hidden neurons in each layer, {reached:.1%} of the "
            "parameters are left; give a ratio, which takes heads as well, or a larger budget",
            reached,
        )
    if kept >= width:
        raise InputError(f"Budget({name}={amount:g}): the model keeps this already, so there is nothing to drop")
    alike = all(each.width == width for each in neurons)
    what = "in each layer" if alike else "in the widest layers, and the same share in all others,"
    told = f"{kept} of {width} hidden neurons {what} keep the budget; heads are left whole"
    return {_NEURONS: 1 - kept / width}, (told,)


@dataclass(frozen=True)
class _Neurons:
    """Hidden neurons of a feed-forward layer; those of all experts of a mixture count as one.

    Attributes:
        width: how many there are.
        cost: the parameters of each.
        multiple: what their number is rounded to, up or down.
    """

    width: int
    cost: int
    multiple: int

    def kept(self, share: float) -> int:
        """The most that stay if this share goes."""
        return min(self.width, math.ceil(kept_count(self.width, share) / self.multiple) * self.multiple)


def _hidden_neurons(layers: nn.Module) -> Iterator[_Neurons]:
    """The hidden neurons of each feed-forward layer, by the names that layers in the form of Llama have."""
    mixtures = [path for path, module in layers.named_modules() if stacked_experts(module)]
    for path, module in layers.named_modules():
        if ".mlp" not in f".{path}":
            continue
        # Experts keep a multiple, and layers beside them may follow.
        beside = any(path.startswith(mixture.rpartition(".")[0]) for mixture in mixtures)
        multiple = ALIGNED if beside else 1
        own = dict(module.named_parameters(recurse=False))
        if stacked_experts(module) and {"gate_up_proj", "down_proj"} <= own.keys():
            inner, outer = sorted(own["down_proj"].shape[1:]), own["gate_up_proj"].shape[1:]
            width = next((n for n in inner if 2 * n in outer), 0)
            if width:
                cost = sum(p.numel() for p in own.values() if {width, 2 * width} & {*p.shape[1:]}) // width
                yield _Neurons(width, cost, multiple)
        elif isinstance(down := getattr(module, "down_proj", None), nn.Linear):
            width = down.in_features
            into = [
                child for child in module.children() if isinstance(child, nn.Linear) and child.out_features == width
            ]
            cost = (sum(p.numel() for child in into for p in child.parameters()) + down.weight.numel()) // width
            yield _Neurons(width, cost, multiple)


def check_plan_fits(layers: nn.Module) -> None:
    """Raise InputError if the plan of all layers could be too large to be read back: before any layer takes time.

    Each dimension of a parameter may be cut to any of its channels, of which a plan holds bits in base64.
    """
    most = sum(_BESIDE + sum(size / 6 for size in p.shape) for p in layers.parameters())
    if most > LARGEST:
        raise InputError(
            f"a plan of {most / 2**20:.0f} MiB may be needed to say which channels are kept, "
            f"but no more than {LARGEST / 2**20:.0f} MiB can be read back: the model has too many layers and channels"
        )


_BESIDE = 600
"""Bytes that plan and report need for a parameter beside its channels, at most: its names, sizes and errors."""


@dataclass(frozen=True)
class Joined:
    """What was done to all layers together.

    Attributes:
        plan: the cuts of all layers.
        smaller: the smaller model without weights.
        report: a row for each group, totals and notes.
    """

    plan: Plan
    smaller: nn.Module
    report: Report


def joined(model: nn.Module, done: Sequence[Done], source: str | None, inputs: str) -> Joined:
    """The plan and the report of all layers together.

    Args:
        model: the unpruned model, on the meta device.
        done: what was done to each layer.
        source: the source of the unpruned model.
        inputs: dtype and shape of the model's inputs.
    """
    plans = [each.plan for each in done if each.plan is not None]
    reports = [each.report for each in done if each.report is not None]
    cuts = tuple(cut for plan in plans for cut in plan.cuts)
    attributes = tuple(attribute for plan in plans for attribute in plan.attributes)
    smaller = cut_copy(model, cuts, attributes)
    plan = replace(
        plans[0],
        groups=tuple(group for each in plans for group in each.groups),
        cuts=cuts,
        attributes=attributes,
        architecture=architecture_of(model),
        source=source,
        inputs=inputs,
        network=type(model).__name__,
    )
    return Joined(plan, smaller, _summed(reports, count_parameters(model), count_parameters(smaller)))


def written_config(all_layers: Joined, folder: Path, files: Sequence[str]) -> str:
    """Write index and configuration of the smaller model into its folder, and return a note for the report.

    Args:
        all_layers: what was done to all layers.
        folder: the folder of the weights.
        files: the names of their files.

    Raises:
        InputError: the stored weights do not have the shapes of the smaller model.
    """
    stored = write_index(folder, files).shapes()
    expected = {n: tuple(t.shape) for n, t in all_layers.smaller.state_dict().items()}
    for name in stored:
        if stored[name] != expected.get(name):
            raise InputError(f"{name} was written as {stored[name]}, but the smaller model has {expected.get(name)}")
    return write_config(folder, all_layers.smaller, all_layers.plan.widths_before)


def _summed(reports: Sequence[Report], before: int, after: int) -> Report:
    """The reports of all layers as one."""
    verified = [each.verified for each in reports if each.verified is not None]
    seconds: dict[str, float] = {}
    for each in reports:
        for stage, time in each.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + time
    notes = dict.fromkeys(text for each in reports for text in each.notes if not text.startswith("Data: "))
    return Report(
        rows=tuple(row for each in reports for row in each.rows),
        left=tuple(pair for each in reports for pair in each.left),
        barriers=tuple(dict.fromkeys(barrier for each in reports for barrier in each.barriers)),
        parameters=(before, after),
        macs=None,
        verified=max(verified) if verified else None,
        seconds=seconds,
        notes=tuple(notes),
    )
