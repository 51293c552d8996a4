"""Running sums over the inputs of consumers, which give second moments in float64.

Everything here is a function of tensors. `lbyl.runtime.forward` runs the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lbyl.moments.neighbors import add_patch_products, patch_sums, patch_targets
from lbyl.runtime.forward import ConsumerCall
from lbyl.runtime.grouped import of_each_expert
from lbyl.runtime.seeding import sample_positions
from lbyl.selection.view import ColumnMoments

_CHUNK_BYTES = 16 * 2**20
_NARROW, _WIDE, _PARTS = 64, 256, 8
"""Second moments are added to in strips of so many rows: an eighth of all rows, within these bounds."""
UNFOLDED = frozenset(("conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"))
"""Layers of whose inputs no patches are taken: the moments are those among channels."""


def add_gram(sums: Float[Tensor, "columns columns"], x: Float[Tensor, "positions columns"]) -> None:
    """Add ``x^T x``, which is symmetric, so that little more than half of its products are computed.

    Products are in the precision of ``x``, and the sums in their own. The result is exactly symmetric.
    """
    width = x.shape[1]
    # All products of a wide layer at once would also be as large as half of its sums.
    strip = min(_WIDE, max(_NARROW, width // _PARTS // _NARROW * _NARROW))
    for start in range(0, width, strip):
        end = min(start + strip, width)
        products = x[:, start:end].T @ x[:, start:]
        sums[start:end, start:] += products
        sums[end:, start:end] += products[:, end - start :].T


@dataclass
class Moments:
    """Running sums over the positions at which a consumer reads, in float64.

    They are the sums of p, r, p p^T, p r^T and r^2. The regressors ``p`` are the input that the cut consumer will have.
    The targets ``r`` are the dropped channels, or their contribution to the output.
    """

    count: int
    p: Float[Tensor, " regressors"]
    r: Float[Tensor, " targets"]
    pp: Float[Tensor, "regressors regressors"]
    pr: Float[Tensor, "regressors targets"]
    rr: Float[Tensor, " targets"]

    @staticmethod
    def zeros(regressors: int, targets: int, device: torch.device) -> Moments:
        """Empty sums."""

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return Moments(
            0,
            empty(regressors),
            empty(targets),
            empty(regressors, regressors),
            empty(regressors, targets),
            empty(targets),
        )

    def add(self, p: Float[Tensor, "positions regressors"], r: Float[Tensor, "positions targets"]) -> None:
        """Add positions. Products, and sums of these positions, are in the inputs' precision, at least float32."""
        self.count += len(p)
        if p.dtype in (torch.float16, torch.bfloat16):
            p, r = p.float(), r.float()
        self.p += p.sum(0)
        self.r += r.sum(0)
        add_gram(self.pp, p)
        self.pr += p.T @ r
        self.rr += r.square().sum(0)

    def add_maps(
        self,
        x: Float[Tensor, "images channels height width"],
        r: Float[Tensor, "images targets height width"] | None,
    ) -> None:
        """Add all pixels, where the regressors are the 3x3 patches of x, as :meth:`add` does in more time."""
        self.count += x[:, 0].numel()
        self.p += patch_sums(x)
        add_patch_products(self.pp, x)
        if r is not None:
            self.r += r.sum((0, 2, 3))
            self.pr += patch_targets(x, r)
            self.rr += r.square().sum((0, 2, 3))

    def plus(self, other: Moments) -> Moments:
        """The sums over both sets of positions."""
        names = ("p", "r", "pp", "pr", "rr")
        sums = {name: getattr(self, name) + getattr(other, name).to(self.p.device) for name in names}
        return Moments(self.count + other.count, **sums)


