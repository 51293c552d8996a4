"""Drops whole experts of mixtures for a budget, restores the others, and verifies; with plan and report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lbyl.budget.budget import Budget
from lbyl.errors import BudgetError, InputError
from lbyl.graph.mixtures import Mixture, find_mixtures
from lbyl.io.huggingface import follow_widths, is_pretrained_model
from lbyl.io.report.rows import Row
from lbyl.moments.mixtures import expert_scores
from lbyl.pipeline.ground import Ground, after_earlier, effect_on, probed
from lbyl.pipeline.prepare import Prepared
from lbyl.pipeline.request import CompressionRequest
from lbyl.pipeline.result import Result
from lbyl.restore.depth.effect import Effect
from lbyl.restore.experts import RIDGES, MixtureProblem, RestoredMixture, RestoredMixtures, restore_mixtures
from lbyl.runtime.copying import copy_model, sharing_copy, tensors_of
from lbyl.runtime.progress import Clock
from lbyl.selection.experts import highest, lowest_shares, same_share, saved
from lbyl.surgery.attributes import Attribute
from lbyl.surgery.cuts import Cut, cut_copy
from lbyl.surgery.experts import Kept, expert_attributes, plan_experts, verify_experts
from lbyl.surgery.plan import GroupPlan, architecture_of


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

    def choose(self) -> Kept:
        """The experts that stay: as many as the budget allows, and those with the highest scores.

        All mixtures keep the same share, as configurations have one number of experts, unless layers may differ.

        Raises:
            BudgetError: the budget can't be met with as many experts as each token needs.
        """
        whole, limit = self.whole, self.limit
        counts = {each.experts: each.count for each in self.mixtures}
        fewest = {each.experts: self._fewest(each) for each in self.mixtures}
        costs = {each.experts: self._cost(each) for each in self.mixtures}
        saving = (whole - limit) * (1 - 1e-9)
        uniform = self.budget.uniform_layers
        if is_pretrained_model(self.model) if uniform is None else uniform:
            kept = same_share(counts, fewest, costs, saving)
        else:
            kept = lowest_shares(self.scores, fewest, costs, saving)
        if saved(counts, kept, costs) < saving:
            least, unit = whole - saved(counts, kept, costs), self.budget.unit
            first = self.mixtures[0]
            raise BudgetError(
                f"{first.experts}: {kept[first.experts]} of {first.count} experts must stay ({first.chosen} for each "
                f"token; min_keep, max_ratio), with which the network has {least:,.0f} {unit}, {least / whole:.1%} of "
                f"{whole:,}; the budget allows {limit:,.0f}. Give a larger budget, and compress the result once more "
                "without experts, for narrower layers",
                least / whole,
            )
        return {path: highest(self.scores[path], count) for path, count in kept.items()}

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
    budget, model, inputs = request.budget, prepared.model, prepared.inputs
    assert budget is not None
    if request.criterion is not None:
        raise InputError(
            "criterion and experts: whole experts are ranked by the norm of their outputs, weighted by the router; "
            "leave out criterion (--criterion)"
        )
    with clock("trace"):
        mixtures, others = find_mixtures(model, inputs)
    if all(excludes(budget, each) for each in mixtures):
        why = next((f"{path}: {why}" for path, why in others.items()), "")
        why = why or ("exclude matches all of them" if mixtures else "no module holds weights stacked by expert")
        raise InputError(
            f"{type(model).__name__} has no mixture of experts that could lose some ({why}); leave out experts "
            "(--experts)"
        )
    with clock("probe"):
        restorer, probes = probed(prepared, request)
    with clock("score experts"):
        scores = expert_scores(model, mixtures, probes.batches)
    with clock("probe"):
        effect = effect_on(model, inputs, probes.held_out)
    return ExpertGround(prepared, request, budget, restorer, probes, mixtures, others, scores, effect)


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

    Raises:
        InputError: there is no mixture that can lose experts.
        BudgetError: the budget can't be met with as many experts as each token needs.
    """
    ground = ground_for_experts(prepared, request, clock)
    done = fewer_experts(ground, ground.choose(), clock)
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
    return ground.finished(Result(done.model, after_earlier(ground.model, plan), report))


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
        yield "no expert had to be dropped for this budget"
        return
    effect, restored = ground.effect, done.restored
    yield (
        f"whole experts: {gone} of {sum(each.count for each in ground.mixtures)} are dropped, those with the least "
        f"mean norm of their outputs times the router's weight; {effect.told} on held-out probes: "
        f"{restored.plain:.3g} when they are dropped plainly, {restored.restored:.3g} with the others restored"
    )
    if ground.probes.note:
        yield ground.probes.note
