"""The channel graph that a trace returns: frozen descriptions that name parameters and never hold a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lbyl.runtime.reductions import Reduction

NOT_OURS = -1
"""Marks an index of a parameter's dimension that carries no channel of this group."""


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter or buffer, and the channel of the group at each of its indices.

    ``channels[j]`` is a channel number of the group, or ``NOT_OURS``. With ``blocks > 1`` the slot is the
    input dimension of a grouped convolution, the output dimension of a transposed one, or a dimension of weights that
    are stacked along the first one (the experts of a mixture). Then ``channels`` lists the channels of all blocks,
    while the parameter's dimension has the size ``len(channels) / blocks``.
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
    """A layer that makes channels of the group.

    ``stages`` are the linear maps of single channels that directly follow it: a batch norm, and a depthwise
    convolution with no activation before it.
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

    When K of C channels are kept, surgery multiplies ``weight`` by ``(C/K) ** power`` and ``eps`` by ``C/K``. The cut
    is then exact, if the dropped channels are zero where the mean is taken.
    """

    module: str
    eps: float | None
    weight: str
    power: float


@dataclass(frozen=True)
class LayerNorm:
    """A layer norm, or a group norm with a single block, over channels of a group: its module and its weight's name.

    After a cut it takes its mean and variance over the kept channels.
    """

    layer: str
    weight: str


@dataclass(frozen=True)
class Statistic:
    """An operation that reduces over channels of a group, and over the kept ones after a cut.

    ``channels[j]`` is the channel of the group at index ``j`` of the reduced axis, or ``NOT_OURS``. ``relative`` says
    that channels are divided by this mean of theirs, which hardly changes with the number of channels.
    """

    reduction: Reduction
    channels: tuple[int, ...]
    relative: bool = False


@dataclass(frozen=True)
class Group:
    """A set of channels, each of which is kept or cut in all layers that carry it.

    Attributes:
        name: the first producer's layer name.
        width: number of channels.
        producers: the layers that make these channels.
        carriers: every slot that is sliced along with the channels, including the producers' own.
        consumers: input dimensions of the layers that read the channels.
        blocks: a label for each channel; a cut must remove equally many channels of every label (grouped
            convolutions).
        coupled: whether a sum adds channels of different producers that come from the same input of the network (a
            residual connection).
        steps: the operations between producers and consumers, in execution order.
        averages: means over all channels that the model divides by; dropped channels must be zero there.
        reason: why the group can't be pruned, or None when it can.
        layer_norms: layer norms over these channels; after a cut they are taken over the kept ones.
        coupled_with: the name of a group that must lose exactly the same share of its channels; "" for none.
        tied: carriers that also read the channels, such as an output layer that shares the embedding's table. They
            lose columns, and restoration can't compensate for the loss there.
        products: the modules that multiply pairs of these channels, and add the products up (the scores of attention
            with one head) or do not (bilinear pooling); dropped channels must be zero there.
        compared: a distance or similarity of such channels (cdist, cosine_similarity), by name and module; "" for none.
        multiple: every block keeps a multiple of this number of channels, as the operation that reads them requires.
        statistics: other reductions over these channels; after a cut they are taken over the kept ones.
        pieces: the channels of values with only some of the group's, whose size the code may spell out.
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
    compared: str = ""
    multiple: int = 1
    pieces: tuple[tuple[int, ...], ...] = ()

    @property
    def excluded_from_inner(self) -> str | None:
        """Why scope="inner" does not prune the group although it could be pruned; None where it prunes the group."""
        if self.coupled:
            return "a residual connection couples it"
        if self.layer_norms:
            return f"layer_norm {self.layer_norms[0].layer!r} takes statistics over it"
        first = next((each.reduction for each in self.statistics if not each.relative), None)
        if first is not None:
            return f"{first.op} in {first.module!r} is taken over it"
        if self.compared:
            return f"{self.compared} is taken over it"
        if self.coupled_with:
            return f"{self.coupled_with!r} has to lose the same share"
        return None

    @cached_property
    def parts(self) -> tuple[frozenset[int], ...]:
        """The channels of layers, reductions and values that have only some of the group's; each must keep one."""
        held = [*(slot.channels for slot in (*self.carriers, *self.consumers)), *self.pieces]
        held += [statistic.channels for statistic in self.statistics]
        found = dict.fromkeys(frozenset(channels) - {NOT_OURS} for channels in dict.fromkeys(held))
        return tuple(part for part in found if 0 < len(part) < self.width)

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
    """A layer that mixes its input channels, whose weight a restorer can change.

    ``columns[j]`` is the (group index, channel) of input channel ``j``; the group index is ``NOT_OURS`` where no
    group makes the input (as for the image). ``calls`` is how often the layer runs in one forward pass, and ``dim`` is
    the input dimension of its weight (0 for weights stored input first). ``experts`` is the number of matrices that the
    weight stacks along its first dimension, each of which has its own rows of the input; 0 for all other weights.
    """

    layer: str
    weight: str
    bias: str | None
    op: str
    blocks: int
    columns: tuple[tuple[int, int], ...]
    calls: int
    dim: int = 1
    experts: int = 0


def last_to_run(consumers: Sequence[Consumer]) -> str | None:
    """The weight of the last of some consumers, given in execution order; None where one of them runs several times."""
    return consumers[-1].weight if consumers and all(consumer.calls == 1 for consumer in consumers) else None


@dataclass(frozen=True)
class Size:
    """A size that a view or a split in some module uses, and the channels along that axis.

    The module may keep the number in an attribute (number of heads, split size). A cut then changes the attribute.
    ``columns`` is as in :class:`Consumer`. ``axis`` is the axis with this size, in a value with ``rank`` axes.
    """

    module: str
    value: int
    columns: tuple[tuple[int, int], ...]
    axis: int
    rank: int


@dataclass(frozen=True)
class Graph:
    """The channel graph of one model.

    Attributes:
        groups: all groups of channels.
        consumers: all consumers, in execution order.
        barriers: operations that the trace can't see through, and why.
        sizes: sizes that the model's code may spell out.
        lengths: attributes of modules, as their paths and names, that say how much of something to take. They may equal
            such a size by chance.
        computed: modules whose weight is computed on the fly; `lbyl.graph.computed_weights` can make them plain.
        macs: multiply-accumulates of the traced pass; None where they were not counted.
        notes: what the user should know about that pass.
        whole: parameters that an operation uses in a way that can't be followed, and why.
    """

    groups: tuple[Group, ...]
    consumers: tuple[Consumer, ...]
    barriers: tuple[str, ...]
    sizes: tuple[Size, ...] = ()
    lengths: frozenset[tuple[str, str]] = frozenset()
    computed: tuple[str, ...] = ()
    macs: int | None = None
    notes: tuple[str, ...] = ()
    whole: tuple[tuple[str, str], ...] = ()

    def group(self, name: str) -> Group:
        """The group of that name.

        Raises:
            KeyError: there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)