@dataclass(frozen=True)
class ConsumerMoments:
    """Moments of all input channels of a consumer, from which the moments for any choice of channels can be computed.

    Attributes:
        blocks: for each block of a grouped convolution, the moments of all its patches, without targets.
        output: count, sum and sum of squares of the consumer's output.
    """

    blocks: tuple[Moments, ...]
    output: tuple[Tensor, Tensor, Tensor]

    def plus(self, other: ConsumerMoments) -> ConsumerMoments:
        """The moments over both sets of positions."""
        blocks = tuple(a.plus(b) for a, b in zip(self.blocks, other.blocks, strict=True))
        count, first, second = (a + b.to(a.device) for a, b in zip(self.output, other.output, strict=True))
        return ConsumerMoments(blocks, (count, first, second))

    def part(self, number: int, kernel: Float[Tensor, "rows columns *taps"], keep: Tensor, drop: Tensor) -> Moments:
        """The moments of one block with some columns dropped, equal to those that :class:`PatchSums` measures."""
        whole, taps = self.blocks[number], kernel[0, 0].numel()
        within = torch.arange(taps, device=keep.device)
        kept, gone = ((columns[:, None] * taps + within).flatten() for columns in (keep, drop))
        u = kernel[:, drop].reshape(len(kernel), -1).double()
        return Moments(
            whole.count,
            whole.p[kept],
            u @ whole.p[gone],
            whole.pp[kept][:, kept],
            whole.pp[kept][:, gone] @ u.T,
            ((u @ whole.pp[gone][:, gone]) * u).sum(1),
        )


@dataclass(frozen=True)
class Columns:
    """The kept and the dropped input channels of a consumer, for each block of a grouped convolution."""

    keep: tuple[Int[Tensor, " kept"], ...]
    drop: tuple[Int[Tensor, " dropped"], ...]


@dataclass
class PatchSums:
    """Moments between patches of the kept channels and the dropped channels' contribution to the output."""

    columns: Columns
    positions: int  # at most this many a call
    generator: torch.Generator
    blocks: list[Moments] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)  # count, sum and sum of squares of the consumer's output

    def takes_all(self, call: ConsumerCall, weight: Tensor, joined: int) -> bool:
        """Whether all pixels of a call are taken that joins several, each of which may give its positions."""
        kernel = weight[: len(weight) // len(self.columns.keep)]
        return all(_has_maps(call, kernel, keep, joined * self.positions) for keep in self.columns.keep)

    def add(
        self,
        call: ConsumerCall,
        weight: Tensor,
        wanted: Tensor | None = None,
        *,
        joined: int = 1,
        with_output: bool = True,
    ) -> None:
        """Add one call of the consumer, or several that are joined.

        Without ``with_output``, the sums of its output are known already.
        If ``wanted`` is given (a tensor of the output's shape, without the bias), the target is ``wanted`` minus the
        kept channels' contribution. Otherwise the target is the dropped channels' contribution in this call.
        """
        if with_output:
            self.output = _with_output(self.output, call)
        number = len(self.columns.keep)
        rows, width = len(weight) // number, weight.shape[1]
        for index, (keep, drop) in enumerate(zip(self.columns.keep, self.columns.drop, strict=True)):
            out = slice(index * rows, (index + 1) * rows)
            kernel = weight[out]
            if len(self.blocks) <= index:
                taps = kernel[0, 0].numel() if kernel.dim() > 2 else 1
                self.blocks.append(Moments.zeros(len(keep) * taps, rows, call.x.device))
            if not len(drop) and wanted is None:
                continue
            here, first = _of_block(call, index, number, width)
            if here is None:
                continue
            columns = keep + first, drop + first
            share = None if wanted is None else wanted[..., out] if call.op == "linear" else wanted[:, out]
            if share is not None:
                part = kernel[:, keep]
            else:
                part = kernel[:, drop] if call.fed is None else torch.cat([kernel[:, keep], kernel[:, drop]], 1)
            _add_positions(self.blocks[index], here, part, *columns, joined * self.positions, self.generator, share)


def _of_block(call: ConsumerCall, index: int, blocks: int, width: int) -> tuple[ConsumerCall | None, int]:
    """What one block reads of a call: the first of its columns; an expert, which has all columns, its own positions.

    None if no position was given to the expert.
    """
    if call.ends is None or blocks == 1:
        return call, index * width
    start, end = (int(call.ends[at]) if at >= 0 else 0 for at in (index - 1, index))
    return (replace(call, x=call.x[start:end], ends=None) if end > start else None), 0


@dataclass
class WholeSums:
    """Moments among all patches that a consumer reads; see :class:`ConsumerMoments`."""

    number: int  # of blocks
    positions: int
    generator: torch.Generator
    blocks: list[Moments] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)

    def add(self, call: ConsumerCall, weight: Tensor) -> None:
        """Add one call of the consumer."""
        self.output = _with_output(self.output, call)
        width, taps = weight.shape[1], weight[0, 0].numel()
        for index in range(self.number):
            if len(self.blocks) <= index:
                self.blocks.append(Moments.zeros(width * taps, 0, call.x.device))
            here, first = _of_block(call, index, self.number, width)
            if here is None:
                continue
            columns = torch.arange(first, first + width, device=call.x.device)
            none = columns[:0]
            _add_positions(self.blocks[index], here, weight[:, none], columns, none, self.positions, self.generator)

    def reading(self) -> ConsumerMoments | None:
        """The moments; None if the consumer was never called."""
        return (
            ConsumerMoments(tuple(self.blocks), (self.output[0], self.output[1], self.output[2]))
            if self.blocks
            else None
        )


