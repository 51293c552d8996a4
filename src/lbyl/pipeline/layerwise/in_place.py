"""`compress_in_place`: a language model in memory becomes smaller itself, one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lbyl.budget.budget import Budget
from lbyl.errors import InputError, LbylError
from lbyl.io.huggingface import follow_widths
from lbyl.pipeline.layerwise.layers import LayerNetwork, Skeleton
from lbyl.pipeline.layerwise.probes import Batches, Text
from lbyl.pipeline.layerwise.run import LayerSettings, LayerwiseRun, check_settings, shares
from lbyl.pipeline.layerwise.whole import check_plan_fits, joined
from lbyl.pipeline.layerwise.work import Done
from lbyl.pipeline.prepare import check_device, check_weights, plain_module
from lbyl.pipeline.result import Result
from lbyl.pipeline.walk import from_the_start
from lbyl.restore.least_squares.restorer import LeastSquares
from lbyl.runtime.contexts import own_settings, undisturbed
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.progress import Progress, cancelable
from lbyl.selection.criteria.base import Criterion, SeeingCriterion
from lbyl.selection.select import Ratio
from lbyl.surgery.cuts import cut_in_place
from lbyl.surgery.plan import remember, remembered


@cancelable
@own_settings()
def compress_in_place(
    model: nn.Module,
    *,
    ratio: Ratio | None = None,
    budget: Budget | None = None,
    data: Batches = None,
    criterion: str | Criterion | SeeingCriterion = "auto",
    restore: LeastSquares | None = None,
    seed: int = 0,
    verify: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Compress a language model that is in memory, and **change the model itself**, one decoder layer at a time.

    :func:`lbyl.compress` leaves the model as it is, so that the smaller one needs memory beside it. Here each layer
    takes the place of the unpruned one, and memory only holds what one layer needs beside the model. Weights and
    solutions are those of :func:`lbyl.compress` on the same text, with one difference: whether restoration lowers the
    error on held-out text is judged at the output of each layer, and not at the model's. :func:`lbyl.compress_folder`
    does the same for a model that memory does not hold at all.

    Args:
        model: a causal language model of transformers in the form of Llama (Llama, Mistral, Qwen2, Qwen3), also with
            mixtures of experts. It is changed. If an error is raised after the first layer, the error says which layers
            are smaller already; the model still runs.
        ratio: share of the heads and hidden neurons that each layer loses; or ``{glob: share}`` over groups and layers.
        budget: ``Budget(params=...)`` or ``Budget(size_mb=...)`` in place of a ratio: the widest feed-forward layers
            with which the model keeps it, all narrower by the same share. Heads are left whole.
        data: a folder of texts, or batches of tokens (the last one is held out). None takes text that the model writes
            itself.
        criterion: as for :func:`lbyl.compress`.
        restore: settings of the restoration; its source of moments is replaced by the data. None takes the defaults.
        seed: seed of all random numbers.
        verify: whether to compare each cut layer with the masked one.
        progress: called as ``progress(stage, done, total)`` for each layer; the stage says the time that is left.

    Returns:
        The model itself, with the plan and the report.

    Raises:
        InputError: a setting can't be used, the model has another form, or its layers share weights.
        BudgetError: the feed-forward layers can't be narrow enough.
    """
    check_settings(restore, seed, verify, progress)
    model = plain_module(model)
    skeleton = Skeleton.of_model(model)
    _check_own_weights(model, skeleton)
    check_weights(model)
    check_plan_fits(skeleton.base.layers)
    ratio, told = shares(skeleton, ratio, budget)
    settings = LayerSettings(ratio, criterion, restore or LeastSquares(), seed, verify)
    with undisturbed(model):
        text = Text.in_memory(data, model, seed, progress)
    place = next(model.parameters()).device
    batches = tuple(batch.to(place) for batch in text.batches)
    check_device(model, batches[0])
    first = remembered(model)
    weights = _InPlace(model, skeleton, [])
    try:
        done, note = LayerwiseRun(skeleton, weights, settings, progress).all_layers(batches)
    except LbylError as error:
        if not weights.cut:
            raise
        layers = ", ".join(map(str, weights.cut))
        raise type(error)(f"{error}. These layers of the model are smaller already: {layers}") from error
    whole = joined(skeleton.model, done, None, batches[0].map(lambda tensor: tensor[:1]).describe())
    notes = (f"in place, one layer at a time, on {text.note}", *told, note)
    config = follow_widths(model, whole.plan.architecture)
    notes = (*whole.report.notes, *notes, *([config] if config else ()))
    result = Result(model, whole.plan, replace(whole.report, notes=notes))
    result = from_the_start(result, skeleton.model, first)
    remember(model, result.plan, result.report)
    return result


@dataclass(frozen=True)
class _InPlace:
    """The weights of a model in memory, which get smaller where they are.

    Attributes:
        model: the model.
        skeleton: the model without weights.
        cut: the numbers of the layers that are smaller already.
    """

    model: nn.Module
    skeleton: Skeleton
    cut: list[int]

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The model's own tensors."""
        own = tensors_of(self.model)
        return {name: own[name] for name in names}

    def rest(self) -> list[str]:
        """Last norm and output layer."""
        return self.skeleton.rest(self.model.state_dict())

    def finished(self, index: int, original: LayerNetwork) -> tuple[nn.Module, Done] | None:
        """None: nothing is kept of runs that were stopped."""
        return None

    def keep(self, index: int, cut: nn.Module, done: Done) -> None:
        """Make a layer smaller."""
        if done.plan is not None:
            own = tensors_of(cut)
            values = {name: own[name] for name in self.skeleton.names(index)}
            cut_in_place(self.model, done.plan.cuts, done.plan.attributes, values)
            self.cut.append(index)

    def keep_whole(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: these tensors are where they belong."""


def _check_own_weights(model: Any, skeleton: Skeleton) -> None:
    """Raise InputError if hooks move weights, or if layers share weights, for then no layer can be cut by itself."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise InputError(
            "accelerate moves weights of this model by hooks; load it on one device, or pass its folder to "
            "lbyl.compress_folder"
        )
    own, owner = tensors_of(model), dict[int, int]()
    for index in range(skeleton.count):
        for name in skeleton.names(index):
            if owner.setdefault(id(own[name]), index) != index:
                raise InputError(f"{name} is also a weight of layer {owner[id(own[name])]}; use lbyl.compress")
