"""Sums of products within the 3x3 patches of an input, from products of its pixels at each distance.

Two numbers in a patch are two pixels at some distance. Away from the edges, the sum of their products over all patches
depends on this distance alone, and there are 13 distances, up to their sign, in place of 45 pairs of pixels. The sums
are what backpropagation calls the gradient of a convolution's weight, so that no patches are made at all, which would
take longer than the products.
"""

from __future__ import annotations

from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight

_REACH = 2
"""The largest distance of two pixels of a patch along an axis."""


def add_patch_products(sums: Float[Tensor, "patch patch"], x: Float[Tensor, "images channels height width"]) -> None:
    """Add ``p p^T`` for the patches p around all pixels, where zeros surround each image.

    The numbers of a patch are sorted by channel, row and column. Products are in the precision of ``x``, and the
    sums in their own. What is added is exactly symmetric.
    """
    channels, height, width = x.shape[1:]
    # Channel, row and column of the first and of the second number of each pair.
    pairs = sums.view(channels, 3, 3, channels, 3, 3)
    inside = _at_distances(x, _REACH, _REACH)
    # The first row of a patch is never the last row of an image, and its last one never the first; columns likewise.
    # This only concerns pairs in one row: in all others, a pixel that is never seen has no partner at their distance.
    rows = {tap: x.narrow(2, at, 1) for tap, at in ((0, height - 1), (2, 0))}
    columns = {tap: x.narrow(3, at, 1) for tap, at in ((0, width - 1), (2, 0))}
    in_rows = {tap: _at_distances(line, 0, _REACH)[0] for tap, line in rows.items()}
    in_columns = {tap: _at_distances(line, _REACH, 0)[:, 0] for tap, line in columns.items()}
    for row, column in product(range(3), range(3)):
        down, across = (slice(_REACH - tap, _REACH - tap + 3) for tap in (row, column))
        pairs[:, row, column] += inside[down, across].permute(2, 3, 0, 1)
        if row in rows:
            pairs[:, row, column, :, row] -= in_rows[row][across].permute(1, 2, 0)
        if column in columns:
            pairs[:, row, column, :, :, column] -= in_columns[column][down].permute(1, 2, 0)
        if row in rows and column in columns:  # taken away twice
            corner = rows[row][:, :, 0, 0 if column else width - 1]
            again = corner.T @ corner
            pairs[:, row, column, :, row, column] += (again + again.T) / 2


def patch_sums(x: Float[Tensor, "images channels height width"]) -> Float[Tensor, " patch"]:
    """The sum of the patches around all pixels, in float64; images are summed in the precision of ``x``."""
    images, channels, height, width = x.shape
    # Pixels with all their channels, as they usually lie in memory: sums over another order take several times as long.
    sums = x.permute(0, 2, 3, 1).reshape(images, -1).sum(0).double().reshape(height, width, channels)
    return (_seen(height).to(x.device) @ sums.permute(2, 0, 1) @ _seen(width).to(x.device).T).flatten()


def _seen(size: int) -> Float[Tensor, "taps places"]:
    """1 where a row of the patches sees a row of the image: the first one not the last, and the last not the first."""
    seen = torch.ones(3, size, dtype=torch.float64)
    seen[0, -1] = seen[2, 0] = 0
    return seen


def patch_targets(
    x: Float[Tensor, "images channels height width"], r: Float[Tensor, "images targets height width"]
) -> Float[Tensor, "patch targets"]:
    """The sum of ``p r^T`` over the patches p around all pixels and the targets r at them."""
    found = conv2d_weight(x, (r.shape[1], x.shape[1], 3, 3), r, padding=1)
    return found.flatten(1).T


def _at_distances(
    x: Float[Tensor, "images channels height width"], down: int, across: int
) -> Float[Tensor, "rows columns channels channels"]:
    """The sum of the products of all pairs of pixels at each distance up to these, from negative to positive ones.

    The distance is that from the first channel's pixel to the second channel's.
    """
    channels = x.shape[1]
    around = functional.pad(x, (across, across, 0, down))
    ahead = conv2d_weight(around, (channels, channels, down + 1, 2 * across + 1), x).permute(2, 3, 0, 1)
    here = ahead[:1]
    # Sums of the same products may be rounded in two ways.
    here = (here + _reversed(here)) / 2
    return torch.cat([_reversed(ahead[1:]), here, ahead[1:]])


def _reversed(sums: Float[Tensor, "rows columns channels channels"]) -> Float[Tensor, "rows columns channels channels"]:
    """The same sums, of distances in the other direction."""
    return sums.transpose(2, 3).flip(0, 1)
