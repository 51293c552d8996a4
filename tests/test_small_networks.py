"""Many small networks, as people write and report them, cut in both scopes and by every restorer.

Verification must not be its own judge, so each cut network is compared with two networks that are built here. The first
is the original in which the layers that read dropped channels have zeros in their place. The second is the original
with the tensors of the cut network put back at the indices that stay, and zeros at all others.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from nets import settle
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import lbyl
from lbyl.errors import InputError
from lbyl.graph import NOT_OURS, Graph, Slot

RESTORERS: tuple[Any, ...] = ("lbyl", "merge", "coreset", lbyl.LeastSquares(moments=lbyl.Noise(images=4)))
IMAGE, ROW, TOKENS, SIGNAL, VOLUME = (2, 3, 8, 8), (2, 6), (2, 5, 6), (2, 3, 16), (1, 2, 4, 4, 4)
C, L, S = nn.Conv2d, nn.Linear, nn.Sequential


class Net(nn.Module):
    """Parts by name, and a function of the network and its input that uses them."""

    def __init__(self, call: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def on(call: Callable[[Tensor], Tensor], *tail: nn.Module, width: int = 12) -> nn.Module:
    """A function between two convolutions of image channels."""
    return S(C(3, width, 3, 1, 1), Net(lambda n, x: call(x)), *(tail or (C(width, 8, 1), nn.ReLU(), C(8, 4, 1))))


def written(empty: Tensor, x: Tensor) -> Tensor:
    """One value after half of it is written into another."""
    empty[:, :, :4] = x[:, :, :4]
    return empty


def shuffled(groups: int) -> Callable[[Tensor], Tensor]:
    """A channel shuffle as people write it."""
    return lambda x: x.view(len(x), groups, x.shape[1] // groups, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def between(*parts: nn.Module) -> nn.Module:
    """Modules between two convolutions."""
    return S(C(3, 12, 3, 1, 1), *parts, C(12, 8, 1), nn.ReLU(), C(8, 4, 1))


def added(made: Callable[[Tensor], Tensor], *shape: int, norm: nn.Module | None = None) -> nn.Module:
    """What is made of a table of positions is added to channels."""
    norm = norm or nn.Identity()
    return Net(
        lambda n, x: n.b((n.a(x) + n.norm(made(n.p))).relu()), a=L(6, 12), b=L(12, 3), p=torch.randn(shape), norm=norm
    )


def along(call: Callable[[Tensor], Tensor]) -> nn.Module:
    """A function of signals between two convolutions."""
    return S(nn.Conv1d(3, 12, 3, 1, 1), nn.ReLU(), Net(lambda n, x: call(x)), nn.Conv1d(12, 4, 1))


def block(inside: nn.Module, width: int = 12) -> nn.Module:
    """A residual block with a stem and a head around it."""
    return S(C(3, width, 3, 1, 1), Net(lambda n, x: x + n.inside(x), inside=inside), nn.ReLU(), C(width, 4, 1))


def tokens(inside: nn.Module, width: int = 12) -> nn.Module:
    """A residual block on tokens."""
    return S(L(6, width), Net(lambda n, x: x + n.inside(x), inside=inside), L(width, 3))


def gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate.sigmoid()


def heads_of(n: Any, x: Tensor) -> Tensor:
    """Attention with heads, as in a vision transformer."""
    count, places, _ = x.shape
    q, k, v = n.qkv(x).reshape(count, places, 3, n.heads, n.size).permute(2, 0, 3, 1, 4)
    y = (q @ k.transpose(-2, -1) * n.size**-0.5).softmax(-1) @ v
    return n.out(y.transpose(1, 2).reshape(count, places, n.heads * n.size))


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=x.dtype)
    return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()


def rotary(n: Any, x: Tensor) -> Tensor:
    """Grouped queries with rotary positions, as in Llama."""
    q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (n.q, n.k, n.v))
    q, k = rotated(q), rotated(k)
    k, v = (t.repeat_interleave(n.shared, 1) for t in (k, v))
    return n.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def partly_rotary(n: Any, x: Tensor) -> Tensor:
    """One layer for queries, keys and values, of which a part is rotated, as in GPT-NeoX."""
    q, k, v = n.qkv(x).view(*x.shape[:2], -1, 18).transpose(1, 2).chunk(3, -1)
    q, k = (torch.cat([rotated(t[..., :4]), t[..., 4:]], -1) for t in (q, k))
    return n.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


def one_key(n: Any, x: Tensor) -> Tensor:
    """Multi-query attention: all heads share a key and a value."""
    q = n.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)
    k, v = (layer(x)[:, None] for layer in (n.k, n.v))
    return n.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


def one_key_of_one_layer(n: Any, x: Tensor) -> Tensor:
    """One layer for the queries of all heads, and for the key and the value that they share, as in Falcon."""
    qkv = n.qkv(x).view(*x.shape[:2], n.heads + 2, 4).transpose(1, 2)
    y = F.scaled_dot_product_attention(qkv[:, :-2], qkv[:, [-2]], qkv[:, [-1]])
    return n.out(y.transpose(1, 2).flatten(2))


def latent(n: Any, x: Tensor) -> Tensor:
    """Multi-head latent attention: all heads share a part of the key."""
    q, kv = (layer(x).unflatten(-1, (-1, size)).transpose(1, 2) for layer, size in ((n.q, 6), (n.kv, 9)))
    key = kv.new_empty(*kv.shape[:-1], 6)
    key[..., :4].copy_(kv[..., :4])
    key[..., 4:] = n.shared(x)[:, None].expand(-1, kv.shape[1], -1, -1)
    return n.out(F.scaled_dot_product_attention(q, key, kv[..., 4:]).transpose(1, 2).flatten(2))


def in_parts(n: Any, x: Tensor) -> Tensor:
    """The outputs of two layers, written side by side into one tensor."""
    y = x.new_zeros(len(x), n.first + n.second)
    y[:, : n.first] = n.a(x).relu()
    y[:, n.first :].copy_(n.b(x))
    return n.c(y)


def biased_scores(n: Any, x: Tensor) -> Tensor:
    """Attention in which a bias for each distance is added by the product itself, as in BLOOM."""
    q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2).flatten(0, 1) for layer in (n.q, n.k, n.v))
    scores = torch.baddbmm(x.new_ones(1, x.shape[1], x.shape[1]).tril(), q, k.mT, beta=0.5, alpha=0.5)
    return n.out((scores.softmax(-1) @ v).unflatten(0, (len(x), -1)).transpose(1, 2).flatten(2))


def non_local(n: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).flatten(2) for layer in (n.q, n.k, n.v))
    return x + n.out((v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)).view(len(x), -1, *x.shape[2:]))


def one_head(n: Any, x: Tensor) -> Tensor:
    return n.out((n.q(x) @ n.k(x).transpose(-1, -2) * n.scale).softmax(-1) @ n.v(x))


def layer_norm_2d(n: Any, x: Tensor) -> Tensor:
    mean = x.mean(dim=1, keepdim=True)
    away = (x - mean).pow(2).mean(dim=1, keepdim=True)
    return n.weight[:, None, None] * ((x - mean) / (away + 1e-6).sqrt()) + n.bias[:, None, None]


def unet(n: Any, x: Tensor) -> Tensor:
    a = n.a(x).relu()
    b = n.b(F.max_pool2d(a, 2)).relu()
    return n.c(torch.cat([a, F.interpolate(b, scale_factor=2)], 1))


def pyramid(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    a = n.a(x).relu()
    b = n.b(a).relu()
    top = n.top(b)
    return n.one(n.side(a) + F.interpolate(top, size=a.shape[-2:])), n.two(top)


def dense(n: Any, x: Tensor) -> Tensor:
    features = [n.stem(x)]
    for layer in n.layers:
        features.append(layer(torch.cat(features, 1)))
    return n.head(torch.cat(features, 1))


def split_in_two(n: Any, x: Tensor) -> Tensor:
    a, b = n.a(x).chunk(2, 1)
    return n.out(torch.cat([a, b, n.inside(b)], 1))


def tower(n: Any, x: Tensor) -> Tensor:
    x = n.stem(x)
    return n.out(torch.cat([branch(x) for branch in n.branches], 1))


def wave(n: Any, x: Tensor) -> Tensor:
    x, skips = n.stem(x), 0
    for gate, skip, onward in zip(n.gates, n.skips, n.onwards, strict=True):
        a, b = gate(x).chunk(2, 1)
        y = a.tanh() * b.sigmoid()
        x, skips = x + onward(y), skips + skip(y)
    return n.out(skips.relu())


def cells(n: Any, x: Tensor) -> Tensor:
    state, y = None, n.before(x)
    for place in range(y.shape[1]):
        state = n.cell(y[:, place], state)
    return n.out(state if isinstance(state, Tensor) else state[0])


def decoder(n: Any, x: Tensor) -> Tensor:
    h, y = n.start(x[:, 0]).tanh(), n.before(x)
    out, _ = n.gru(y, h[None])
    return n.out(out)


def pooled_by(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Attention that pools positions with a vector of its own."""

    def run(n: Any, x: Tensor) -> Tensor:
        hidden = n.a(x).relu()
        return n.b((product(n.w(hidden).tanh(), n.v).softmax(1)[..., None] * hidden).sum(1))

    return run


EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 3, 0]])


def messages(n: Any, x: Tensor) -> Tensor:
    """Messages along edges, summed at nodes: into zeros of a width that the module knows, then in place."""
    y = n.a(x).relu()
    y = y.new_zeros(len(x), 5, n.hidden).index_add(1, EDGES[1], y[:, EDGES[0]])
    y = n.b(y).relu()
    out = torch.zeros_like(y)
    out.index_add_(1, EDGES[1], y[:, EDGES[0]])
    return n.c(out)


def largest_messages(n: Any, x: Tensor) -> Tensor:
    """The largest message at each node, and a sum of messages, both by scatters."""
    y = n.a(x).relu()
    sent = y[:, EDGES[0]]
    at = EDGES[1][:, None].expand_as(sent)
    y = n.b(torch.zeros_like(y).scatter_reduce(1, at, sent, "amax")).relu()
    sent = y[:, EDGES[0]]
    return n.c(torch.zeros_like(y).scatter_add(1, EDGES[1][:, None].expand_as(sent), sent))


def put_in_place(n: Any, x: Tensor) -> Tensor:
    """Rows that are written at indices: over zeros, over a constant, added to others, and a number in their place."""
    y = n.a(x.flatten(0, 1)).relu()
    out = y.new_zeros(12, y.shape[1])
    out[torch.arange(11, 1, -1)] = y
    y = n.b(out.index_fill(0, EDGES[0, :3], 0.5)).relu()
    y[EDGES[0, :2]] += y[EDGES[0, 2:4]]
    return n.c(y.index_copy(0, EDGES[1, :2], y[3:5]))


def text_convolutions(n: Any, x: Tensor) -> Tensor:
    """Convolutions over words whose kernel is as wide as their vectors, as in text classifiers."""
    y = n.before(x)[:, None]
    return n.out(
        torch.cat([F.max_pool1d(z := layer(y).relu().squeeze(3), z.shape[2]).squeeze(2) for layer in n.layers], 1)
    )


def spatial_gate(n: Any, x: Tensor) -> Tensor:
    """The gate of gMLP: a convolution with a kernel of one takes tokens for its channels."""
    a, b = n.up(x).chunk(2, -1)
    return n.out(a * n.across(b))


def additive_attention(n: Any, x: Tensor) -> Tensor:
    """One weight for each place, by which all channels are multiplied."""
    y = n.a(x).relu()
    weights = n.v(n.w(y).tanh()).softmax(1)
    return n.out(torch.bmm(weights.transpose(1, 2), y).squeeze(1))


def latents(n: Any, x: Tensor) -> Tensor:
    """Learned queries that are normed before they meet channels."""
    x, y = n.before(x).relu(), n.queries.expand(len(x), -1, -1)
    for norm in n.norms:
        y = y + (n.q(norm(y)) @ n.k(x).mT).softmax(-1) @ n.v(x)
    return n.out(y)


def learned_graph(n: Any, x: Tensor) -> Tensor:
    """A graph that is learned: its weights are computed from a parameter."""
    edges = n.edges.relu() + 0.1
    edges = edges / edges.sum(-1, keepdim=True)
    return n.c((edges.softmax(-1) @ n.b((edges @ n.a(x)).relu())).relu())


def by_distance(n: Any, x: Tensor) -> Tensor:
    """Queries of each head are mixed by a computed matrix, and scores get a part that depends on distances."""
    places = torch.arange(x.shape[1])
    distances = n.distances[places[:, None] - places + 4]
    q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (n.q, n.k, n.v))
    q = torch.einsum("bhid,hde->bhie", q, n.each * 0.5)
    scores = q @ k.mT + torch.einsum("bhid,ijd->bhij", q, distances)
    return n.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def spectral(n: Any, x: Tensor) -> Tensor:
    """A layer of a Fourier neural operator: a complex matrix for each of the lowest frequencies."""
    y = n.a(x)
    waves = torch.fft.rfft2(y)
    out = torch.zeros_like(waves)
    weight = n.w if waves.dtype == n.w.dtype else n.w.to(waves.dtype)
    out[:, :, :3, :3] = torch.einsum("bixy,ioxy->boxy", waves[:, :, :3, :3], weight)
    return n.out((torch.fft.irfft2(out, s=y.shape[-2:]) + n.b(y)).relu())


def class_token(n: Any, x: Tensor) -> Tensor:
    x = torch.cat([n.token.expand(len(x), -1, -1), n.embed(x)], 1) + n.places
    return n.out(n.inside(x)[:, 0])


def mixer(n: Any, x: Tensor) -> Tensor:
    x = n.embed(x)
    x = x + n.across(x.transpose(1, 2)).transpose(1, 2)
    return n.out(x + n.down(F.gelu(n.up(x))))


def recurrent(layer: Any, **settings: Any) -> nn.Module:
    wide = 10 * (2 if settings.get("bidirectional") else 1)
    return Net(
        lambda n, x: n.out(n.layer(n.before(x).relu())[0]),
        before=L(6, 8),
        layer=layer(8, 10, batch_first=True, **settings),
        out=L(wide, 4),
    )


def squeezed(gate: nn.Module) -> nn.Module:
    return S(C(3, 12, 3), nn.ReLU(), Net(lambda n, x: gated(x, n.gate(x)), gate=gate), C(12, 4, 1))


def attention(call: Callable[[Any, Tensor], Tensor], **parts: Any) -> nn.Module:
    return S(L(6, 10), Net(call, **parts), L(10, 3))


def image_of(*tail: nn.Module, between: nn.Module | None = None) -> nn.Module:
    """A linear layer whose outputs a view spreads over an image."""
    return S(L(6, 72), *([between] if between else []), nn.Unflatten(1, (8, 3, 3)), nn.ReLU(), *tail)


def up(width: int = 8, out: int = 6, **settings: Any) -> nn.Module:
    return S(C(3, width, 3), nn.ReLU(), nn.ConvTranspose2d(width, out, 4, 2, 1, **settings), nn.ReLU(), C(out, 4, 1))


