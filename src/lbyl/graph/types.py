"""What tracing returns: frozen descriptions that name parameters and never hold a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lbyl.runtime.reductions import Reduction

NOT_OURS = -1
"""Marks an index of a parameter's dimension that carries no channel of the group at hand."""


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter or buffer, and the group's channel that each index carries.

    ``channels[j]`` is a channel number of the group, or ``NOT_OURS``. With ``blocks > 1`` the slot is the
    input dimension of a grouped convolution, or the output dimension of a transposed one: ``channels`` then runs over
    all of them, of which the parameter stores ``len(channels) / blocks`` a row.
    """

    parameter: str
    dim: int
    channels: tuple[int, ...]
    blocks: int = 1


@dataclass(frozen=True)
class Norm:
    """A batch normalization, by the names of its tensors; ``weight`` and ``bias`` may be missing."""

    layer: str
    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution, by the names of its tensors."""

    layer: str
    weight: str
    bias: str | None


@dataclass(frozen=True)
class Producer:
    """A layer that issues channels of the group.

    ``stages`` are the linear maps of single channels that follow it with nothing in between: its batch norm,
    and a depthwise convolution that no activation parts from it.
    """

    layer: str
    weight: Slot
    bias: str | None
    stages: tuple[Norm | Depthwise, ...]

    @property
    def normalized(self) -> bool:
        """Whether a batch norm follows directly."""
        return any(isinstance(stage, Norm) for stage in self.stages)


@dataclass(frozen=True)
class Step:
    """An operation that the group's channels pass through between producer and consumer."""

    op: str
    layer: str
    parametric: bool


@dataclass(frozen=True)
class Average:
    """A mean over all channels of a group that the model divides by.

    When K of C channels stay, the cut is exact with ``weight`` times ``(C/K) ** power`` and ``eps`` times ``C/K``, if
    the dropped channels are zero where the mean is taken.
    """

    module: str
    eps: float | None
    weight: str
    power: float


@dataclass(frozen=True)
class LayerNorm:
    """A layer norm, or a group norm of a single group, over channels of a group, by its module and its weight's name.

    Once some of them are cut, it takes its mean and variance over those that stay.
    """

    layer: str
    weight: str


@dataclass(frozen=True)
class Statistic:
    """An operation that takes channels of a group together: over those that stay, once some are cut.

    ``channels[j]`` is the channel of the group at index ``j`` of its axis, or ``NOT_OURS``.
    """

    reduction: Reduction
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Channels that must go together.

    Attributes:
        name: the first producer's layer name.
        width: number of channels.
        producers: the layers that issue these channels.
        carriers: every slot that is sliced along with the channels, the producers' own among them.
        consumers: input dimensions of the layers that read the channels.
        blocks: a label for each channel; every label must lose equally many (grouped convolutions).
        coupled: a sum adds channels of different producers here (a residual stream).
        steps: what lies between producers and consumers, in execution order.
        averages: means that are taken over all channels; dropped channels must be zero before these means are taken.
        reason: why the group can't be pruned, or None when it can.
        layer_norms: those that take statistics over these channels, and over fewer of them once some are cut.
        coupled_with: the name of the group that has to lose the same share as this one, to the channel; "" for none.
        tied: carriers that also read the channels, such as an output layer that shares the embedding's table. They
            lose columns, and restoration can't make up for the loss there.
        products: the modules that add up products of these channels in pairs (the scores of attention with one head);
            dropped channels must be zero there.
        statistics: other operations that take these channels together, and fewer of them once some are cut.
    """

    name: str
    width: int
    producers: tuple[Producer, ...]
    carriers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]
    blocks: tuple[int, ...]
    coupled: bool
    steps: tuple[Step, ...]
    averages: tuple[Average, ...]
    reason: str | None
    layer_norms: tuple[LayerNorm, ...] = ()
    coupled_with: str = ""
    tied: tuple[Slot, ...] = ()
    statistics: tuple[Statistic, ...] = ()
    products: tuple[str, ...] = ()

    @property
    def excluded_from_inner(self) -> str | None:
        """Why scope="inner" leaves the group whole, though it can be pruned; None where it does not."""
        if self.coupled:
            return "a residual sum couples it"
        if self.layer_norms:
            return f"layer_norm {self.layer_norms[0].layer!r} takes statistics over it"
        if self.statistics:
            first = self.statistics[0].reduction
            return f"{first.op} in {first.module!r} is taken over it"
        if self.coupled_with:
            return f"{self.coupled_with!r} has to lose the same share"
        return None

    @property
    def prunable(self) -> bool:
        """Whether the group may lose channels at all."""
        return self.reason is None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the producing layers."""
        return tuple(producer.layer for producer in self.producers)


@dataclass(frozen=True)
class Consumer:
    """A layer that mixes its input channels: where restoration can act.

    ``columns[j]`` says which (group index, channel) stands at input channel ``j``; the group index is
    ``NOT_OURS`` where the input is nobody's (the image, for one). ``calls`` counts how often the layer runs;
    ``dim`` is the dimension of the weight that holds the columns (0 for weights stored input first).
    """

    layer: str
    weight: str
    bias: str | None
    op: str
    blocks: int
    columns: tuple[tuple[int, int], ...]
    calls: int
    dim: int = 1


def last_to_run(consumers: Sequence[Consumer]) -> str | None:
    """The weight of the last of some consumers, given in execution order; None where one of them runs several times."""
    return consumers[-1].weight if consumers and all(consumer.calls == 1 for consumer in consumers) else None


@dataclass(frozen=True)
class Size:
    """A size that a view or a split in some module asks for, and the channels that it counts.

    The module may keep the number in an attribute (heads, a split size), which then follows the cut.
    ``columns`` is as in :class:`Consumer`. The size is that of this ``axis``, of ``rank`` in all.
    """

    module: str
    value: int
    columns: tuple[tuple[int, int], ...]
    axis: int
    rank: int


@dataclass(frozen=True)
class Graph:
    """The channel graph of one model: all groups, all consumers in execution order, all barriers, all sizes.

    ``computed`` names modules whose weight is computed on the fly, which `lbyl.graph.computed_weights`
    can make plain; ``macs`` are the multiply-accumulates of the traced pass, where they were counted; ``notes`` are
    what the user should know of that pass.
    """

    groups: tuple[Group, ...]
    consumers: tuple[Consumer, ...]
    barriers: tuple[str, ...]
    sizes: tuple[Size, ...] = ()
    computed: tuple[str, ...] = ()
    macs: int | None = None
    notes: tuple[str, ...] = ()

    def group(self, name: str) -> Group:
        """The group of that name; raises ``KeyError`` where there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)
