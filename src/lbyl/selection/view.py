"""The view of a group's channels that criteria get: filters, consumers' weights, and moments of activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lbyl.graph import Slot
from lbyl.selection.filters import Filters, column_energy, columns_second, seats


@dataclass(frozen=True)
class ColumnMoments:
    """Moments of a consumer's input columns on probes, over all positions of all inputs.

    Attributes:
        mean: ``E[x_j]`` of each column.
        square: ``E[x_j^2]`` of each column.
        products: ``E[x_i x_j]`` of all pairs; None if not needed or too large.
    """

    mean: Float[Tensor, " columns"]
    square: Float[Tensor, " columns"]
    products: Float[Tensor, "columns columns"] | None = None


@dataclass(frozen=True)
class Reading:
    """How one consumer reads some channels.

    A channel may occupy several columns of the consumer (an attention head, a flattened feature map), which are called
    its seats. If channels have different numbers of seats, missing ones are padded with zeros.

    Attributes:
        slot: the consumer's input dimension.
        weight: the consumer's weight, output dimension first.
        index: the consumer's column at each seat, or -1.
        moments: moments of the consumer's input; None if not measured.
    """

    slot: Slot
    weight: Float[Tensor, "out columns *taps"]
    index: Int[Tensor, "channels seats"]
    moments: ColumnMoments | None

    @cached_property
    def energy(self) -> Float[Tensor, "channels seats"]:
        """``|U_j|^2``: the sum of squares of the consumer's weights for each seat."""
        if self._block is None:
            return self._seated(column_energy(self.slot, self.weight))
        # Only of this block: there may be many, and each is ranked by itself.
        width = self.weight.shape[1]
        first = self._block * width
        own = replace(self.slot, channels=self.slot.channels[first : first + width], blocks=1)
        return column_energy(own, self._rows)[(self.index - first).clamp_min(0)] * (self.index >= 0)

    @property
    def mean(self) -> Float[Tensor, "channels seats"]:
        """``E[x_j]`` at each seat."""
        return self._seated(self._seen.mean)

    @property
    def square(self) -> Float[Tensor, "channels seats"]:
        """``E[x_j^2]`` at each seat."""
        return self._seated(self._seen.square)

    @property
    def has_products(self) -> bool:
        """Whether ``E[x_i x_j]`` was measured; otherwise seats count as uncorrelated."""
        return self._seen.products is not None

    @property
    def products(self) -> Float[Tensor, "channels*seats channels*seats"]:
        """``E[x_i x_j]`` of all pairs of seats; the seats of a channel are adjacent."""
        products = self._seen.products
        if products is None:  # too large to be measured, so columns are treated as uncorrelated
            products = torch.diag(self._seen.square)
        flat = self.index.flatten()
        there = (flat >= 0).double()
        return products[flat.clamp_min(0)][:, flat.clamp_min(0)] * torch.outer(there, there)

    @cached_property
    def columns(self) -> Float[Tensor, "channels seats fan_out"]:
        """The consumer's weights for each seat; of a grouped convolution, zeros for the outputs of other blocks."""
        if self.slot.blocks > 1 and self._block is None:
            return self._columns_of_blocks()
        flat, first = self.index.clamp_min(0).cpu(), (self._block or 0) * self.weight.shape[1]
        part = self._rows.transpose(0, 1).flatten(1)
        return part[flat - first].double().cpu() * (self.index >= 0)[..., None]

    def _columns_of_blocks(self) -> Float[Tensor, "channels seats fan_out"]:
        """The same of channels in several blocks, each of which is read by outputs of its own."""
        blocks, width = self.slot.blocks, self.weight.shape[1]
        kernels = self.weight.detach().double().cpu().unflatten(0, (blocks, -1)).transpose(1, 2).flatten(2)
        index = self.index.clamp_min(0).cpu()
        found = torch.zeros(*index.shape, blocks, kernels.shape[2], dtype=torch.float64)
        at = torch.meshgrid(*map(torch.arange, index.shape), indexing="ij")
        found[(*at, index // width)] = kernels[index // width, index % width] * (self.index >= 0).cpu()[..., None]
        return found.flatten(2)

    @cached_property
    def _block(self) -> int | None:
        """The block of a grouped convolution that all of these channels are in; None without blocks or a single one."""
        inside = (self.index[self.index >= 0] // self.weight.shape[1]).unique() if self.slot.blocks > 1 else ()
        return int(inside[0]) if len(inside) == 1 else None

    @property
    def _rows(self) -> Tensor:
        """The rows of the weight that read these channels."""
        rows, block = len(self.weight) // self.slot.blocks, self._block or 0
        return self.weight.detach()[block * rows : (block + 1) * rows]

    @property
    def _seen(self) -> ColumnMoments:
        if self.moments is None:
            raise ValueError(f"{self.slot.parameter}: nothing was measured at this consumer")
        return self.moments

    def _seated(self, columns: Tensor) -> Tensor:
        return columns.cpu()[self.index.clamp_min(0)] * (self.index >= 0)


@dataclass(frozen=True)
class ChannelView:
    """Channels that are ranked together: those of a group, or of one block of a grouped convolution.

    Attributes:
        channels: their filters; each row of ``channels.raw`` is a flattened filter.
        readings: how each consumer reads them. They hold moments if the criterion needs them; consumers that did not
            run on the probes are then left out.
        generator: the source of random numbers.
    """

    channels: Filters
    readings: tuple[Reading, ...]
    generator: torch.Generator

    def __len__(self) -> int:
        return len(self.channels)


def readings_of(
    filters: Filters, members: Int[Tensor, " members"], moments: Mapping[str, ColumnMoments] | None
) -> tuple[Reading, ...]:
    """How each consumer of a group reads some of its channels; with ``moments``, only consumers that have some."""
    found = []
    for slot in filters.group.consumers:
        if moments is not None and slot.parameter not in moments:
            continue
        weight = columns_second(filters.state[slot.parameter].detach(), slot)
        index = seats(slot, filters.group.width)[members]
        found.append(Reading(slot, weight, index, None if moments is None else moments[slot.parameter]))
    return tuple(found)
