"""Where restoration acts: consumers that lose input channels, and where their constants go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lbyl.graph import Consumer, Graph, Norm
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.forward import ConsumerCall, run_intercepted
from lbyl.runtime.inputs import ExampleInputs
from lbyl.selection.filters import State, few_rows
from lbyl.selection.select import Selection
from lbyl.surgery.masking import zero_columns


def output_first(consumer: Consumer, state: State) -> Tensor:
    """A consumer's weight, output first, however the layer stores it: a view."""
    weight = state[consumer.weight].detach()
    return weight.transpose(0, 1) if consumer.dim == 0 else weight


@dataclass(frozen=True)
class Target:
    """A consumer that is solved for: mostly one that loses input channels.

    Attributes:
        consumer: the layer.
        dropped: for every input channel, whether it goes.
        bias: where a constant can be added to its output: its bias, or the running mean of the batch norm
            that follows it (``sign`` is then -1, for the mean is subtracted); None where there is neither.
        choices: the selection's indices of the groups that it reads and that lose channels.
        norm: the running mean of the batch norm that follows it, if one does.
        inside: for each tap of its kernel, the share of output positions at which the tap lies within the input, not in
            its zero padding; None where that is not known.
    """

    consumer: Consumer
    dropped: Tensor
    bias: str | None
    sign: int
    choices: tuple[int, ...]
    norm: str | None = None
    inside: Float[Tensor, " taps"] | None = None

    def weight(self, state: State) -> Tensor:
        """The consumer's weight, output first, however the layer stores it: a view."""
        return output_first(self.consumer, state)


def knowing_taps(targets: Sequence[Target], model: nn.Module, inputs: ExampleInputs) -> tuple[Target, ...]:
    """The same targets with their taps' shares, for which the network runs on the example once."""
    inside = taps_inside(model, inputs)
    return tuple(replace(target, inside=inside.get(target.consumer.weight)) for target in targets)


def find_targets(graph: Graph, selection: Selection) -> tuple[Target, ...]:
    """Every consumer that loses input channels, in execution order."""
    index_of = {group.name: index for index, group in enumerate(graph.groups)}
    dropped_of = {index_of[choice.group.name]: set(choice.drop) for choice in selection.choices}
    order = {index_of[choice.group.name]: number for number, choice in enumerate(selection.choices)}
    norms = following_norms(graph)
    found = []
    for consumer in graph.consumers:
        dropped = torch.tensor([channel in dropped_of.get(group, ()) for group, channel in consumer.columns])
        if bool(dropped.any()):
            groups = dict.fromkeys(group for group, _ in consumer.columns if group in order)
            found.append(target_of(consumer, dropped, tuple(order[group] for group in groups), norms))
    return tuple(found)


def following_norms(graph: Graph) -> dict[str, Norm]:
    """The batch norm right behind a layer, by the name of the layer's weight."""
    first = {p.weight.parameter: p.stages[0] for group in graph.groups for p in group.producers if p.stages}
    return {weight: stage for weight, stage in first.items() if isinstance(stage, Norm)}


def target_of(consumer: Consumer, dropped: Tensor, choices: tuple[int, ...], norms: Mapping[str, Norm]) -> Target:
    """A consumer with its place for a constant; ``norms`` are the :func:`following_norms`."""
    norm = norms.get(consumer.weight)
    following = norm.mean if norm else None
    bias, sign = (consumer.bias, 1) if consumer.bias else (following, -1 if following else 1)
    return Target(consumer, dropped, bias, sign, choices, following)


def as_stored(found: tuple[Target, ...], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values as the layers store them, where the solves had the output first."""
    input_first = {target.consumer.weight for target in found if target.consumer.dim == 0}
    return {name: v.transpose(0, 1).contiguous() if name in input_first else v for name, v in values.items()}


def masked(target: Target, state: State) -> Tensor:
    """The consumer's weight with its dropped columns zero: plain pruning."""
    return zero_columns(target.weight(state).clone(), target.dropped, target.consumer.blocks)


def taps_inside(model: nn.Module, inputs: ExampleInputs) -> dict[str, Float[Tensor, " taps"]]:
    """For each tap of each consumer's kernel, the share of output positions at which it lies within the input.

    What lies in the zero padding gives no mean: of a 3x3 kernel on a map of 2x2, five taps of nine on average. Layers
    that are not seen, transposed convolutions among them, are left out.
    """
    found: dict[str, list[Tensor]] = {}

    def on_consumer(call: ConsumerCall) -> None:
        found.setdefault(call.weight, []).append(_inside(call, tensors[call.weight].shape[2:]))

    tensors = tensors_of(model)
    with torch.no_grad():
        run_intercepted(model, inputs, on_consumer=on_consumer)
    return {name: torch.stack(shares).mean(0) for name, shares in found.items()}


def _inside(call: ConsumerCall, kernel: Sequence[int]) -> Float[Tensor, " taps"]:
    """The shares of one call, tap by tap: the product of those along each axis."""
    shares = torch.ones(1, dtype=torch.float64)
    if call.op == "linear":
        return shares
    axes = zip(call.x.shape[2:], call.out.shape[2:], kernel, call.stride, call.padding, call.dilation, strict=True)
    for size, outputs, taps, stride, padding, dilation in axes:
        place = torch.arange(outputs) * stride - padding + (torch.arange(taps) * dilation)[:, None]
        within = ((place >= 0) & (place < size)).to(torch.float64).mean(1)
        shares = (shares[:, None] * within).flatten()
    return shares


def on_average(
    target: Target, weight: Float[Tensor, "out columns *taps"], means: Float[Tensor, " columns_of_all_blocks"]
) -> Float[Tensor, " out"]:
    """What a consumer gives where every column is its mean: ``sum_it w_oit m_i``, in float64, with zeros as padding.

    Zeros where it is not known how much of the input each tap sees.
    """
    found = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    inside = torch.ones(1, dtype=torch.float64) if weight.dim() == 2 else target.inside
    if inside is None:
        return found
    inside, blocks = inside.to(weight.device), target.consumer.blocks
    parts = weight.chunk(blocks), found.chunk(blocks), means.double().chunk(blocks)
    for rows, places, here in zip(*parts, strict=True):
        taps = few_rows(rows.unsqueeze(2))
        for part, place in zip(taps, places.split(len(taps[0])), strict=True):
            # Into place: results kept between large parts that are freed would keep the next from using their memory.
            torch.mv(part.double().flatten(2) @ inside, here, out=place)
    return found
