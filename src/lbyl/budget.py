"""Widths for a budget: which group loses how many channels, so that the predicted error is least.

Every group has an error curve: how much of its readers' output is lost when its k least important channels go and the
others make up for them by least squares. The whole curve falls out of one Cholesky factor. What a channel costs
depends on how wide its neighbors are, so channels are dropped step by step, always where the error that is added is
least for the cost that is saved.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lbyl.errors import InputError
from lbyl.graph import NOT_OURS, Graph, Group

TOLERANCE = 0.02
_RIDGE = 1e-2
_PRODUCTS = ("scaled_dot_product_attention", "matmul", "bmm", "einsum")
_UNITS = {"macs": "MACs", "params": "parameters", "size_mb": "bytes", "latency": "µs"}
_STEPS = 48
"""A group is offered at most so many widths, or long searches would not be felt in the result."""


@dataclass(frozen=True)
class Budget:
    """What the smaller network may cost; exactly one of the first four is given.

    Attributes:
        macs: share of the multiply-accumulates that may stay (0.5), at the example inputs.
        params: share of the parameters that may stay.
        size_mb: size of the saved weights in megabytes (10**6 bytes).
        latency: share of the time that may stay, measured on this machine at the example inputs. Measurements
            scatter, so equal seeds need not give equal widths.
        round_to: kept channels come in multiples of this, where a group is wide enough; "auto" takes what suits the
            device: on a CPU the floats in a vector (16 with AVX-512, 8 with AVX2, else 4), elsewhere 8.
        min_keep: no group keeps fewer channels.
        max_ratio: no group loses a larger share.
        exclude: globs of groups and layers that stay whole.
    """

    macs: float | None = None
    params: float | None = None
    size_mb: float | None = None
    latency: float | None = None
    round_to: int | str = 1
    min_keep: int = 1
    max_ratio: float = 0.9
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in _UNITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"Budget: give exactly one of macs, params, size_mb and latency (given: {', '.join(given) or 'none'})"
            )
        for name in ("macs", "params", "latency"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise InputError(f"Budget({name}={share}): the share that may stay must lie above 0 and not above 1")
        if self.size_mb is not None and not 0 < self.size_mb < math.inf:
            raise InputError(f"Budget(size_mb={self.size_mb}): must be above 0")
        if self.round_to != "auto" and (not isinstance(self.round_to, int) or self.round_to < 1):
            raise InputError(f'Budget(round_to={self.round_to!r}): must be a whole number from 1, or "auto"')
        if self.min_keep < 1 or not 0 <= self.max_ratio < 1:
            raise InputError(
                f"Budget(min_keep={self.min_keep}, max_ratio={self.max_ratio}): "
                "keep at least 1 channel; the largest ratio must lie in [0, 1)"
            )
        object.__setattr__(self, "exclude", tuple(self.exclude))

    @property
    def unit(self) -> str:
        """What costs are counted in."""
        return next(unit for name, unit in _UNITS.items() if getattr(self, name) is not None)

    def on(self, device: torch.device) -> Budget:
        """The same with a number in place of "auto": what suits the device."""
        return replace(self, round_to=_suitable(device)) if self.round_to == "auto" else self

    def excludes(self, group: Group) -> bool:
        """Whether a pattern names the group or one of its layers."""
        return any(fnmatchcase(name, pattern) for pattern in self.exclude for name in (group.name, *group.layers))


@dataclass(frozen=True)
class Curve:
    """The predicted error of one group at each of its widths.

    Attributes:
        group: index of the group in the graph.
        order: its channels, the most important first: a width k keeps the first k.
        error: squared relative error of the readers' outputs with k channels kept, for k = 0 .. width.
        weight: how much of that reaches the network's output: squared relative error there for each unit here.
    """

    group: int
    order: tuple[int, ...]
    error: Float[Tensor, " widths"]
    weight: float = 1.0


def error_curve(
    covariance: Float[Tensor, "channels channels"], energy: Float[Tensor, " channels"], ridge: float = _RIDGE
) -> Float[Tensor, " widths"]:
    """Squared relative error when only the first k channels stay, for all k at once.

    With the Cholesky factor ``L L^T = G + ridge``, what the first k channels leave of channel j is
    ``G_jj - sum_{i<k} L_ji^2``; it counts by the energy ``|U_j|^2`` with which the readers take it.

    Args:
        covariance: G, of the channels in the order in which they stay.
        energy: how strongly the readers take each channel.
        ridge: added to the diagonal, relative to its mean: what least squares will be given as well.
    """
    count = len(covariance)
    diagonal = covariance.diagonal().clamp_min(0)
    total = (energy * diagonal).sum()
    if float(total) <= 0:
        return torch.zeros(count + 1, dtype=torch.float64)
    strength = max(ridge * float(diagonal.mean()), 1e-12 * float(diagonal.max()))
    factor, info = torch.linalg.cholesky_ex(covariance + strength * torch.eye(count, dtype=covariance.dtype))
    if int(info):
        factor = torch.diag(diagonal.sqrt())  # nothing that others could take over
    explained = torch.cat([torch.zeros(count, 1, dtype=torch.float64), factor.square().cumsum(1)], 1)
    left = (diagonal[:, None] - explained).clamp_min(0) * energy[:, None]
    gone = torch.arange(count)[:, None] >= torch.arange(count + 1)[None, :]
    error = (left * gone).sum(0) / total
    # Keeping more never costs more.
    return error.flip(0).cummax(0).values.flip(0)


def spread_over_blocks(order: Int[Tensor, " channels"], blocks: Sequence[int]) -> tuple[int, ...]:
    """The same order with the blocks in turn, so that any whole round keeps equally many of each."""
    turns: dict[int, int] = defaultdict(int)
    placed = []
    for position, channel in enumerate(order.tolist()):
        placed.append((turns[blocks[channel]], position, channel))
        turns[blocks[channel]] += 1
    return tuple(channel for _, _, channel in sorted(placed))


@dataclass(frozen=True)
class Term:
    """A cost that is proportional to the lengths of some dimensions.

    ``dims`` has for each the length that is nobody's and, for each group (index in the graph), how many places
    a channel of it takes there. Where the cost does not fall with the lengths' product, ``curve`` says how it does:
    points (share of the product, share of the cost), by increasing shares, between which it is linear.
    """

    cost: float
    dims: tuple[tuple[float, Mapping[int, float]], ...]
    lengths: tuple[float, ...]
    curve: tuple[tuple[float, float], ...] = ()

    def share(self, widths: Mapping[int, int]) -> float:
        """The share of the lengths' product that is left with these kept widths."""
        share = 1.0
        for (fixed, groups), length in zip(self.dims, self.lengths, strict=True):
            share *= (fixed + sum(widths[g] * places for g, places in groups.items())) / length
        return share

    def at(self, widths: Mapping[int, int]) -> float:
        """The cost with these kept widths."""
        share = self.share(widths)
        if not self.curve:
            return self.cost * share
        above = bisect.bisect_left(self.curve, (share, -math.inf))
        above = min(max(above, 1), len(self.curve) - 1)
        (x0, y0), (x1, y1) = self.curve[above - 1], self.curve[above]
        return self.cost * (y0 + (y1 - y0) * (share - x0) / (x1 - x0))


