"""Short implementations of other methods that cut the channels inside residual blocks, for `image_peers.py`.

Each takes a network of `networks.CifarResNet` and the channels that stay, and gives the network with the filters of
the others zero, which computes what the cut one computes. None was tuned.

- Folding (Wang et al. 2025, "Forget the Data and Fine-Tuning! Just Fold the Network to Compress", arXiv 2502.10216):
  k-means of the filters, each with its batch norm folded in; a cluster becomes its mean, and the columns of its
  channels are added up. The variance that averaging takes is given back by re-estimating batch norms on data, or
  without data from the filters' mean correlation inside of the cluster (their Fold-AR).
- GRAIL (arXiv 2602.23795, ridge over magnitude pruning): layer after layer, ``B = G_PK (G_KK + a I)^-1`` on
  uncentered products of what the consumer is fed, channel by channel, with ``a`` relative to the mean square. Every
  tap of the consumer's kernel is multiplied by B.
- Magnitude: the filters with the largest L2 norm stay. Re-estimated batch norms are cumulative means over the
  calibration images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Images = Float[Tensor, "images channels height width"]


def blocks_of(net: nn.Module) -> Iterator[Any]:
    """The residual blocks, in the order of execution."""
    for stage in ("layer1", "layer2", "layer3"):
        yield from net.get_submodule(stage).children()


def largest(weight: Tensor, share: float) -> Int[Tensor, " kept"]:
    """All but a share of the filters: those with the largest L2 norms."""
    keep = len(weight) - round(share * len(weight))
    return weight.flatten(1).norm(dim=1).argsort(descending=True)[:keep].sort().values


def without(block: Any, keep: Tensor) -> None:
    """Set what reads the other channels to zero."""
    gone = torch.ones(len(block.conv1.weight), dtype=torch.bool)
    gone[keep] = False
    block.conv2.weight.data[:, gone] = 0


@torch.no_grad()
def magnitude(net: nn.Module, share: float) -> nn.Module:
    """Plain pruning by magnitude."""
    net = copy.deepcopy(net)
    for block in blocks_of(net):
        without(block, largest(block.conv1.weight, share))
    return net


@torch.no_grad()
def reestimated(net: nn.Module, images: Images) -> nn.Module:
    """Batch norms with the mean statistics of batches of 64 images."""
    net = copy.deepcopy(net)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    for part in images.split(64):
        net(part)
    return net.eval()


def clusters(points: Float[Tensor, "points features"], count: int, seed: int = 0) -> Int[Tensor, " points"]:
    """The number of each point's cluster, by k-means of the best of several starts (scikit-learn)."""
    from sklearn.cluster import KMeans

    return torch.from_numpy(KMeans(count, n_init=10, random_state=seed).fit_predict(points.double().numpy())).long()


@torch.no_grad()
def folded(net: nn.Module, share: float, repair: bool = False) -> nn.Module:
    """Model Folding of the channels inside blocks; ``repair`` gives back variance without data.

    A mean of n filters with mean correlation c has ``(1 + (n - 1) c) / n`` of their variance, so the mean filter is
    divided by the root of that.
    """
    net = copy.deepcopy(net)
    for block in blocks_of(net):
        norm, weight = block.bn1, block.conv1.weight
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        rows = weight.flatten(1) * gain[:, None]
        shift = norm.bias - norm.running_mean * gain
        count = len(weight) - round(share * len(weight))
        member = clusters(torch.cat([rows, shift[:, None]], 1), count)
        made, columns = torch.zeros_like(rows), torch.zeros_like(block.conv2.weight)
        spread, center = torch.ones_like(shift), torch.zeros_like(shift)
        mean, var = torch.zeros_like(shift), torch.ones_like(shift)
        for number in range(count):
            inside = (member == number).nonzero().flatten()
            first, n = inside[0], len(inside)
            merged = rows[inside].mean(0)
            if repair and n > 1:
                units = nn.functional.normalize(rows[inside], dim=1)
                likeness = ((units @ units.T).sum() - n) / (n * (n - 1))
                merged = merged / ((1 + (n - 1) * likeness.clamp(0, 1)) / n).sqrt()
            made[first] = merged
            columns[:, first] = block.conv2.weight[:, inside].sum(1)
            # The norm keeps the channels' mean spread and center, and gives what its statistics and these say together.
            spread[first] = norm.weight[inside].abs().mean().clamp_min(1e-3)
            center[first] = norm.bias[inside].mean()
            mean[first], var[first] = center[first] - shift[inside].mean(), spread[first] ** 2 - norm.eps
        block.conv1.weight.data, block.conv2.weight.data = made.view_as(weight), columns
        norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var = spread, center, mean, var.clamp_min(0)
    return net


def mixing(
    products: Float[Tensor, "channels channels"], keep: Int[Tensor, " kept"], ridge: float = 1e-3
) -> Float[Tensor, "channels kept"]:
    """``B = G_PK (G_KK + a I)^-1``: how all channels follow from the kept ones."""
    gram = products[keep][:, keep].clone()
    gram.diagonal().add_(ridge * float(gram.diagonal().mean()))
    return torch.linalg.solve(gram, products[keep]).T


@torch.no_grad()
def grail(net: nn.Module, images: Images, share: float) -> nn.Module:
    """GRAIL over magnitude, layer after layer on what the cut network gives so far."""
    net: Any = copy.deepcopy(net)
    hidden = [net.bn1(net.conv1(part)) for part in images.split(64)]
    for block in blocks_of(net):
        sums: list[Tensor] = []

        def watch(layer: Any, inputs: Any, sums: list[Tensor] = sums) -> None:
            x = inputs[0].movedim(1, -1).flatten(0, -2)
            sums.append((x.T @ x).double())

        hook = block.conv2.register_forward_pre_hook(watch)
        for part in hidden:
            block(part)
        hook.remove()
        keep = largest(block.conv1.weight, share)
        mix = mixing(torch.stack(sums).sum(0), keep).to(block.conv2.weight.dtype)
        whole = block.conv2.weight
        new = torch.zeros_like(whole)
        new[:, keep] = torch.einsum("opyx,pk->okyx", whole, mix)
        block.conv2.weight.data = new
        hidden = [block(part) for part in hidden]
    return net
