"""Fewer channels inside heads: the best products of queries and keys, and the best values, of lower rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lbyl.graph.heads import Heads
from lbyl.moments.heads import HeadMoments

_NOTHING = 1e-12
"""Directions with less of the largest power count as silent."""


def roots(gram: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """The symmetric root of second moments, and its pseudo-inverse."""
    powers, directions = torch.linalg.eigh(gram)
    here = powers > _NOTHING * powers.max().clamp_min(1e-300)
    root = powers.clamp_min(0).sqrt() * here
    inverse = torch.where(here, 1 / root.clamp_min(1e-300), torch.zeros_like(root))
    return (directions * root) @ directions.T, (directions * inverse) @ directions.T


def smaller_products(
    queries: Float[Tensor, "n n"], keys: Float[Tensor, "n n"], size: int
) -> tuple[Float[Tensor, "n size"], Float[Tensor, "n size"]]:
    """The A and B with the least ``E |q^T k - (A^T q)^T (B^T k)|^2``, over independent queries q and keys k.

    With ``G_q^(1/2) G_k^(1/2) = U S V^T``: ``A = G_q^(-1/2) U S^(1/2)`` and ``B = G_k^(-1/2) V S^(1/2)``, both cut
    after the largest ``size`` singular values (Eckart-Young).

    Args:
        queries: second moments of the queries.
        keys: second moments of the keys, about their mean: softmax does not see what all keys of a query share.
        size: the new number of channels.
    """
    (q, q_inverse), (k, k_inverse) = roots(queries), roots(keys)
    u, s, vt = torch.linalg.svd(q @ k)
    root = s[:size].sqrt()
    return q_inverse @ u[:, :size] * root, k_inverse @ vt[:size].T * root


def smaller_values(
    moments: Float[Tensor, "n n"], out: Float[Tensor, "n width"], size: int
) -> tuple[Float[Tensor, "n size"], Float[Tensor, "size width"]]:
    """The A and W with the least ``E |O^T v - W^T A^T v|^2`` for mixed values v and the output's matrix O.

    With ``G^(1/2) O = U S Z^T``: ``A = G^(-1/2) U`` and ``W = U^T G^(1/2) O``, U cut after ``size`` columns.
    """
    root, inverse = roots(moments)
    u = torch.linalg.svd(root @ out, full_matrices=False)[0][:, :size]
    return inverse @ u, u.T @ root @ out


def strongest(power: Float[Tensor, " n"], size: int) -> Float[Tensor, "n size"]:
    """The matrix that keeps the channels with the most power, and no others."""
    keep = power.argsort(descending=True, stable=True)[:size].sort().values
    return torch.eye(len(power), dtype=torch.float64)[:, keep]


def values_inside(
    model: nn.Module, heads: Heads, moments: HeadMoments, size: int, solved: bool
) -> Mapping[str, Tensor]:
    """New weights of a layer in which all channels of a head but the first ``size`` are zero.

    Args:
        model: the network; it is not changed.
        heads: the layer.
        moments: its moments.
        size: how many channels each head keeps.
        solved: whether the best products and values are made; else the channels with the most power stay as they are:
            ``E q_i^2 E k_i^2`` for queries and keys, ``E v_i^2 |o_i|^2`` for values and their rows o of the output.
    """
    layer = model.get_submodule(heads.path)
    state = {name: tensor.detach().double().cpu() for name, tensor in layer.named_parameters()}
    out = state[f"{heads.out}.weight"]
    # Biases are one more column of the weights, which is zero for layers that have none.
    full = [
        torch.cat([weight, state.get(f"{part}.bias", torch.zeros(len(weight)).double())[:, None]], 1)
        for part in (heads.parts[:1] if heads.fused else heads.parts)
        for weight in (state[f"{part}.weight"],)
    ]
    fused = torch.cat(full).reshape(3, heads.count, heads.size, -1)
    new, made = torch.zeros_like(fused), torch.zeros_like(out)
    shift = torch.zeros(len(out), dtype=torch.float64)
    biased = f"{heads.out}.bias" in state
    q, k = moments.queries.moments(centered=False), moments.keys.moments(centered=True)
    v, mean = moments.mixed.moments(centered=biased), moments.mixed.mean
    for head in range(heads.count):
        place = slice(head * heads.size, (head + 1) * heads.size)
        columns = out[:, place].T
        if solved:
            a, b = smaller_products(q[head], k[head], size)
            c, w = smaller_values(v[head], columns, size)
        else:
            a = b = strongest(q[head].diagonal() * k[head].diagonal(), size)
            c = strongest(v[head].diagonal() * columns.square().sum(1), size)
            w = c.T @ columns
        for part, matrix in enumerate((a, b, c)):
            new[part, head, :size] = matrix.T @ fused[part, head]
        made[:, place][:, :size] = w.T
        shift += mean[head] @ (columns - c @ w) if solved and biased else 0
    values = {f"{heads.out}.weight": made}
    if biased:
        values[f"{heads.out}.bias"] = state[f"{heads.out}.bias"] + shift
    parts = (
        {heads.parts[0]: new.flatten(0, 2)} if heads.fused else dict(zip(heads.parts, new.flatten(1, 2), strict=True))
    )
    for part, rows in parts.items():
        values[f"{part}.weight"] = rows[:, :-1]
        if f"{part}.bias" in state:
            values[f"{part}.bias"] = rows[:, -1]
    own = dict(layer.named_parameters())
    return {f"{heads.path}.{name}": value.to(own[name].dtype).to(own[name].device) for name, value in values.items()}