def product_net(product: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, int]) -> nn.Module:
    """A parameter that mixes channels by a function, between layers."""
    weight = nn.Parameter(torch.randn(shape))
    return Net(lambda n, x: n.c(product(n.a(x).relu(), n.w).relu()), a=L(6, 9), w=weight, c=L(7, 3))


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, int]]] = {
    "einsum": (lambda x, w: torch.einsum("bi,oi->bo", x, w), (7, 9)),
    "einsum with an ellipsis": (lambda x, w: torch.einsum("...i,io->...o", x, w), (9, 7)),
    "einsum without a result": (lambda x, w: torch.einsum("bi,oi", x, w), (7, 9)),
    "einsum with the weight first": (lambda x, w: torch.einsum("oi,bi->bo", w, x), (7, 9)),
    "einsum by numbers": (lambda x, w: torch.einsum(x, [0, 1], w, [2, 1], [0, 2]), (7, 9)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=1), (9, 7)),
    "tensordot with axes": (lambda x, w: torch.tensordot(w, x, dims=([1], [1])).t(), (7, 9)),
    "inner": (torch.inner, (7, 9)),
    "a product by its keyword": (lambda x, w: torch.matmul(x, other=w), (9, 7)),
    "a product from the left": (lambda x, w: (w @ x.unsqueeze(-1))[..., 0], (7, 9)),
}


