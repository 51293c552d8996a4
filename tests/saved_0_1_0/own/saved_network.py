"""The network of the folder beside this file, as its user had it: what lbyl loads the folder into.

It has what a plan can speak of: a convolution that computes its weight on the fly (`folds`), numbers that follow the
cut, of heads and of norms (`attributes`), channels in groups (`blocks`), and a constant that a mean is scaled by.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Standardized(nn.Conv2d):
    """A convolution whose filters have zero mean and unit variance."""

    def forward(self, input: Tensor) -> Tensor:
        mean, variance = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (variance + 1e-5).sqrt()
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, length, -1))


class Scaled(nn.Module):
    """A norm without a mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Standardized(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.width = nn.Conv2d(16, 24, 1)
        self.norm, self.attention = nn.LayerNorm(24), Attention(24, 4)
        self.scaled, self.up, self.down = Scaled(24), nn.Linear(24, 40), nn.Linear(40, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.width(self.body(self.stem(x))).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm(x))
        x = x + self.down(F.gelu(self.up(self.scaled(x))))
        return self.head(x.mean(1))


def network() -> Network:
    return Network()