def cost_terms(graph: Graph, costs: Mapping[str, float]) -> list[Term]:
    """A term for every parameter that has a cost, which shrinks with each of its dimensions.

    The cost named "" is that of products of activations; it is shared out evenly among the groups that go into them.
    """
    dims: dict[str, dict[int, tuple[int, int, dict[int, float]]]] = defaultdict(dict)
    for index, group in enumerate(graph.groups):
        for slot in (*group.carriers, *group.readers):
            length = len(slot.channels)
            ours = sum(channel != NOT_OURS for channel in slot.channels)
            _, free, groups = dims[slot.parameter].get(slot.dim, (length, length, {}))
            groups[index] = ours / group.width
            dims[slot.parameter][slot.dim] = (length, free - ours, groups)
    terms = []
    costs = dict(costs)
    rest = costs.pop("", 0.0)
    heads = [index for index, group in enumerate(graph.groups) if any(s.op in _PRODUCTS for s in group.steps)]
    for index in heads:
        width = graph.groups[index].width
        terms.append(Term(rest / len(heads), ((0, {index: 1}),), (width,)))
    if rest and not heads:
        terms.append(Term(rest, (), ()))
    for name, cost in costs.items():
        known = dims.get(name, {})
        terms.append(
            Term(
                cost,
                tuple((free, groups) for _, free, groups in known.values()),
                tuple(length for length, _, _ in known.values()),
            )
        )
    return terms