IMAGES: dict[str, Callable[[], nn.Module]] = {
    # convolutions
    "plain": lambda: S(C(3, 8, 3), nn.ReLU(), C(8, 6, 3), nn.ReLU(), C(6, 4, 1)),
    "batch norm": lambda: S(C(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), C(8, 4, 3)),
    "flatten": lambda: S(C(3, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), L(72, 10), nn.ReLU(), L(10, 3)),
    "global pool": lambda: S(C(3, 8, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), L(8, 3)),
    "view": lambda: Net(lambda n, x: n.b(n.a(x).relu().reshape(len(x), -1)), a=C(3, 8, 3), b=L(288, 3)),
    "dilated, strided": lambda: S(C(3, 8, 3, 2, 2, 2), nn.ELU(), C(8, 4, 3, padding="same")),
    "reflected border": lambda: S(C(3, 8, 3, padding=1, padding_mode="reflect"), nn.GELU(), C(8, 4, 1)),
    "circular border": lambda: S(C(3, 8, 3), nn.SiLU(), C(8, 4, 3, padding=1, padding_mode="circular")),
    "padded": lambda: S(C(3, 8, 3), nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), C(8, 4, 3)),
    "groups": lambda: S(C(3, 8, 3), nn.ReLU(), C(8, 8, 3, groups=4), nn.ReLU(), C(8, 4, 1)),
    "groups after groups": lambda: S(C(3, 12, 3), C(12, 12, 1, groups=2), nn.ReLU(), C(12, 6, 1, groups=3), C(6, 4, 1)),
    "separable": lambda: S(C(3, 8, 1), nn.BatchNorm2d(8), C(8, 8, 3, groups=8), nn.BatchNorm2d(8), C(8, 4, 1)),
    "depthwise multiplier": lambda: S(C(3, 6, 1), nn.ReLU(), C(6, 12, 3, groups=6), nn.ReLU(), C(12, 4, 1)),
    "transposed": lambda: up(),
    "transposed, no bias": lambda: up(bias=False),
    "transposed, depthwise": lambda: up(8, 8, groups=8),
    "transposed, depthwise multiplier": lambda: up(8, 16, groups=8),
    "transposed, groups": lambda: up(8, 12, groups=2),
    "transposed, groups, no bias": lambda: up(12, 12, groups=3, bias=False),
    "factorized": lambda: S(C(3, 8, (3, 1)), nn.ReLU(), C(8, 8, (1, 3)), nn.ReLU(), C(8, 4, 1)),
    "a layer used twice": lambda: Net(
        lambda n, x: n.c(n.b(n.b(n.a(x)).relu()).relu()), a=C(3, 8, 3), b=C(8, 8, 1), c=C(8, 4, 1)
    ),
    "inverted residual": lambda: block(
        S(
            C(12, 24, 1),
            nn.BatchNorm2d(24),
            nn.Hardswish(),
            C(24, 24, 3, 1, 1, groups=24),
            nn.BatchNorm2d(24),
            nn.Hardswish(),
            C(24, 12, 1),
        )
    ),
    # residual streams and branches
    "residual": lambda: block(
        S(C(12, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), C(8, 12, 3, 1, 1), nn.BatchNorm2d(12))
    ),
    "residual, scaled": lambda: block(Net(lambda n, x: n.scale * n.a(x), scale=torch.rand(12, 1, 1), a=C(12, 12, 1))),
    "shortcut": lambda: Net(
        lambda n, x: n.head((n.long(x) + n.short(x)).relu()),
        long=S(C(3, 8, 3), nn.ReLU(), C(8, 8, 1)),
        short=C(3, 8, 3),
        head=C(8, 4, 1),
    ),
    "reparametrized": lambda: block(Net(lambda n, x: n.a(x) + n.b(x), a=C(12, 12, 3, 1, 1), b=C(12, 12, 1))),
    "dense block": lambda: Net(
        dense, stem=C(3, 6, 1), layers=nn.ModuleList(C(6 + 4 * i, 4, 3, 1, 1) for i in range(3)), head=C(18, 4, 1)
    ),
    "inception": lambda: Net(
        tower,
        stem=C(3, 8, 1),
        out=C(15, 4, 1),
        branches=nn.ModuleList([C(8, 4, 1), S(C(8, 6, 1), nn.ReLU(), C(6, 5, 3, 1, 1)), C(8, 6, 1)]),
    ),
    "unet": lambda: Net(unet, a=C(3, 6, 3, 1, 1), b=C(6, 8, 3, 1, 1), c=C(14, 4, 1)),
    "pyramid": lambda: Net(
        pyramid, a=C(3, 6, 3, 1, 1), b=C(6, 8, 3, 2, 1), side=C(6, 5, 1), top=C(8, 5, 1), one=C(5, 2, 1), two=C(5, 2, 1)
    ),
    "cross stage": lambda: Net(split_in_two, a=C(3, 12, 1), inside=S(C(6, 6, 3, 1, 1), nn.SiLU()), out=C(18, 4, 1)),
    "ghost": lambda: Net(
        lambda n, x: n.out(torch.cat([y := n.a(x).relu(), n.b(y)], 1)),
        a=C(3, 8, 1),
        b=C(8, 8, 3, 1, 1, groups=8),
        out=C(16, 4, 1),
    ),
    "pools side by side": lambda: S(
        C(3, 8, 1), Net(lambda n, x: torch.cat([x, *(F.max_pool2d(x, k, 1, k // 2) for k in (3, 5))], 1)), C(24, 4, 1)
    ),
    "focus": lambda: S(C(3, 8, 1), Net(lambda n, x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2]], 1)), C(16, 4, 1)),
    "sum of a list": lambda: Net(
        lambda n, x: n.out(torch.stack([layer(x) for layer in n.layers]).sum(0)),
        layers=nn.ModuleList(C(3, 8, k, padding=k // 2) for k in (1, 3)),
        out=C(8, 4, 1),
    ),
    "dictionary of outputs": lambda: Net(
        lambda n, x: {"a": n.b(y := n.a(x).relu()), "rest": [n.c(y)]}, a=C(3, 8, 3), b=C(8, 4, 1), c=C(8, 2, 1)
    ),
    # gates
    "squeeze and excitation": lambda: squeezed(S(nn.AdaptiveAvgPool2d(1), C(12, 6, 1), nn.ReLU(), C(6, 12, 1))),
    "squeeze by linear layers": lambda: squeezed(
        S(nn.AdaptiveAvgPool2d(1), nn.Flatten(), L(12, 6), nn.ReLU(), L(6, 12), nn.Unflatten(1, (12, 1, 1)))
    ),
    "a gate for all channels": lambda: squeezed(S(C(12, 5, 1), nn.ReLU(), C(5, 1, 1))),
    "channel attention": lambda: squeezed(
        Net(
            lambda n, x: n.mlp(x.mean((2, 3), True)) + n.mlp(x.amax((2, 3), True)),
            mlp=S(C(12, 6, 1), nn.ReLU(), C(6, 12, 1)),
        )
    ),
    "spatial attention": lambda: squeezed(
        Net(
            lambda n, x: n.a(torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], 1)),
            a=C(2, 1, 3, 1, 1),
        )
    ),
    "global context": lambda: block(
        Net(
            lambda n, x: n.mlp((x * n.a(x).flatten(2).softmax(-1).view_as(x[:, :1])).sum((2, 3), True)),
            a=C(12, 1, 1),
            mlp=S(C(12, 5, 1), nn.ReLU(), C(5, 12, 1)),
        )
    ),
    # norms
    "layer norm by hand": lambda: between(Net(layer_norm_2d, weight=torch.rand(12), bias=torch.rand(12))),
    "layer norm, channels last": lambda: on(
        lambda x: x.permute(0, 2, 3, 1), nn.LayerNorm(12), L(12, 5), nn.ReLU(), L(5, 3)
    ),
    "pixel norm": lambda: on(lambda x: x * torch.rsqrt(x.pow(2).mean(dim=1, keepdim=True) + 1e-8)),
    "unit length": lambda: on(lambda x: F.normalize(x, dim=1)),
    "less the mean": lambda: on(lambda x: x - x.mean(dim=1, keepdim=True)),
    "less the largest": lambda: on(lambda x: x - x.max(dim=1, keepdim=True)[0]),
    "standard deviation": lambda: on(lambda x: x / (x.std(dim=1, keepdim=True) + 1)),
    "sum of exponentials": lambda: on(lambda x: x - x.logsumexp(dim=1, keepdim=True)),
    "a map of lengths": lambda: on(lambda x: x * x.norm(dim=1, keepdim=True).tanh()),
    "group norm": lambda: between(nn.GroupNorm(4, 12), nn.ReLU()),
    "group norm, one group": lambda: between(nn.GroupNorm(1, 12), nn.ReLU()),
    "group norm, no weight": lambda: between(nn.GroupNorm(4, 12, affine=False), nn.ReLU()),
    "instance norm": lambda: between(nn.InstanceNorm2d(12), nn.ReLU()),
    "instance norm, weight": lambda: between(nn.InstanceNorm2d(12, affine=True, track_running_stats=True), nn.ReLU()),
    "no running statistics": lambda: between(nn.BatchNorm2d(12, track_running_stats=False), nn.ReLU()),
    "no weight": lambda: between(nn.BatchNorm2d(12, affine=False), nn.ReLU()),
    "weight norm": lambda: S(nn.utils.parametrizations.weight_norm(C(3, 8, 3)), nn.ReLU(), C(8, 4, 1)),
    "response norm": lambda: on(lambda x: F.local_response_norm(x, 3)),
    # element by element
    "prelu": lambda: between(nn.PReLU(12)),
    "one prelu": lambda: between(nn.PReLU()),
    "rrelu": lambda: between(nn.RReLU(), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Dropout2d()),
    "snake": lambda: between(Net(lambda n, x: x + (n.a * x).sin().square() / n.a, a=torch.rand(1, 12, 1, 1) + 1)),
    "swish, a slope a channel": lambda: between(
        Net(lambda n, x: x * (x * n.a.view(1, -1, 1, 1)).sigmoid(), a=torch.rand(12))
    ),
    "maximum with a parameter": lambda: between(Net(lambda n, x: torch.max(x, n.a), a=torch.rand(12, 1, 1))),
    "maximum with itself": lambda: on(lambda x: torch.max(x, 0.1 * x)),
    "clamped by a parameter": lambda: between(Net(lambda n, x: x.clamp(max=n.a), a=torch.rand(12, 1, 1))),
    "where, zeros": lambda: on(lambda x: torch.where(x > 0, x, torch.zeros_like(x))),
    "zeros": lambda: on(lambda x: x + torch.zeros_like(x) - 0.1 * torch.ones_like(x)),
    "masked": lambda: on(lambda x: x.masked_fill(x < 0, 0)),
    "in place": lambda: on(lambda x: x.mul(2).add_(1).clamp_(0).div_(3)),
    "clip, reciprocal": lambda: on(lambda x: torch.clip(x, 0, 6).add(1).reciprocal()),
    "log of softplus": lambda: on(lambda x: F.softplus(x).log1p().tan()),
    "hardtanh, threshold": lambda: between(nn.Hardtanh(), nn.Threshold(0.1, 0), nn.Softsign(), nn.LogSigmoid()),
    # resampling and positions
    "grid": lambda: on(
        lambda x: F.grid_sample(
            x, torch.linspace(-1, 1, 50, dtype=x.dtype).view(1, 5, 5, 2).expand(len(x), -1, -1, -1), align_corners=False
        )
    ),
    "nearest": lambda: on(lambda x: F.interpolate(x, scale_factor=2)),
    "nearest exact": lambda: on(lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact")),
    "bilinear": lambda: on(lambda x: F.interpolate(x, size=(9, 7), mode="bilinear", align_corners=True)),
    "bicubic": lambda: on(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
    "antialias": lambda: on(lambda x: F.interpolate(x, size=(5, 5), mode="bilinear", antialias=True)),
    "max pool with places": lambda: on(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    "length pool": lambda: on(lambda x: F.lp_pool2d(x.relu() + 1, 2, 2)),
    "generalized mean": lambda: Net(
        lambda n, x: n.b(n.a(x).clamp(min=1e-2).pow(n.p).mean((2, 3)).pow(1 / n.p)),
        a=C(3, 8, 3),
        b=L(8, 3),
        p=torch.full((1,), 3.0),
    ),
    "statistics": lambda: S(
        C(3, 8, 3),
        Net(lambda n, x: torch.cat([x.mean((2, 3)), x.var((2, 3)).sqrt(), x.flatten(2).amax(-1)], 1)),
        L(24, 3),
    ),
    "pixel shuffle": lambda: S(C(3, 16, 1), nn.PixelShuffle(2), nn.ReLU(), C(4, 3, 1)),
    "blur made in forward": lambda: on(lambda x: F.conv2d(x, x.new_ones(x.shape[1], 1, 3, 3) / 9, groups=x.shape[1])),
    "blur from a parameter": lambda: S(
        C(3, 12, 3),
        Net(lambda n, x: F.conv2d(x, n.k.repeat(x.shape[1], 1, 1, 1), groups=x.shape[1]), k=torch.ones(1, 1, 3, 3)),
        C(12, 4, 1),
    ),
    "channel shuffle": lambda: on(shuffled(3)),
    "channel shuffle by its name": lambda: between(nn.ChannelShuffle(2)),
    "channel shuffle of more groups than places": lambda: on(lambda x: F.channel_shuffle(x, 6)),
    "channel shuffle of as many groups as places": lambda: on(shuffled(4), width=16),
    "channel shuffle with a size left open": lambda: on(
        lambda x: x.view(len(x), 6, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
    ),
    "swapped": lambda: on(lambda x: x.swapdims(2, 3).rot90(1, (2, 3)).moveaxis(3, 2).sinc()),
    "stacked side by side": lambda: S(C(3, 6, 3), Net(lambda n, x: torch.hstack([x, x.relu()])), C(12, 4, 1)),
    "written into new zeros": lambda: on(lambda x: written(x.new_zeros(x.shape), x)),
    "shuffled groups": lambda: S(
        C(3, 12, 1),
        nn.ReLU(),
        C(12, 24, 3, 1, 1, groups=2),
        nn.BatchNorm2d(24),
        Net(lambda n, x: shuffled(2)(x)),
        nn.ReLU(),
        C(24, 8, 1, groups=2),
        C(8, 4, 1),
    ),
    "shuffled unit": lambda: S(
        C(3, 12, 1),
        Net(
            lambda n, x: shuffled(2)(torch.cat([x.chunk(2, 1)[0], n.u(x.chunk(2, 1)[1]).relu()], 1)), u=C(6, 6, 3, 1, 1)
        ),
        C(12, 4, 1),
    ),
    "pixel unshuffle": lambda: S(C(3, 6, 1), nn.PixelUnshuffle(2), C(24, 4, 1)),
    "patches": lambda: S(C(3, 8, 3), nn.Unfold(2), nn.ReLU(), nn.Conv1d(32, 4, 1)),
    "patches and back": lambda: S(C(3, 8, 3, 1, 1), nn.Unfold(2, stride=2), nn.Fold(8, 2, stride=2), C(8, 4, 1)),
    "windows": lambda: on(lambda x: x.unfold(2, 4, 2).mean(-1)),
    "rolled": lambda: on(lambda x: x.roll((1, 2), (2, 3)).flip(-1)),
    "cropped": lambda: on(lambda x: x[..., 1:-1, 2:] + x[:, :, :6, :6]),
    "Fourier": lambda: on(lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:]).relu()),
    "Fourier, magnitude": lambda: on(lambda x: torch.fft.fftshift(torch.fft.fft2(x), (-2, -1)).abs()),
    "Fourier, parts": lambda: on(lambda x: torch.view_as_real(torch.fft.rfft(x)).sum(-1)),
    "cumulative": lambda: on(lambda x: x.cumsum(-1).logcumsumexp(-2)),
    "softmax over positions": lambda: on(lambda x: x.flatten(2).softmax(-1).view_as(x) * x),
    # over an image
    "channels last": lambda: on(lambda x: x.permute(0, 2, 3, 1), L(12, 5), nn.ReLU(), L(5, 3)),
    "non-local": lambda: Net(
        lambda n, x: n.head(non_local(n, n.stem(x).relu())),
        stem=C(3, 10, 1),
        q=C(10, 6, 1),
        k=C(10, 6, 1),
        v=C(10, 5, 1),
        out=C(5, 10, 1),
        head=C(10, 4, 1),
    ),
    "keypoints": lambda: S(
        C(3, 8, 3), nn.ReLU(), Net(lambda n, x: n.a(x.flatten(2).transpose(1, 2)).max(1)[0], a=L(8, 6)), L(6, 3)
    ),
}

OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    # linear layers
    "mlp": (lambda: S(L(6, 10), nn.ReLU(), L(10, 8), nn.Tanh(), L(8, 3)), ROW),
    "mlp, batch norm": (lambda: S(L(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(), L(10, 3)), ROW),
    "mlp on tokens": (lambda: S(L(6, 10), nn.LayerNorm(10), nn.GELU(), L(10, 3)), TOKENS),
    "one layer for two": (
        lambda: Net(
            lambda n, x: n.c(n.b(n.a(x).relu()) + n.b(n.d(x).relu())), a=L(6, 8), d=L(6, 8), b=L(8, 5), c=L(5, 3)
        ),
        ROW,
    ),
    "residual mlp": (lambda: tokens(S(L(12, 16), nn.GELU(), L(16, 12))), TOKENS),
    "residual mlp, norm": (lambda: tokens(S(nn.LayerNorm(12), L(12, 16), nn.GELU(), L(16, 12))), TOKENS),
    "residual mlp, rms": (lambda: tokens(S(nn.RMSNorm(12, 1e-5), L(12, 16), nn.GELU(), L(16, 12))), TOKENS),
    "two gates": (
        lambda: tokens(Net(lambda n, x: n.c(F.silu(n.a(x)) * n.b(x)), a=L(12, 16), b=L(12, 16), c=L(16, 12))),
        TOKENS,
    ),
    "halves": (lambda: tokens(S(L(12, 16), nn.GLU(), L(8, 12))), TOKENS),
    "maxout": (lambda: S(L(6, 16), Net(lambda n, x: x.unflatten(-1, (-1, 2)).amax(-1)), L(8, 3)), ROW),
    "highway": (lambda: tokens(Net(lambda n, x: n.b(x).sigmoid() * n.a(x).relu(), a=L(12, 12), b=L(12, 12))), TOKENS),
    "mixer": (lambda: Net(mixer, embed=L(6, 10), across=L(5, 5), up=L(10, 12), down=L(12, 10), out=L(10, 3)), TOKENS),
    "autoencoder": (lambda: S(L(6, 10), nn.ReLU(), L(10, 4), nn.ReLU(), L(4, 10), nn.ReLU(), L(10, 6)), ROW),
    "sampled code": (
        lambda: Net(
            lambda n, x: n.c(n.m(y := n.a(x).relu()) + 0.1 * (n.v(y) / 2).exp()),
            a=L(6, 10),
            m=L(10, 8),
            v=L(10, 8),
            c=L(8, 6),
        ),
        ROW,
    ),
    "image of a code": (lambda: image_of(C(8, 4, 3)), ROW),
    "image of a code, transposed": (lambda: image_of(nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.ReLU(), C(6, 4, 1)), ROW),
    "image of a code, batch norm": (lambda: image_of(nn.BatchNorm2d(8), C(8, 4, 3)), ROW),
    "image of a code, batch norm of the code": (lambda: image_of(C(8, 4, 3), between=nn.BatchNorm1d(72)), ROW),
    "image of a code, group norm": (lambda: image_of(nn.GroupNorm(2, 8), C(8, 4, 3)), ROW),
    "image of a code, view": (
        lambda: Net(
            lambda n, x: n.b(F.interpolate(n.a(x).view(len(x), -1, 3, 3), scale_factor=2)), a=L(6, 72), b=C(8, 4, 3)
        ),
        ROW,
    ),
    "image of a code, a width that the module knows": (
        lambda: Net(lambda n, x: n.b(n.a(x).view(-1, n.width, 3, 3)), a=L(6, 72), b=C(8, 4, 3), width=8),
        ROW,
    ),
    "image of a code, pool": (lambda: image_of(nn.AvgPool2d(3), nn.Flatten(), L(8, 3)), ROW),
    "image of a code, tokens": (
        lambda: Net(lambda n, x: n.b(n.a(x).unflatten(1, (4, -1)).relu()), a=L(6, 40), b=L(10, 3)),
        ROW,
    ),
    # attention
    "heads": (lambda: tokens(Net(heads_of, qkv=L(12, 36), out=L(12, 12), heads=3, size=4)), TOKENS),
    "rotary": (lambda: tokens(Net(rotary, q=L(12, 16), k=L(12, 16), v=L(12, 16), out=L(16, 12), shared=1)), TOKENS),
    "rotary, grouped queries": (
        lambda: tokens(Net(rotary, q=L(12, 24), k=L(12, 12), v=L(12, 12), out=L(24, 12), shared=2)),
        TOKENS,
    ),
    "rotary, in part": (lambda: tokens(Net(partly_rotary, qkv=L(12, 54), out=L(18, 12))), TOKENS),
    "one key for all heads": (
        lambda: tokens(Net(one_key, q=L(12, 16), k=L(12, 4), v=L(12, 4), out=L(16, 12))),
        TOKENS,
    ),
    "one key for all heads, one layer": (
        lambda: tokens(Net(one_key_of_one_layer, qkv=L(12, 28), out=L(20, 12), heads=5)),
        TOKENS,
    ),
    "one part of the key for all heads": (
        lambda: tokens(Net(latent, q=L(12, 24), kv=L(12, 36), shared=L(12, 2), out=L(20, 12))),
        TOKENS,
    ),
    "biased scores": (
        lambda: tokens(Net(biased_scores, q=L(12, 16), k=L(12, 16), v=L(12, 16), out=L(16, 12))),
        TOKENS,
    ),
    "outer product of two layers": (
        lambda: Net(
            lambda n, x: n.c(torch.einsum("bc,bd->bcd", n.a(x), n.b(x)).flatten(1)), a=L(6, 8), b=L(6, 5), c=L(40, 3)
        ),
        ROW,
    ),
    "transposed weights": (
        lambda: Net(
            lambda n, x: F.linear((x @ n.a.T + n.bias).relu() @ n.b.t(), n.c.transpose(0, 1)),
            a=torch.randn(12, 6),
            bias=torch.randn(12),
            b=torch.randn(10, 12),
            c=torch.randn(10, 3),
        ),
        ROW,
    ),
    "a transposed weight that is tied": (
        lambda: Net(lambda n, x: F.linear(F.linear(x, n.w).relu(), n.w.t()), w=torch.randn(12, 6)),
        ROW,
    ),
    "a weight on the left": (
        lambda: Net(
            lambda n, x: n.b((n.w @ n.a(x).flatten(2)).mean(-1)), a=C(3, 12, 3), w=torch.randn(8, 12), b=L(8, 3)
        ),
        IMAGE,
    ),
    "distances to prototypes": (
        lambda: Net(lambda n, x: torch.cdist(n.a(x), n.p), a=S(L(6, 12), nn.ReLU(), L(12, 8)), p=torch.randn(5, 8)),
        ROW,
    ),
    "distances of two layers": (
        lambda: Net(lambda n, x: F.pairwise_distance(n.a(x), n.b(x).relu()), a=L(6, 8), b=L(6, 8)),
        TOKENS,
    ),
    "cosine similarity": (
        lambda: Net(lambda n, x: F.cosine_similarity(n.a(x), n.b(x)), a=C(3, 8, 3), b=C(3, 8, 3)),
        IMAGE,
    ),
    "written in parts": (lambda: Net(in_parts, a=L(6, 5), b=L(6, 7), c=L(12, 3), first=5, second=7), ROW),
    "the last ones of a list": (
        lambda: Net(
            lambda n, x: n.c(n.a(x).relu()) + n.b(x)[:, [-2, -1]].sum(1, keepdim=True), a=L(6, 9), b=L(6, 4), c=L(9, 3)
        ),
        ROW,
    ),
    "one head": (lambda: attention(one_head, q=L(10, 6), k=L(10, 6), v=L(10, 7), out=L(7, 10), scale=0.3), TOKENS),
    "pooled by a vector": (
        lambda: Net(pooled_by(torch.matmul), a=L(6, 8), w=L(8, 7), v=torch.randn(7), b=L(8, 3)),
        TOKENS,
    ),
    "pooled by a vector in einsum": (
        lambda: Net(
            pooled_by(lambda u, v: torch.einsum("btc,c->bt", u, v)), a=L(6, 8), w=L(8, 7), v=torch.randn(7), b=L(8, 3)
        ),
        TOKENS,
    ),
    **{
        f"a product spelled as {how}": (lambda product=product, w=w: product_net(product, w), ROW)
        for how, (product, w) in PRODUCTS.items()
    },
    "bilinear pooling": (
        lambda: Net(
            lambda n, x: n.b((n.a(x).flatten(2) @ n.a(x).flatten(2).mT).flatten(1)),
            a=S(C(3, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), C(9, 7, 3)),
            b=L(49, 5),
        ),
        IMAGE,
    ),
    "bilinear pooling with roots and a norm": (
        lambda: Net(
            lambda n, x: n.b(
                F.normalize((g := torch.einsum("nchw,ndhw->ncd", y := n.a(x), y).flatten(1)).sign() * g.abs().sqrt())
            ),
            a=S(C(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU()),
            b=S(nn.BatchNorm1d(49), L(49, 8), nn.ReLU(), L(8, 5)),
        ),
        IMAGE,
    ),
    "one fused head": (
        lambda: attention(
            lambda n, x: n.out(F.scaled_dot_product_attention(n.q(x), n.k(x), n.v(x), scale=0.3)),
            q=L(10, 6),
            k=L(10, 6),
            v=L(10, 7),
            out=L(7, 10),
        ),
        TOKENS,
    ),
    "linear attention": (
        lambda: attention(
            lambda n, x: n.out(n.q(x).relu() @ (n.k(x).relu().transpose(1, 2) @ n.v(x))),
            q=L(10, 6),
            k=L(10, 6),
            v=L(10, 7),
            out=L(7, 10),
        ),
        TOKENS,
    ),
    "pooled by attention": (
        lambda: S(
            L(6, 10), Net(lambda n, x: (n.a(x).softmax(1) * x).sum(1), a=S(L(10, 5), nn.Tanh(), L(5, 1))), L(10, 3)
        ),
        TOKENS,
    ),
    "root mean square norm": (lambda: S(L(6, 12), nn.RMSNorm(12), nn.ReLU(), L(12, 4)), TOKENS),
    "bilinear layer": (
        lambda: Net(
            lambda n, x: n.out(n.pairs(n.a(x).relu(), n.b(x)).relu()),
            a=L(6, 8),
            b=L(6, 7),
            pairs=nn.Bilinear(8, 7, 10),
            out=L(10, 3),
        ),
        TOKENS,
    ),
    "class token": (
        lambda: Net(
            class_token,
            embed=L(6, 10),
            token=torch.randn(1, 1, 10),
            places=torch.randn(1, 6, 10),
            inside=S(L(10, 8), nn.ReLU(), L(8, 9)),
            out=L(9, 3),
        ),
        TOKENS,
    ),
    "einsum": (
        lambda: attention(lambda n, x: torch.einsum("btc,cd->btd", n.a(x), n.w), a=L(10, 8), w=torch.randn(8, 10)),
        TOKENS,
    ),
    "messages": (lambda: Net(messages, a=L(6, 12), b=L(12, 10), c=L(10, 3), hidden=12), TOKENS),
    "largest messages": (lambda: Net(largest_messages, a=L(6, 12), b=L(12, 10), c=L(10, 3)), TOKENS),
    "put in place": (lambda: Net(put_in_place, a=L(6, 12), b=L(12, 10), c=L(10, 3)), TOKENS),
    "text convolutions": (
        lambda: Net(
            text_convolutions, before=L(6, 7), layers=nn.ModuleList(C(1, 8, (k, 7)) for k in (2, 3)), out=L(16, 3)
        ),
        TOKENS,
    ),
    "gate over places": (
        lambda: tokens(Net(spatial_gate, up=L(12, 20), across=nn.Conv1d(5, 5, 1), out=L(10, 12))),
        TOKENS,
    ),
    "additive attention": (
        lambda: Net(additive_attention, a=L(6, 12), w=L(12, 8), v=L(8, 1), out=L(12, 3)),
        TOKENS,
    ),
    "normed latents": (
        lambda: Net(
            latents,
            queries=torch.randn(3, 12),
            norms=nn.ModuleList([nn.LayerNorm(12), nn.RMSNorm(12, 1e-5)]),
            before=L(6, 10),
            q=L(12, 8),
            k=L(10, 8),
            v=L(10, 12),
            out=L(12, 3),
        ),
        TOKENS,
    ),
    "first positions of a table": (lambda: added(lambda p: p[:, :5], 1, 64, 12), TOKENS),
    "a row of a table": (lambda: added(lambda p: p[2], 4, 12), TOKENS),
    "mean of a table": (lambda: added(lambda p: p.mean(0), 4, 12), TOKENS),
    "normed positions": (lambda: added(lambda p: p[:5], 9, 12, norm=nn.LayerNorm(12)), TOKENS),
    "enlarged positions": (
        lambda: Net(
            lambda n, x: n.b((n.a(x) + F.interpolate(n.p, size=x.shape[-2:], mode="bilinear")).relu()),
            a=C(3, 12, 1),
            b=C(12, 4, 1),
            p=torch.randn(1, 12, 4, 4),
        ),
        IMAGE,
    ),
    "learned graph": (lambda: Net(learned_graph, edges=torch.randn(5, 5), a=L(6, 12), b=L(12, 10), c=L(10, 3)), TOKENS),
    "distances of positions": (
        lambda: Net(
            by_distance,
            q=L(6, 12),
            k=L(6, 12),
            v=L(6, 12),
            out=L(12, 3),
            distances=torch.randn(9, 4),
            each=torch.randn(3, 4, 4),
        ),
        TOKENS,
    ),
    "Fourier neural operator": (
        lambda: Net(
            spectral,
            a=C(3, 12, 1),
            b=C(12, 12, 1),
            w=0.1 * torch.randn(12, 12, 3, 3, dtype=torch.cfloat),
            out=C(12, 4, 1),
        ),
        IMAGE,
    ),
    # recurrent layers
    "lstm": (lambda: recurrent(nn.LSTM), TOKENS),
    "gru": (lambda: recurrent(nn.GRU), TOKENS),
    "rnn": (lambda: recurrent(nn.RNN, nonlinearity="relu"), TOKENS),
    "lstm, deep": (lambda: recurrent(nn.LSTM, num_layers=2), TOKENS),
    "gru, both ways": (lambda: recurrent(nn.GRU, bidirectional=True), TOKENS),
    "rnn, no bias": (lambda: recurrent(nn.RNN, bias=False), TOKENS),
    "lstm, deep, both ways": (lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True), TOKENS),
    "gru from a state": (
        lambda: Net(decoder, start=L(6, 10), before=L(6, 8), gru=nn.GRU(8, 10, batch_first=True), out=L(10, 3)),
        TOKENS,
    ),
    "lstm from zeros whose width the module knows": (
        lambda: Net(
            lambda n, x: n.out(n.lstm(x, [x.new_zeros(n.layers, len(x), n.hidden) for _ in range(2)])[0]),
            lstm=nn.LSTM(6, 10, 2, batch_first=True),
            out=L(10, 3),
            hidden=10,
            layers=2,
        ),
        TOKENS,
    ),
    "lstm cells": (lambda: Net(cells, before=L(6, 8), cell=nn.LSTMCell(8, 10), out=L(10, 3)), TOKENS),
    "gru cells": (lambda: Net(cells, before=L(6, 8), cell=nn.GRUCell(8, 10), out=L(10, 3)), TOKENS),
    "rnn cells": (lambda: Net(cells, before=L(6, 8), cell=nn.RNNCell(8, 10), out=L(10, 3)), TOKENS),
    # signals and volumes
    "signal": (lambda: S(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3)), SIGNAL),
    "signal, linear": (lambda: along(lambda x: F.interpolate(x, scale_factor=2, mode="linear")), SIGNAL),
    "signal, sorted": (lambda: along(lambda x: x.sort(-1)[0]), SIGNAL),
    "signal, median": (lambda: along(lambda x: x.median(-1, True)[0]), SIGNAL),
    "signal, largest": (lambda: along(lambda x: x.topk(3, -1)[0]), SIGNAL),
    "signal, the third": (lambda: along(lambda x: x.kthvalue(3, -1, True)[0]), SIGNAL),
    "signal, running maximum": (lambda: along(lambda x: x.cummax(-1)[0]), SIGNAL),
    "signal, cut off": (lambda: along(lambda x: F.pad(x, (2, 0))[..., :-1].contiguous()), SIGNAL),
    "wave net": (
        lambda: Net(
            wave,
            stem=nn.Conv1d(3, 8, 1),
            gates=nn.ModuleList(nn.Conv1d(8, 12, 3, padding=1) for _ in range(2)),
            skips=nn.ModuleList(nn.Conv1d(6, 5, 1) for _ in range(2)),
            onwards=nn.ModuleList(nn.Conv1d(6, 8, 1) for _ in range(2)),
            out=nn.Conv1d(5, 3, 1),
        ),
        SIGNAL,
    ),
    "convolution, then lstm": (
        lambda: Net(
            lambda n, x: n.out(n.lstm(n.a(x).relu().transpose(1, 2))[0][:, -1]),
            a=nn.Conv1d(3, 8, 3),
            lstm=nn.LSTM(8, 6, batch_first=True),
            out=L(6, 3),
        ),
        SIGNAL,
    ),
    "volume": (
        lambda: S(nn.Conv3d(2, 6, 3, 1, 1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(6, 3, 1)),
        VOLUME,
    ),
    "volume, nearest": (lambda: S(nn.Conv3d(2, 6, 3), nn.Upsample(scale_factor=2), nn.Conv3d(6, 3, 1)), VOLUME),
    "volume, trilinear": (
        lambda: S(nn.Conv3d(2, 6, 3), nn.Upsample(scale_factor=2, mode="trilinear"), nn.Conv3d(6, 3, 1)),
        VOLUME,
    ),
    "frames": (
        lambda: Net(
            lambda n, x: n.b(n.a(x.transpose(1, 2).flatten(0, 1)).relu().mean((2, 3)).view(len(x), 4, -1).mean(1)),
            a=C(2, 8, 3, 1, 1),
            b=L(8, 3),
        ),
        VOLUME,
    ),
}

NETWORKS = {**{name: (build, IMAGE) for name, build in IMAGES.items()}, **OTHERS}
WHOLE = {
    "a transposed weight that is tied": "w#1",
    "response norm": "0",  # windows over neighboring channels
    "a gate for all channels": "2.gate.2",
    "spatial attention": "2.gate.a",
    "global context": "1.inside.a",
    "pooled by attention": "1.a.2",
    "one key for all heads": "1.inside.k 1.inside.v",
    "one part of the key for all heads": "1.inside.shared",
    "text convolutions": "before",
    "additive attention": "v",
    "outer product of two layers": "b",
    "the last ones of a list": "b",
    "linear attention": "1.q 1.k",  # every channel of k is multiplied with every one of v, of which some are cut
}
"""The groups that stay whole, besides those that are the network's output."""


class KeptStatistics(TorchFunctionMode):
    """Layer norms, and reductions along axes of a width, are taken over what stays."""

    _REDUCTIONS = ("mean", "amax", "max", "std", "norm", "logsumexp", "normalize")

    def __init__(self, norms: Mapping[int, Tensor], widths: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.norms, self.widths = norms, widths

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        weight = args[2] if len(args) > 2 else kwargs.get("weight")
        if func in (F.layer_norm, F.group_norm) and id(weight) in self.norms:
            return self.normed(func, *args, **kwargs)
        axis = kwargs.get("dim")
        if name in self._REDUCTIONS and isinstance(axis, int) and args[0].shape[axis] in self.widths:
            keep = self.widths[args[0].shape[axis]]
            found = func(args[0].index_select(axis, keep), *args[1:], **kwargs)
            if name == "normalize":
                return torch.zeros_like(args[0]).index_copy(axis, keep, found)
            return found
        return func(*args, **kwargs)

    def normed(self, func: Any, x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        keep, axis = self.norms[id(weight)], 1 if func is F.group_norm else -1
        size = shape if func is F.group_norm else (len(keep),)
        narrow = func(x.index_select(axis, keep), size, weight[keep], bias[keep], eps)
        return torch.zeros_like(x).index_copy(axis, keep, narrow)


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [leaf for item in items for leaf in leaves(item)]


def kept_statistics(twin: nn.Module, graph: Graph, keeps: Mapping[str, tuple[int, ...]]) -> KeptStatistics:
    state, norms, widths = dict(twin.named_parameters()), {}, {}
    for name, keep in keeps.items():
        group = graph.group(name)
        for norm in group.layer_norms:
            norms[id(state[norm.weight])] = torch.tensor(keep)
        for statistic in group.statistics:
            widths[len(statistic.channels)] = torch.tensor(keep)
    return KeptStatistics(norms, widths)


def silence(tensor: Tensor, slot: Slot, drop: set[int]) -> None:
    """Zero at every index of a tensor that stands for a dropped channel."""
    gone = [index for index, channel in enumerate(slot.channels) if channel != NOT_OURS and channel in drop]
    width, rows = len(slot.channels) // slot.blocks, tensor.shape[0] // slot.blocks
    for index in gone:
        if slot.blocks == 1:
            tensor.select(slot.dim, index).zero_()
        else:
            number = index // width
            tensor[number * rows : (number + 1) * rows, index % width].zero_()


def with_zeros(model: nn.Module, graph: Graph, keeps: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """The original, in which nothing that is dropped is read."""
    twin = copy.deepcopy(model).double()
    state = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    for name, keep in keeps.items():
        group = graph.group(name)
        everywhere = bool(group.averages or group.products)
        for slot in (*group.consumers, *(group.carriers if everywhere else group.tied)):
            silence(state[slot.parameter].data, slot, set(range(group.width)) - set(keep))
    return twin


def put_back(model: nn.Module, x: Tensor, result: lbyl.Result) -> nn.Module:
    """The original with the cut network's tensors at the indices that stay, and zeros elsewhere."""
    groups = {group.name: group for group in lbyl.inspect(model, x).graph.groups}
    multiplied = any(groups[group.name].products for group in result.plan.groups)
    read = {slot.parameter for group in groups.values() for slot in (*group.consumers, *group.tied)}
    twin = copy.deepcopy(model).double()
    small = {**dict(result.model.named_parameters()), **dict(result.model.named_buffers())}
    cuts: dict[str, list[Any]] = {}
    for item in result.plan.cuts:
        cuts.setdefault(item.parameter, []).append(item)
    for name, tensor in {**dict(twin.named_parameters()), **dict(twin.named_buffers())}.items():
        new = small[name].detach().to(tensor.dtype)
        if tensor.numel() == max(tensor.shape, default=0) and name not in read and not multiplied:
            # One number a channel: no weight reads it at those that are dropped, and some code divides by it.
            tensor.data[tuple(torch.meshgrid(*kept_of(tensor, cuts.get(name, [])), indexing="ij"))] = new
            continue
        for item in sorted(cuts.get(name, []), key=lambda item: item.blocks > 1):
            new = widened(new, item)
        tensor.data.copy_(new)
    return twin


def kept_of(tensor: Tensor, cuts: list[Any]) -> list[Tensor]:
    kept = {item.dim: torch.tensor(item.keep) for item in cuts}
    return [kept.get(dim, torch.arange(size)) for dim, size in enumerate(tensor.shape)]


def widened(new: Tensor, item: Any) -> Tensor:
    """A tensor with zeros where a cut has taken something out."""
    width = item.size // item.blocks
    keep = torch.tensor(item.keep)
    parts = []
    for number, part in enumerate(new.chunk(item.blocks, 0)):
        shape = list(part.shape)
        shape[item.dim] = width
        inside = keep[(keep >= number * width) & (keep < (number + 1) * width)] - number * width
        parts.append(torch.zeros(shape, dtype=new.dtype).index_copy(item.dim, inside, part))
    return torch.cat(parts)


def gap(expected: Any, found: Any) -> float:
    pairs = list(zip(leaves(expected), leaves(found), strict=True))
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item() for a, b in pairs)


def check(model: nn.Module, x: Tensor, result: lbyl.Result, restore: Any) -> None:
    graph: Graph = lbyl.inspect(model, x).graph
    keeps = {group.name: group.keep for group in result.plan.groups}
    found = copy.deepcopy(result.model).double()(x.double())
    folded = dict(model.named_parameters()).keys() - dict(result.model.named_parameters()).keys()
    if restore == "prune" and not folded:
        twin = with_zeros(model, graph, keeps)
        with kept_statistics(twin, graph, keeps):
            assert gap(twin(x.double()), found) < 1e-6
    if not folded and not any(graph.group(name).averages for name in keeps):
        twin = put_back(model, x, result)
        with kept_statistics(twin, graph, keeps):
            assert gap(twin(x.double()), found) < 1e-6


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    return settle(build()), torch.randn(shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_network_is_the_original_with_zeros(name: str) -> None:
    model, x = network(name)
    result = lbyl.compress(model, x, ratio=0.4, scope="all", restore="prune", strict=True, forecast=False)
    assert result.report.verified is not None
    check(model, x, result, "prune")
    whole = {group for group, why in result.report.left if why != "the model's output" and "at this ratio" not in why}
    assert whole == set(WHOLE.get(name, "").split())


@pytest.mark.parametrize("name", NETWORKS)
def test_so_it_is_in_the_inner_scope_and_with_restoration(name: str) -> None:
    model, x = network(name)
    number = list(NETWORKS).index(name)
    inner = any(g.prunable and not g.excluded_from_inner for g in lbyl.inspect(model, x).graph.groups)
    for scope, restore in (("inner", "prune"), (("all", "inner")[number % 2], RESTORERS[number // 2 % len(RESTORERS)])):
        if scope == "inner" and not inner:
            with pytest.raises(InputError, match="no group can be pruned"):
                lbyl.compress(model, x, scope=scope, restore=restore, ratio=0.5, forecast=False)
            continue
        check(
            model,
            x,
            lbyl.compress(model, x, ratio=0.4, scope=scope, restore=restore, strict=True, forecast=False),
            restore,
        )


def reads_twice(n: Any, x: Tensor) -> Tensor:
    """A recurrent layer by hand, whose state starts as zeros."""
    state = x.new_zeros(len(x), 12, *x.shape[2:])
    for _ in range(2):
        state = n.a(torch.cat([x, state], 1)).tanh()
    return n.b(state)


REASONS: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "efficient channel attention": (
        S(
            C(3, 8, 3),
            Net(lambda n, x: x * n.k(x.mean((2, 3))[:, None]).mT[..., None], k=nn.Conv1d(1, 1, 3, 1, 1)),
            C(8, 4, 1),
        ),
        IMAGE,
        "conv1d in '0.1.k' slides over them, so that each output mixes neighbors",
    ),
    "a state of zeros": (
        Net(reads_twice, a=C(15, 12, 3, 1, 1), b=C(12, 4, 1)),
        IMAGE,
        "in another call 0.a.weight reads what can't be cut, such as an input or a state that starts as zeros",
    ),
    "picked": (
        Net(lambda n, x: n.b(n.a(x)[:, n.order]), a=L(6, 8), b=L(8, 3), order=[3, 1, 2, 0, 7, 6, 5, 4]),
        ROW,
        "they are selected by their indices",
    ),
    "attention among channels": (
        S(L(6, 8), Net(lambda n, x: x @ (x.mT @ x).softmax(-1)), L(8, 3)),
        TOKENS,
        "its channels can only be cut all together: products of two of them are used by softmax in '0.1'",
    ),
    "a Gram matrix row by row": (
        S(L(6, 8), Net(lambda n, x: x.mT @ x), L(8, 3)),
        TOKENS,
        "its channels can only be cut all together: products of two of them are used by linear in '0.2'",
    ),
    "bilinear pooling of a fixed size": (
        S(L(6, 8), Net(lambda n, x: (x.mT @ x).reshape(-1, 64)), L(64, 3)),
        TOKENS,
        "found by verification: without them the code fails",
    ),
    "random numbers": (
        S(L(6, 8), Net(lambda n, x: x + torch.randn_like(x)), L(8, 3)),
        ROW,
        "random numbers are drawn for them in '0.1'",
    ),
    "dropout in any mode": (
        S(L(6, 8), Net(lambda n, x: F.dropout(x, 0.2)), L(8, 3)),
        ROW,
        "random numbers are drawn for them in '0.1'",
    ),
    "a literal": (
        S(L(6, 8), Net(lambda n, x: x.view(-1, 8)), L(8, 3)),
        ROW,
        "found by verification: without them the code fails",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_stays_whole_has_a_reason(name: str) -> None:
    model, shape, why = REASONS[name]
    wide = S(model, L(4 if shape == IMAGE else 3, 6), L(6, 2)) if shape != IMAGE else S(model, C(4, 6, 1), C(6, 2, 1))
    result = lbyl.compress(wide.eval(), torch.randn(shape), ratio=0.4, scope="all", restore="prune", forecast=False)
    assert any(reason.startswith(why) for _, reason in result.report.left), result.report.left


def test_there_are_many() -> None:
    assert len(NETWORKS) >= 120


def test_a_first_call_loads_no_compiler() -> None:
    """PyTorch's compiler takes longer to load than a small network takes to be compressed."""
    code = (
        "import sys, torch, lbyl\n"
        "from torch import nn\n"
        "net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()\n"
        "dreams = lbyl.LeastSquares(moments=lbyl.Dream(images=4))\n"
        "lbyl.compress(net, torch.zeros(1, 1, 12, 12), ratio=0.5, restore=dreams)\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
