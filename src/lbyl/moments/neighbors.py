"""Sums of products within the 3x3 patches of an input, from products of its pixels at each distance.

Two numbers in a patch are two pixels at some distance. Away from the edges, the sum of their products over all patches
depends on this distance alone, and there are 13 distances, up to their sign, in place of 45 pairs of pixels. The sums
are what backpropagation calls the gradient of a convolution's weight, so that no patches are made at all, which would
take longer than the products.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight

_REACH = 2
"""The largest distance of two pixels of a patch along an axis."""
_GAPS = torch.arange(3) - torch.arange(3)[:, None] + _REACH
"""Where the distance from one row of a patch (first index) to another one is in a list of all distances."""


def patch_products(x: Float[Tensor, "images channels height width"]) -> Float[Tensor, "patch patch"]:
    """The sum of ``p p^T`` over the patches p around all pixels, where zeros surround each image.

    The numbers of a patch are sorted by channel, row and column. Products and their sums are in the precision of ``x``,
    and the result is exactly symmetric.
    """
    gaps = _GAPS.to(x.device)
    # Channel, channel, row, row, column, column: of the first and of the second number of each pair.
    pairs = _at_distances(x, _REACH, _REACH)[:, :, gaps[:, :, None, None], gaps]
    # The first row of patches does not see the last row of an image, and the last one not the first; columns likewise.
    # This only concerns pairs in one row: in all others, no pixel that is not seen has a partner at their distance.
    for tap, place in ((0, -1), (2, 0)):
        row = x.narrow(2, place % x.shape[2], 1)
        column = x.narrow(3, place % x.shape[3], 1)
        pairs[:, :, tap, tap] -= _at_distances(row, 0, _REACH)[:, :, 0, gaps]
        pairs[:, :, :, :, tap, tap] -= _at_distances(column, _REACH, 0)[:, :, gaps, 0]
        for other, at in ((0, -1), (2, 0)):  # taken away twice
            pairs[:, :, tap, tap, other, other] += _at_distances(row.narrow(3, at % x.shape[3], 1), 0, 0)[:, :, 0, 0]
    return pairs.permute(0, 2, 4, 1, 3, 5).reshape(9 * x.shape[1], 9 * x.shape[1])


def patch_sums(x: Float[Tensor, "images channels height width"]) -> Float[Tensor, " patch"]:
    """The sum of the patches around all pixels, in float64."""
    height, width = x.shape[2:]
    around = functional.pad(x.sum(0, dtype=torch.float64), (1, 1, 1, 1))
    return around.unfold(1, height, 1).unfold(2, width, 1).sum((3, 4)).flatten()


def patch_targets(
    x: Float[Tensor, "images channels height width"], r: Float[Tensor, "images targets height width"]
) -> Float[Tensor, "patch targets"]:
    """The sum of ``p r^T`` over the patches p around all pixels and the targets r at them."""
    found = conv2d_weight(x, (r.shape[1], x.shape[1], 3, 3), r, padding=1)
    return found.flatten(1).T


def _at_distances(
    x: Float[Tensor, "images channels height width"], down: int, across: int
) -> Float[Tensor, "channels channels rows columns"]:
    """The sum of the products of all pairs of pixels at each distance up to these, from negative to positive ones.

    The distance is that from the first channel's pixel to the second channel's.
    """
    channels = x.shape[1]
    around = functional.pad(x, (across, across, 0, down))
    ahead = conv2d_weight(around, (channels, channels, down + 1, 2 * across + 1), x)
    here = ahead[:, :, :1]
    # Sums of the same products may be rounded in two ways.
    here = (here + _reversed(here)) / 2
    return torch.cat([_reversed(ahead[:, :, 1:]), here, ahead[:, :, 1:]], 2)


def _reversed(sums: Float[Tensor, "channels channels rows columns"]) -> Float[Tensor, "channels channels rows columns"]:
    """The same sums, of distances in the other direction."""
    return sums.transpose(0, 1).flip(2, 3)
