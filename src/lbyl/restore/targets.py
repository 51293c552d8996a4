"""The targets of restoration: consumers of dropped channels, and the bias or batch norm that takes constants."""

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
    """A consumer's weight with the output dimension first, however the layer stores it.

    The outputs of all experts of a mixture follow each other, as those of a grouped convolution do.
    """
    weight = state[consumer.weight].detach()
    if consumer.experts:
        return weight.movedim(consumer.dim, 2).flatten(0, 1)
    return weight.transpose(0, 1) if consumer.dim == 0 else weight


@dataclass(frozen=True)
class Target:
    """A consumer to solve for, usually one that loses input channels.

    Attributes:
        consumer: the layer.
        dropped: whether each input channel is dropped.
        bias: the tensor through which a constant can be added to its output: its bias, or the running mean of the
            batch norm after it (``sign`` is then -1, because the mean is subtracted); None if there is neither.
        choices: indices in the selection of the groups that it reads and that lose channels.
        norm: the running mean of the batch norm after it, if there is one.
        inside: for each position in its kernel, the share of output positions at which it lies inside the input and
            not in the zero padding; None if unknown.
    """

    consumer: Consumer
    dropped: Tensor
    bias: str | None
    sign: int
    choices: tuple[int, ...]
    norm: str | None = None
    inside: Float[Tensor, " taps"] | None = None

    def weight(self, state: State) -> Tensor:
        """The consumer's weight with the output dimension first; see :func:`output_first`."""
        return output_first(self.consumer, state)


def knowing_taps(targets: Sequence[Target], model: nn.Module, inputs: ExampleInputs) -> tuple[Target, ...]:
    """The same targets with ``inside`` filled in, which takes a run of the network on the example inputs."""
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
    """The batch norm directly after each layer, by the name of the layer's weight."""
    first = {p.weight.parameter: p.stages[0] for group in graph.groups for p in group.producers if p.stages}
    return {weight: stage for weight, stage in first.items() if isinstance(stage, Norm)}


def target_of(consumer: Consumer, dropped: Tensor, choices: tuple[int, ...], norms: Mapping[str, Norm]) -> Target:
    """The target for a consumer; ``norms`` is the result of :func:`following_norms`."""
    norm = norms.get(consumer.weight)
    following = norm.mean if norm else None
    bias, sign = (consumer.bias, 1) if consumer.bias else (following, -1 if following else 1)
    return Target(consumer, dropped, bias, sign, choices, following)


def as_stored(found: tuple[Target, ...], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values as the layers store them, from weights with the output dimension first."""
    consumers = {target.consumer.weight: target.consumer for target in found}

    def stored(name: str, value: Tensor) -> Tensor:
        consumer = consumers.get(name)
        if consumer is None:
            return value
        if consumer.experts:
            return value.unflatten(0, (consumer.experts, -1)).movedim(2, consumer.dim).contiguous()
        return value.transpose(0, 1).contiguous() if consumer.dim == 0 else value

    return {name: stored(name, value) for name, value in values.items()}


def masked(target: Target, state: State) -> Tensor:
    """The consumer's weight with zeros in dropped columns, as after plain pruning."""
    return zero_columns(target.weight(state).clone(), target.dropped, target.consumer.blocks)


def taps_inside(model: nn.Module, inputs: ExampleInputs) -> dict[str, Float[Tensor, " taps"]]:
    """For each position in each consumer's kernel, the share of output positions at which it lies inside the input.

    Positions in the zero padding do not contribute to the mean of the output. For a 3x3 kernel on a map of 2x2, these
    are on average five of nine. In a transposed convolution it is the share of outputs that read an input there. Layers
    that can't be observed, such as grouped transposed convolutions, are left out.
    """
    found: dict[str, list[Tensor]] = {}

    def on_consumer(call: ConsumerCall) -> None:
        found.setdefault(call.weight, []).append(_inside(call, tensors[call.weight].shape[2:]))

    tensors = tensors_of(model)
    with torch.no_grad():
        run_intercepted(model, inputs, on_consumer=on_consumer)
    return {name: torch.stack(shares).mean(0) for name, shares in found.items()}


def _inside(call: ConsumerCall, kernel: Sequence[int]) -> Float[Tensor, " taps"]:
    """The shares of one call, for each position in the kernel: products of the shares along each axis."""
    shares = torch.ones(1, dtype=torch.float64)
    if call.op == "linear":
        return shares
    axes = zip(call.x.shape[2:], call.out.shape[2:], kernel, call.stride, call.padding, call.dilation, strict=True)
    for size, outputs, taps, stride, padding, dilation in axes:
        places, most = (size, outputs) if call.op.startswith("conv_transpose") else (outputs, size)
        place = torch.arange(places) * stride - padding + (torch.arange(taps) * dilation)[:, None]
        within = ((place >= 0) & (place < most)).to(torch.float64).sum(1) / outputs
        shares = (shares[:, None] * within).flatten()
    return shares


def on_average(
    target: Target, weight: Float[Tensor, "out columns *taps"], means: Float[Tensor, " columns_of_all_blocks"]
) -> Float[Tensor, " out"]:
    """A consumer's mean output, given the mean m of every input column: ``sum_it inside_t w_oit m_i``, in float64.

    Here t runs over positions in the kernel. The result is zero if ``inside`` is unknown.
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
            # Written into place, because small results between large temporary tensors would fragment memory.
            torch.mv(part.double().flatten(2) @ inside, here, out=place)
    return found