def _with_output(sums: Sequence[Tensor], call: ConsumerCall) -> list[Tensor]:
    """Count, sum and sum of squares of outputs, after one more call."""
    out = call.out.reshape(-1, call.out.shape[-1]) if call.op == "linear" else call.out
    dims, sums = [dim for dim in range(out.dim()) if dim != 1], list(sums)
    # In chunks, because a whole output in float64 would be the largest tensor in memory. In float32, little would be
    # left of the variance of outputs whose mean is large.
    for part in out.split(max(1, _CHUNK_BYTES // max(1, out[:1].numel() * 8))):
        # A copy, also for float64, because it is squared in place while the network still uses the output.
        wide = part.to(torch.float64, copy=True)
        count = torch.tensor(wide.numel() // wide.shape[1], dtype=torch.float64)
        more = [count, wide.sum(dims), wide.square_().sum(dims)]
        sums = [a + b for a, b in zip(sums, more, strict=True)] if sums else more
    return sums


def _add_positions(
    sums: Moments,
    call: ConsumerCall,
    kernel: Tensor,
    keep: Tensor,
    drop: Tensor,
    positions: int,
    generator: torch.Generator,
    wanted: Tensor | None = None,
) -> None:
    """Add the positions of one call for one block; see :func:`_positions`."""
    if not _has_maps(call, kernel, keep, positions):
        for p, r in _positions(call, kernel, keep, drop, positions, generator, wanted):
            sums.add(p, r)
        return
    size = max(1, _CHUNK_BYTES // (4 * (len(keep) + len(kernel)) * call.x[0, 0].numel()))
    pieces = zip(
        call.x.split(size), _split_like(call.fed, call.x, size), _split_like(wanted, call.x, size), strict=True
    )
    for part, ahead, share in pieces:
        x = _channels(part if ahead is None else ahead, keep)
        if share is not None:
            sums.add_maps(x, share - functional.conv2d(x, kernel, padding=1))
        elif len(drop):
            sums.add_maps(x, functional.conv2d(_lost(part, ahead, keep, drop), kernel, padding=1))
        else:
            sums.add_maps(x, None)


def _channels(x: Float[Tensor, "images channels height width"], keep: Int[Tensor, " kept"]) -> Tensor:
    """Some channels, in the layout in which convolutions of any number of channels take the least time."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if len(keep) == x.shape[1] else x.permute(0, 2, 3, 1)[..., keep].permute(0, 3, 1, 2)


_FEWEST_CHANNELS = 8
"""With fewer channels, patches take no more time than sums for each distance."""
_ALL_OF_THEM = 4
"""Where no patches are made, all pixels take less time than patches of a sample of a quarter of them."""


def _has_maps(call: ConsumerCall, kernel: Tensor, keep: Tensor, positions: int) -> bool:
    """Whether all pixels are taken, with the 3x3 patch around each, of enough channels; elsewhere patches are made.

    On other devices than the CPU, convolutions may be rounded more coarsely, and the sums not be the same every time.
    """
    return (
        call.op == "conv2d"
        and kernel.shape[2:] == (3, 3)
        and {*call.stride, *call.dilation, *call.padding} == {1}
        and call.x.dtype == torch.float32
        and call.x.device.type == "cpu"
        and len(keep) >= _FEWEST_CHANNELS
        and call.out[0, 0].numel() <= _ALL_OF_THEM * max(1, positions // len(call.x))
    )


def _positions(
    call: ConsumerCall,
    kernel: Tensor,
    keep: Tensor,
    drop: Tensor,
    positions: int,
    generator: torch.Generator,
    wanted: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Regressors and targets at sampled positions: patches of the kept channels, and what the output loses.

    There are three cases. Usually ``kernel`` has the columns of the dropped channels, and the target is their
    contribution to the output (without dropped channels, the target has no columns). If a layer norm changes the input
    of the cut consumer (``call.fed``), the patches are taken from that input, ``kernel`` has the columns of the kept
    channels followed by those of the dropped ones, and the target also contains the change of the kept channels'
    contribution. If ``wanted`` is given, ``kernel`` has the columns of the kept channels, and the target is ``wanted``
    minus their contribution.
    """
    if call.op == "linear":
        x = call.x.reshape(-1, call.x.shape[-1])
        fed = None if call.fed is None else call.fed.reshape(x.shape)
        chosen = sample_positions(len(x), positions, generator)
        if chosen is not None:
            chosen = chosen.to(x.device)
            x, fed = x[chosen], None if fed is None else fed[chosen]
        if wanted is not None:
            y = wanted.reshape(-1, wanted.shape[-1])
            p = x[:, keep]
            yield p, (y if chosen is None else y[chosen]) - p @ kernel.T
            return
        size = max(1, _CHUNK_BYTES // (4 * x.shape[1]))
        for part, ahead in zip(x.split(size), _split_like(fed, x, size), strict=True):
            lost = _lost(part, ahead, keep, drop)
            yield (part if ahead is None else ahead)[:, keep], lost @ kernel.T if len(drop) else lost
        return
    x, kernel, stride, padding, dilation = _as_2d(call, kernel)
    fed = None if call.fed is None else _as_2d(replace(call, x=call.fed), kernel)[0]
    taps = kernel.shape[2:]
    pixels = call.out[0, 0].numel()
    chosen = sample_positions(pixels, max(1, positions // len(x)), generator)
    at = None if chosen is None else chosen.to(x.device)
    read_at = _Window((taps[0], taps[1]), stride, padding, dilation, call.out.shape[-1], at)
    size = max(1, _CHUNK_BYTES // (len(keep) * taps.numel() * (pixels if at is None else len(at)) * 4))
    pieces = zip(x.split(size), _split_like(fed, x, size), _split_like(wanted, x, size), strict=True)
    for part, ahead, share in pieces:
        p = read_at((part if ahead is None else ahead)[:, keep])
        if share is not None:
            asked = share.flatten(2).transpose(1, 2)
            yield p, (asked if at is None else asked[:, at]).flatten(0, 1) - p @ kernel.flatten(1).T
        elif not len(drop):
            yield p, p[:, :0]
        elif at is None:
            lost = functional.conv2d(_lost(part, ahead, keep, drop), kernel, None, stride, padding, dilation)
            yield p, lost.flatten(2).transpose(1, 2).flatten(0, 1)
        else:
            yield p, read_at(_lost(part, ahead, keep, drop)) @ kernel.flatten(1).T


@dataclass(frozen=True)
class _Window:
    """What a convolution reads for its outputs: all of them, or those at the given places of the flattened output."""

    taps: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    width: int  # of the output
    places: Int[Tensor, " places"] | None

    def __call__(self, x: Float[Tensor, "images channels height width"]) -> Float[Tensor, "positions patch"]:
        """The patches, image by image."""
        if self.places is None and (self.taps != (1, 1) or any(self.padding)):
            patches = functional.unfold(x, self.taps, self.dilation, self.padding, self.stride)
            return patches.transpose(1, 2).flatten(0, 1)
        if self.places is None:
            return _pixels(x[:, :, :: self.stride[0], :: self.stride[1]])
        # Patches at all places would take several times the memory and time. Pixels are gathered with all channels.
        x = functional.pad(x, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        starts = self.places // self.width * self.stride[0] * x.shape[3] + self.places % self.width * self.stride[1]
        down, across = (
            torch.arange(count, device=x.device) * far for count, far in zip(self.taps, self.dilation, strict=True)
        )
        images = torch.arange(len(x), device=x.device) * (x.shape[2] * x.shape[3])
        at = images[:, None, None] + starts[:, None] + (down[:, None] * x.shape[3] + across).flatten()
        seen = _pixels(x).index_select(0, at.flatten())
        return seen.reshape(-1, at.shape[2], x.shape[1]).transpose(1, 2).flatten(1)


def _pixels(x: Float[Tensor, "images channels height width"]) -> Float[Tensor, "pixels channels"]:
    """The channels of each pixel, image by image."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _split_like(other: Tensor | None, x: Tensor, size: int) -> Sequence[Tensor | None]:
    return [None] * -(-len(x) // size) if other is None else other.split(size)


def _lost(x: Tensor, fed: Tensor | None, keep: Tensor, drop: Tensor) -> Tensor:
    """The part of the input that the cut consumer loses: the change of the kept channels, then the dropped channels."""
    return x[:, drop] if fed is None else torch.cat([x[:, keep] - fed[:, keep], x[:, drop]], 1)


@dataclass
class ChannelSums:
    """Moments among all channels of a group at a consumer's input, pooled over all places where a channel occurs."""

    index: Int[Tensor, "channels places"]
    positions: int
    generator: torch.Generator
    moments: Moments | None = None
    columns: Tensor | None = None  # sum of every input column by itself

    def add(self, call: ConsumerCall, weight: Tensor) -> None:
        """Add one call of the consumer."""
        most = max(1, self.positions // self.index.shape[1])
        x = _sampled(_rows(call, call.x if call.fed is None else call.fed), most, self.generator)
        if self.moments is None or self.columns is None:
            self.moments = Moments.zeros(len(self.index), 0, x.device)
            self.columns = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        self.columns = self.columns + x.sum(0, dtype=torch.float64) * self.index.shape[1]
        for part in x.split(max(1, _CHUNK_BYTES // (4 * x.shape[1]))):
            p = part[:, self.index].transpose(1, 2).reshape(-1, len(self.index))
            self.moments.add(p, p[:, :0])


@dataclass
class ColumnSums:
    """Sums over the positions at which a consumer reads, for every input column by itself or for all pairs of them."""

    positions: int  # at most this many a call, for pairs
    count: int
    first: Float[Tensor, " columns"]
    second: Float[Tensor, " columns"] | Float[Tensor, "columns columns"]  # of squares, or of all products
    generator: torch.Generator

    def add(self, call: ConsumerCall) -> None:
        """Add the input of one call of the consumer."""
        x, pairs = _rows(call, call.x), self.second.dim() == 2
        if call.ends is not None and x.shape[1] < len(self.first):
            self._add_experts(x, call.ends)
            return
        x = _sampled(x, self.positions, self.generator) if pairs else x
        self.count += len(x)
        for part in x.split(max(1, _CHUNK_BYTES // (8 * x.shape[1]))):
            wide = part.double()
            self.first += wide.sum(0)
            if pairs:
                add_gram(self.second, wide)
            else:
                self.second += wide.square().sum(0)

    def _add_experts(self, x: Float[Tensor, "positions columns"], ends: Int[Tensor, " experts"]) -> None:
        """Add what experts read: each has its own columns, which are zero at the positions of the others."""
        self.count += len(x)
        for expert, rows in of_each_expert(ends):
            own, wide = slice(expert * x.shape[1], (expert + 1) * x.shape[1]), x[rows].double()
            self.first[own] += wide.sum(0)
            if self.second.dim() == 2:
                add_gram(self.second[own, own], wide)
            else:
                self.second[own] += wide.square().sum(0)

    def moments(self) -> ColumnMoments:
        """The means."""
        mean, second = (self.first / self.count).cpu(), (self.second / self.count).cpu()
        products = second if second.dim() == 2 else None
        return ColumnMoments(mean, second if products is None else products.diagonal(), products)


def _rows(call: ConsumerCall, x: Tensor) -> Float[Tensor, "positions columns"]:
    """A consumer's input position by position, without patches."""
    x = x if call.op == "linear" else x.flatten(2).transpose(1, 2)
    return x.reshape(-1, x.shape[-1])


def _sampled(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most so many of the rows."""
    chosen = sample_positions(len(x), most, generator)
    return x if chosen is None else x[chosen.to(x.device)]


def _as_2d(
    call: ConsumerCall, kernel: Tensor
) -> tuple[Tensor, Tensor, tuple[int, int], tuple[int, int], tuple[int, int]]:
    x = call.x
    if call.op == "conv1d":
        return (
            x.unsqueeze(2), kernel.unsqueeze(2), (1, call.stride[0]), (0, call.padding[0]), (1, call.dilation[0])
        )  # fmt: skip
    stride, padding, dilation = ((pair[0], pair[1]) for pair in (call.stride, call.padding, call.dilation))
    return x, kernel, stride, padding, dilation
