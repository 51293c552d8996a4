"""Drops whole experts of mixtures for a budget, restores the others, and verifies; with plan and report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lbyl.budget.budget import Budget
from lbyl.errors import BudgetError, InputError
from lbyl.graph.mixtures import Mixture, find_mixtures
from lbyl.io.huggingface import follow_widths, is_pretrained_model
from lbyl.io.report.rows import Row
from lbyl.moments.mixtures import expert_scores
from lbyl.pipeline.ground import Ground, after_earlier, effect_on, probed
from lbyl.pipeline.narrower import narrower, rest_of
from lbyl.pipeline.prepare import Prepared
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.restore.depth.effect import Effect
from lbyl.restore.experts import RIDGES, MixtureProblem, RestoredMixture, RestoredMixtures, restore_mixtures
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.copying import copy_model, sharing_copy, tensors_of
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Clock
from lbyl.selection.experts import highest, lowest_shares, same_share
from lbyl.surgery.attributes import Attribute
from lbyl.surgery.cuts import Cut, cut_copy
from lbyl.surgery.experts import Kept, expert_attributes, plan_experts, verify_experts
from lbyl.surgery.plan import GroupPlan, architecture_of, remember


@dataclass(frozen=True)
class ExpertGround(Ground):
    """What is known of a network before experts are chosen.

    Attributes:
        mixtures: the mixtures that can lose experts, in execution order.
        others: why other experts stay.
        scores: the score of each expert, by the path of the experts.
        effect: the effect on held-out probes.
    """

    mixtures: tuple[Mixture, ...]
    others: Mapping[str, str]
    scores: Mapping[str, Tensor]
    effect: Effect

    def choose(self, share: float = 1.0) -> Kept:
        """The experts that stay: those with the highest scores, and no more than the budget allows, if that is enough.

        All mixtures keep the same share, as configurations have one number of experts, unless layers may differ.

        Args:
            share: the share of what the budget asks for that experts save.
        """
        counts = {each.experts: each.count for each in self.mixtures}
        fewest = {each.experts: self._fewest(each) for each in self.mixtures}
        costs = {each.experts: self._cost(each) for each in self.mixtures}
        saving = (self.whole - self.limit) * share * (1 - 1e-9)
        uniform = self.budget.uniform_layers
        if is_pretrained_model(self.model) if uniform is None else uniform:
            kept = same_share(counts, fewest, costs, saving)
        else:
            kept = lowest_shares(self.scores, fewest, costs, saving)
        return {path: highest(self.scores[path], count) for path, count in kept.items()}

    @property
    def least(self) -> str:
        """How many experts must stay, and why."""
        first = self.mixtures[0]
        why = f"{first.chosen} for each token; min_keep, max_ratio"
        return f"{first.experts}: {self._fewest(first)} of {first.count} experts must stay ({why})"

    def _fewest(self, mixture: Mixture) -> int:
        """The smallest number of experts that a mixture may keep: a token needs so many. Excluded ones keep all."""
        if excludes(self.budget, mixture):
            return mixture.count
        least = math.ceil(mixture.count * (1 - self.budget.max_ratio) - 1e-9)
        return min(mixture.count, max(mixture.chosen, self.budget.min_keep, least))

    def _cost(self, mixture: Mixture) -> float:
        """What one expert of a mixture costs, with its row of the router."""
        of_bytes, parameters = self.budget.limited[0] == "size_mb", dict(self.model.named_parameters())
        own = tensors_of(self.model) if of_bytes else parameters
        stacked = [own[name] for name, _ in mixture.tensors if name in own]
        return sum(t.numel() * (t.element_size() if of_bytes else 1) for t in stacked) / mixture.count

    def cuts(self, kept: Kept) -> tuple[tuple[Cut, ...], tuple[Attribute, ...]]:
        """The cuts and the changed numbers that leave these experts."""
        return plan_experts(self.mixtures, kept), expert_attributes(self.model, self.mixtures, kept)


def ground_for_experts(prepared: Prepared, request: CompressionRequest, clock: Clock) -> ExpertGround:
    """Find the mixtures of a network, make probes, and score the experts.

    Raises:
        InputError: there is no mixture that can lose experts.
        RestorationError: the network does not run on the probes.
    """
    assert request.budget is not None
    mixtures, others = _found(prepared.model, prepared.inputs, request, clock)
    with clock("probe"):
        restorer, probes = probed(prepared, request)
        effect = effect_on(prepared.model, prepared.inputs, probes.held_out)
    ground = Ground(prepared, request, request.budget, restorer, probes)
    return _scored(ground, mixtures, others, effect, clock)


def experts_after(ground: Ground, model: nn.Module | None, effect: Effect, clock: Clock) -> ExpertGround:
    """The same for a network that has lost blocks, with the probes of the whole one; None for the whole one.

    Args:
        ground: what is known of the whole network.
        model: the network that has lost blocks.
        effect: the effect on the whole network's outputs.
        clock: measures the time.

    Raises:
        InputError: there is no mixture that can lose experts.
    """
    if model is not None:
        budget, prepared = rest_of(ground, model), replace(ground.prepared, model=model, forecaster=None)
        request = replace(ground.request, budget=budget)
        ground = Ground(prepared, request, budget, ground.restorer, ground.probes)
    return _scored(ground, *_found(ground.model, ground.prepared.inputs, ground.request, clock), effect, clock)


def _found(
    model: nn.Module, inputs: ExampleInputs, request: CompressionRequest, clock: Clock
) -> tuple[tuple[Mixture, ...], Mapping[str, str]]:
    """The mixtures that can lose experts, and why others can't."""
    assert request.budget is not None
    budget = request.budget
    if request.criterion is not None:
        raise InputError(
            "criterion and experts: whole experts are ranked by the norm of their outputs, weighted by the router; "
            "leave out criterion (--criterion)"
        )
    with clock("trace"), undisturbed(model):
        mixtures, others = find_mixtures(model, inputs)
    if all(excludes(budget, each) for each in mixtures):
        why = next((f"{path}: {why}" for path, why in others.items()), "")
        why = why or ("exclude matches all of them" if mixtures else "no module holds weights stacked by expert")
        raise InputError(
            f"{type(model).__name__} has no mixture of experts that could lose some ({why}); leave out experts "
            "(--experts)"
        )
    return mixtures, others