def _suitable(device: torch.device) -> int:
    """The multiple of channels that kernels work in: a vector of floats, or a tile of a tensor core."""
    if device.type != "cpu":
        return 8
    capability = torch.backends.cpu.get_cpu_capability()
    return 16 if capability.startswith("AVX512") else 8 if capability in ("AVX2", "SVE256") else 4


def widths_of(group: Group, budget: Budget) -> list[int]:
    """The widths that a group may be cut to, the largest first; ``round_to`` is a number (see :meth:`Budget.on`)."""
    labels = len(set(group.blocks))
    rows = max(1, sum(channel != NOT_OURS for channel in group.producers[0].weight.channels) // group.width)
    multiple = int(budget.round_to)
    step = math.lcm(labels, multiple // math.gcd(multiple, rows))
    if step >= group.width:
        step = labels
    least = max(budget.min_keep, math.ceil(group.width * (1 - budget.max_ratio) - 1e-9), 1)
    step *= max(1, math.ceil((group.width - least) / step / _STEPS))
    choices = [k for k in range(step, group.width, step) if k >= least]
    return [group.width, *reversed(choices)]


def smallest_cost(graph: Graph, curves: Sequence[Curve], terms: Sequence[Term], budget: Budget) -> float:
    """What the network costs with every group that has a curve as small as it may be."""
    widths = {index: group.width for index, group in enumerate(graph.groups)}
    widths |= {curve.group: widths_of(graph.groups[curve.group], budget)[-1] for curve in curves}
    return sum(term.at(widths) for term in terms)


def allocate(
    graph: Graph, curves: Sequence[Curve], terms: Sequence[Term], target: float, budget: Budget
) -> dict[int, int]:
    """Kept channels of every group that has a curve, such that the cost is at most ``target``.

    Greedy: the step with the least added error for the saved cost, over all smaller widths of all groups, again and
    again. Looking at all widths, not only the next, keeps a steep start of a curve from hiding what lies behind.

    Raises:
        InputError: even the smallest widths cost more; the message says how much.
    """
    widths = {index: group.width for index, group in enumerate(graph.groups)}
    offered = {curve.group: widths_of(graph.groups[curve.group], budget) for curve in curves}
    by_group: dict[int, list[Term]] = defaultdict(list)
    for term in terms:
        for group in {g for _, groups in term.dims for g in groups}:
            by_group[group].append(term)
    neighbors = {g: {other for term in by_group[g] for _, groups in term.dims for other in groups} for g in offered}
    curve_of = {curve.group: curve for curve in curves}

    floor = smallest_cost(graph, curves, terms, budget)
    cost = sum(term.at(widths) for term in terms)
    if floor > target * (1 + TOLERANCE):
        raise InputError(
            f"the budget can't be reached: it allows {target:,.0f}, and with every group as small as it may be "
            f"{floor:,.0f} of {cost:,.0f} {budget.unit} are left ({floor / cost:.1%}); raise the budget or max_ratio, "
            "or exclude less"
        )

    def best(group: int) -> tuple[float, int, float]:
        """Error added for each unit of cost saved, the width, and the cost saved."""
        curve, now = curve_of[group], widths[group]
        before = sum(term.at(widths) for term in by_group[group])
        found = (math.inf, now, 0.0)
        for width in offered[group]:
            if width >= now:
                continue
            saved = before - sum(term.at(widths | {group: width}) for term in by_group[group])
            added = curve.weight * float(curve.error[width] - curve.error[now])
            # A step must not overshoot what is wanted by far.
            if saved <= 0 or (cost - saved < target * (1 - TOLERANCE / 2) and width < _next(offered[group], now)):
                continue
            rate = (added + 1e-12) / saved
            if rate < found[0]:
                found = rate, width, saved
        return found

    steps = {group: best(group) for group in offered}
    while cost > target:
        group = min(steps, key=lambda g: steps[g][0])
        rate, width, saved = steps[group]
        if math.isinf(rate):
            break
        fitting = [g for g in steps if steps[g][1] < widths[g] and cost - steps[g][2] >= target * (1 - TOLERANCE)]
        if cost - saved < target * (1 - TOLERANCE) and fitting:
            group = min(fitting, key=lambda g: steps[g][0])
            rate, width, saved = steps[group]
        widths[group] = width
        cost = sum(term.at(widths) for term in terms)
        for other in neighbors[group] & steps.keys():
            steps[other] = best(other)
    return {group: widths[group] for group in offered}


def _next(options: Sequence[int], now: int) -> int:
    """The largest width below the present one."""
    return max((width for width in options if width < now), default=now)
