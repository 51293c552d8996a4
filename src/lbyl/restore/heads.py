"""Fewer channels inside heads: the best products of queries and keys, and the best values, of lower rank.

Where positions rotate pairs of channels, a pair stays as it is or goes, and gains of the others make up for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lbyl.graph.heads import Heads, Pairs
from lbyl.moments.heads import HeadMoments, Sums

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


def pair_products(
    queries: Float[Tensor, "heads n n"], keys: Float[Tensor, "heads n n"]
) -> Float[Tensor, "heads pairs pairs"]:
    """``E t_i t_j`` of what the rotated pairs i and j add to the products of independent queries and keys.

    With a and b over both channels of a pair, ``t_i = sum_a q_ia k_ia``, so that
    ``E t_i t_j = sum_ab E[q_ia q_jb] E[k_ia k_jb]``. Channel i makes a pair with channel i + n / 2.
    """
    heads, n, _ = queries.shape
    return (queries * keys).reshape(heads, 2, n // 2, 2, n // 2).sum((1, 3))


def pair_gains(
    products: Float[Tensor, "heads pairs pairs"], pairs: Sequence[int]
) -> tuple[Float[Tensor, "heads kept"], Float[Tensor, " heads"]]:
    """Gains of the kept pairs with the least ``E (sum_i t_i - sum_kept g_i t_i)^2``, and what is left of it."""
    kept = list(pairs)
    wanted, here = products.sum(2)[:, kept], products[:, kept][:, :, kept]
    ridge = _RIDGE * products.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)
    gains = torch.linalg.solve(here + ridge[:, None, None] * torch.eye(len(kept)).to(here), wanted)
    lost = products.sum((1, 2)) - 2 * (gains * wanted).sum(1) + (gains * (here @ gains[..., None])[..., 0]).sum(1)
    return gains, lost


_RIDGE = 1e-3
"""Of the mean power of a pair: pairs that say the same share the gain."""


def best_pairs(products: Float[Tensor, "heads pairs pairs"], count: int, solved: bool) -> tuple[int, ...]:
    """The pairs that stay in all heads alike, which share their frequencies: those without which the most is lost.

    Args:
        products: those of all heads that share the frequencies.
        count: how many stay.
        solved: whether the other pairs make up for each that goes; it is then the one whose loss is least after that,
            pair after pair. Else those with the most power stay.
    """
    pairs = list(range(products.shape[1]))
    if not solved:
        power = products.diagonal(dim1=1, dim2=2).sum(0)
        return tuple(sorted(power.argsort(descending=True, stable=True)[:count].tolist()))
    while len(pairs) > count:
        rests = [pairs[:i] + pairs[i + 1 :] for i in range(len(pairs))]
        pairs = min(rests, key=lambda rest: float(pair_gains(products, rest)[1].sum()))
    return tuple(pairs)


def pairs_to_keep(layers: Sequence[Heads], moments: Mapping[str, HeadMoments], size: int, solved: bool) -> Pairs:
    """The pairs of channels that stay, by the module that rotates them."""
    found: Pairs = {}
    for rotary in dict.fromkeys(each.rotary for each in layers if each.rotary):
        products = [
            pair_products(own.queries.moments(centered=False), own.keys.moments(centered=True))
            for own in (moments[each.path] for each in layers if each.rotary == rotary)
        ]
        found[rotary] = best_pairs(torch.cat(products), size // 2, solved)
    return found


def values_inside(
    model: nn.Module, heads: Heads, moments: HeadMoments, size: int, solved: bool, pairs: Sequence[int] = ()
) -> Mapping[str, Tensor]:
    """New weights of a layer in which all channels of a head but those that stay are zero.

    These are the first ``size``, but for queries and keys that are rotated: these stay in their places.

    Args:
        model: the network; it is not changed.
        heads: the layer.
        moments: its moments.
        size: how many channels each head keeps.
        solved: whether the best products and values are made; else the channels with the most power stay as they are:
            ``E q_i^2 E k_i^2`` for queries and keys, ``E v_i^2 |o_i|^2`` for values and their rows o of the output.
        pairs: the pairs that stay where queries and keys are rotated.
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
    old = [rows.reshape(-1, heads.size, rows.shape[1]) for rows in (full[0].chunk(3) if heads.fused else full)]
    new, made = [torch.zeros_like(rows) for rows in old], torch.zeros_like(out)
    shift = torch.zeros(len(out), dtype=torch.float64)
    biased = f"{heads.out}.bias" in state
    columns = out.T.reshape(heads.count, heads.size, -1)
    for group in range(heads.groups):
        members = slice(group * heads.shared, (group + 1) * heads.shared)
        c, w = _values(moments.mixed, members, columns[members], size, solved, biased)
        a, b = _products(moments, members, heads, size, solved, pairs)
        new[0][members] = a.transpose(1, 2) @ old[0][members]
        new[1][group], new[2][group, :size] = b.T @ old[1][group], c.T @ old[2][group]
        made.T.reshape(heads.count, heads.size, -1)[members, :size] = w
        if solved and biased:
            shift += torch.einsum("hi,hio->o", moments.mixed.mean[members], columns[members] - c @ w)
    values = {f"{heads.out}.weight": made}
    if biased:
        values[f"{heads.out}.bias"] = state[f"{heads.out}.bias"] + shift
    flat = [rows.flatten(0, 1) for rows in new]
    parts = {heads.parts[0]: torch.cat(flat)} if heads.fused else dict(zip(heads.parts, flat, strict=True))
    for part, rows in parts.items():
        values[f"{part}.weight"] = rows[:, :-1]
        if f"{part}.bias" in state:
            values[f"{part}.bias"] = rows[:, -1]
    own = dict(layer.named_parameters())
    return {f"{heads.path}.{name}": value.to(own[name].dtype).to(own[name].device) for name, value in values.items()}