def _scored(
    ground: Ground, mixtures: tuple[Mixture, ...], others: Mapping[str, str], effect: Effect, clock: Clock
) -> ExpertGround:
    with clock("score experts"), undisturbed(ground.model):
        scores = expert_scores(ground.model, mixtures, ground.probes.batches)
    own = ground.prepared, ground.request, ground.budget, ground.restorer, ground.probes
    return ExpertGround(*own, mixtures, others, scores, effect)


def excludes(budget: Budget, mixture: Mixture) -> bool:
    """Whether a pattern of the budget matches a mixture."""
    names = (mixture.experts, mixture.router, mixture.block)
    return any(fnmatchcase(name, pattern) for pattern in budget.exclude for name in names)


@dataclass(frozen=True)
class Fewer:
    """The network without some experts, restored.

    Attributes:
        kept: the experts that stay.
        cuts: the cuts of tensors.
        attributes: the changed numbers.
        restored: how the others were restored.
        model: the network, with tensors of its own.
        verified: the relative difference from the whole network whose routers do not choose the dropped experts.
        errors: relative errors of the outputs on held-out probes, without and with restoration.
    """

    kept: Kept
    cuts: tuple[Cut, ...]
    attributes: tuple[Attribute, ...]
    restored: RestoredMixtures
    model: nn.Module
    verified: float | None
    errors: tuple[float, float]


