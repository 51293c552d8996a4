"""Turns a regression on the stream into new weights of the layer that writes to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbyl.graph.writers import Writer, is_transposed_linear
from lbyl.moments.accumulate import Moments
from lbyl.restore.ridge import Solution, solve


def solve_stream(moments: Moments, ridge: float, has_bias: bool) -> Solution:
    """``B`` and the shift of ``r ~ B^T m + shift``, with a ridge on B: an infinite one drops the blocks plainly.

    Minimizes ``E |r - B^T m - shift|^2 + ridge sum_c Var(m_c) |B_c|^2``. The ridge is in proportion to each channel's
    variance, because a few channels of language models are a thousand times as large as the others, and one ridge for
    all would suit none. Without a bias the shift is zero, because there is no place for it, and the variance is the
    mean square.
    """
    n = max(moments.count, 1)
    power = moments.pp.diagonal() / n - (moments.p / n).square() * has_bias
    scale = power.clamp_min(1e-12 * power.max().clamp_min(1e-300)).sqrt()
    standard = replace(
        moments, p=moments.p / scale, pp=moments.pp / torch.outer(scale, scale), pr=moments.pr / scale[:, None]
    )
    found = solve(standard, ridge, centered=has_bias)
    return replace(found, coefficients=found.coefficients / scale[:, None])


def folded(
    host: nn.Module, path: str, writer: Writer, solution: Solution, moments: Moments
) -> dict[str, Float[Tensor, "..."]]:
    """New values of the writer's parameters and buffers, by name, such that its output m becomes ``T^T m + shift``.

    With ``T = I + B``, a linear layer's weight ``W`` (outputs first) becomes ``T^T W`` and its bias ``T^T b + shift``.
    A batch norm after the layer, ``m = a (z - mean) + b`` with ``a = weight / sqrt(var + eps)``, can't mix channels, so
    the layer's weight becomes ``T^T diag(a) W``. The norm gets the mean ``T^T (a mean)``, the variance that
    ``T^T m`` has on the probes, the bias ``T^T b + shift``, and the weight that undoes its division.

    Args:
        host: the block in the network whose values are wanted.
        path: its path.
        writer: the layer.
        solution: the regression.
        moments: the moments it was solved with.
    """
    layer = host.get_submodule(writer.layer)
    weight = layer.get_parameter("weight").detach()
    t = torch.eye(len(solution.shift), dtype=torch.float64, device=weight.device) + solution.coefficients.to(
        weight.device
    )
    shift = solution.shift.to(weight.device)
    values: dict[str, Tensor] = {}

    def put(module: str, name: str, value: Tensor, like: Tensor) -> None:
        values[f"{path}.{module}.{name}"] = value.to(like.dtype)

    if writer.norm:
        norm = host.get_submodule(writer.norm)
        assert isinstance(norm, _BatchNorm)
        _fold_norm(norm, writer, t, shift, moments, put)
        a = norm.weight.detach().double() / (_buffer(norm, "running_var") + norm.eps).sqrt()
        first = torch.einsum("co,c,c...->o...", t, a, weight.double())
        put(writer.layer, "weight", first, weight)
        if layer.bias is not None:
            bias = layer.get_parameter("bias").detach()
            put(writer.layer, "bias", t.T @ (a * bias.double()), bias)
        return values
    if is_transposed_linear(layer):
        put(writer.layer, "weight", weight.double() @ t, weight)
    else:
        put(writer.layer, "weight", torch.einsum("co,c...->o...", t, weight.double()), weight)
    if layer.bias is not None:
        bias = layer.get_parameter("bias").detach()
        put(writer.layer, "bias", t.T @ bias.double() + shift, bias)
    return values


def _fold_norm(
    norm: _BatchNorm, writer: Writer, t: Tensor, shift: Tensor, moments: Moments, put: Callable[..., None]
) -> None:
    mean, var = _buffer(norm, "running_mean"), _buffer(norm, "running_var")
    weight, bias = norm.weight.detach(), norm.bias.detach()
    count = max(moments.count, 1)
    m = moments.p / count
    covariance = moments.pp / count - torch.outer(m, m)
    new_var = (t * (covariance.to(t.device) @ t)).sum(0).clamp_min(1e-12)
    a = weight.double() / (var + norm.eps).sqrt()
    put(writer.norm, "running_mean", t.T @ (a * mean), norm.running_mean)
    put(writer.norm, "running_var", new_var, norm.running_var)
    put(writer.norm, "weight", (new_var + norm.eps).sqrt(), weight)
    put(writer.norm, "bias", t.T @ bias.double() + shift, bias)


def _buffer(norm: _BatchNorm, name: str) -> Tensor:
    return norm.get_buffer(name).detach().double()


def has_bias(host: nn.Module, writer: Writer) -> bool:
    """Whether the writer can add a constant: by its bias, or by that of its batch norm."""
    return bool(writer.norm) or getattr(host.get_submodule(writer.layer), "bias", None) is not None