def _products(
    moments: HeadMoments, members: slice, heads: Heads, size: int, solved: bool, pairs: Sequence[int]
) -> tuple[Float[Tensor, "members n n"], Float[Tensor, "n n"]]:
    """What queries of the heads of one group, and their keys, are multiplied by."""
    q, k = moments.queries.moments(centered=False)[members], moments.keys.moments(centered=True)[members]
    n, count = heads.size, heads.shared
    if heads.rotary:
        here = torch.tensor(pairs)
        a, b = torch.zeros(count, n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        gains = pair_gains(pair_products(q, k), pairs)[0] if solved else torch.ones(count, len(pairs)).double()
        for place in (here, here + n // 2):
            a[:, place, place], b[place, place] = gains, 1.0
        return a, b
    # Where heads share their keys, the best basis for all of them follows from the sum of the queries' moments.
    if solved:
        a, b = smaller_products(q.sum(0), k[0], size)
    else:
        a = b = strongest(q.sum(0).diagonal() * k[0].diagonal(), size)
    a, b = (torch.nn.functional.pad(matrix, (0, n - size)) for matrix in (a, b))
    return a.expand(count, n, n), b


def _values(
    mixed: Sums, members: slice, columns: Float[Tensor, "members n width"], size: int, solved: bool, biased: bool
) -> tuple[Float[Tensor, "n size"], Float[Tensor, "members size width"]]:
    """What the values of one group are multiplied by, and what each of its heads reads of them.

    Heads that share values get one basis, the best for the mean of their moments, and each of them the best matrix for
    it: ``W_h = (A^T G_h A)^-1 A^T G_h O_h``.
    """
    v = mixed.moments(centered=biased)[members]
    if not solved:
        c = strongest((v.diagonal(dim1=1, dim2=2) * columns.square().sum(2)).sum(0), size)
        return c, c.T @ columns
    c, w = smaller_values(v.mean(0), columns.transpose(0, 1).flatten(1), size)
    if len(v) == 1:
        return c, w[None]
    seen = c.T @ v
    return c, torch.linalg.pinv(seen @ c, rtol=_NOTHING, hermitian=True) @ (seen @ columns)