def fewer_experts(ground: ExpertGround, kept: Kept, clock: Clock) -> Fewer:
    """Drop the other experts, verify, and solve those that stay for what the original mixtures gave.

    Raises:
        VerificationError: the smaller network computes something else than the whole one without these experts.
    """
    model, request = ground.model, ground.request
    cuts, attributes = ground.cuts(kept)
    with clock("cut"):
        smaller = cut_copy(model, cuts, attributes)
    verified = None
    if request.verify:
        with clock("verify"):
            verified = verify_experts(model, smaller, ground.prepared.inputs, ground.mixtures, kept)
    with clock("restore"):
        cut = [each for each in ground.mixtures if len(kept[each.experts]) < each.count]
        ridges, tokens = ground.solving(RIDGES)
        problem = MixtureProblem(
            model, smaller, cut, ground.probes.batches, ground.effect, ridges, tokens, request.seed, request.progress
        )
        restored = restore_mixtures(problem)
        done = copy_model(sharing_copy(smaller, restored.values)) if restored.values else smaller
        errors = ground.effect.error(smaller), ground.effect.error(done)
    return Fewer(kept, cuts, attributes, restored, done.eval(), verified, errors)


def compress_with_experts(prepared: Prepared, request: CompressionRequest, clock: Clock) -> Result:
    """Meet a budget by dropping whole experts, and leave what they did to the experts that stay.

    If the budget asks for more than experts can save, layers get narrower as well.

    Raises:
        InputError: there is no mixture that can lose experts.
        BudgetError: the budget can't be met.
    """
    ground = ground_for_experts(prepared, request, clock)
    made, _ = without_experts(ground, ground.choose(), clock)
    if not ground.meets(made.model):
        try:
            made = narrower(ground, made, clock)
        except BudgetError as error:
            raise BudgetError(f"{ground.least}, and {error}", error.reached) from None
    return ground.finished(made)


def without_experts(ground: ExpertGround, kept: Kept, clock: Clock) -> tuple[Result, int]:
    """The network with these experts and nothing else cut, with plan and report; and how many were dropped."""
    done = fewer_experts(ground, kept, clock)
    told = follow_widths(done.model, architecture_of(ground.model))
    fewer = [each for each in ground.mixtures if len(done.kept[each.experts]) < each.count]
    plan = ground.plan(
        tuple(GroupPlan(each.router, each.count, done.kept[each.experts]) for each in fewer), done.cuts, done.attributes
    )
    by_path = {each.experts: each for each in done.restored.mixtures}
    report = ground.report(
        done.model,
        clock,
        [*_notes(ground, done), *([told] if told else [])],
        ground.others,
        done.verified,
        ground.assessed(done.errors) if fewer else None,
        rows=tuple(_row(each, done.kept[each.experts], by_path[each.experts]) for each in fewer),
    )
    result = Result(done.model, after_earlier(ground.model, plan), report)
    remember(result.model, result.plan, result.report)
    return result, sum(each.count - len(kept[each.experts]) for each in ground.mixtures)


def _row(mixture: Mixture, kept: Sequence[int], restored: RestoredMixture) -> Row:
    gone = [expert for expert in range(mixture.count) if expert not in kept]
    note = f"experts {', '.join(map(str, gone))} dropped"
    note += f", not restored: {restored.why}" if restored.why else f", the others restored (ridge {restored.ridge:g})"
    note += f"; {restored.idle} experts got no token" if restored.idle else ""
    numbers = (None, None, None)
    return Row(mixture.router, mixture.count, len(kept), *numbers, seconds=0.0, note=note, errors=restored.errors)


def _notes(ground: ExpertGround, done: Fewer) -> Iterator[str]:
    gone = sum(each.count - len(done.kept[each.experts]) for each in ground.mixtures)
    if not gone:
        met = ground.meets(ground.model)
        yield "no expert had to be dropped for this budget" if met else f"no expert was dropped: {ground.least}"
        return
    effect, restored = ground.effect, done.restored
    yield (
        f"whole experts: {gone} of {sum(each.count for each in ground.mixtures)} are dropped, those with the least "
        f"mean norm of their outputs times the router's weight; {effect.told} on held-out probes: "
        f"{restored.plain:.3g} when they are dropped plainly, {restored.restored:.3g} with the others restored"
    )
    if ground.probes.note:
        yield ground.probes.note
