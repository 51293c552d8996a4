"""Moments of the residual stream: what the layer before a run of blocks would have to add for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lbyl.graph.blocks import first_float
from lbyl.graph.writers import Sum, SumInterceptor, Writer
from lbyl.moments.accumulate import Moments
from lbyl.runtime.attended import at_attended, attended_positions
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.memory import give_back
from lbyl.runtime.seeding import sample_positions


@dataclass(frozen=True)
class Run:
    """Consecutive blocks that are dropped together, and the layer that makes up for them.

    Attributes:
        host: path of the child of the list that precedes them.
        writer: the layer of the host whose output is added to the stream.
        first: path of the first dropped block.
        last: path of the last dropped block.
    """

    host: str
    writer: Writer
    first: str
    last: str


def stream_moments(
    whole: nn.Module,
    current: nn.Module,
    run: Run,
    host: str,
    batches: Sequence[ExampleInputs],
    positions: int,
    generator: torch.Generator,
) -> Moments:
    """Moments of the writer's output m (regressors) and of what is missing in the sum behind it (targets).

    With Y the rest of the host's sum and L the stream after the run in the whole network, ReplaceMe (arXiv 2505.02819,
    eq. 5) asks for T with ``m T + Y ~ L``. The target here is ``L - (Y + m)``, so that ``T = I + B``.

    Args:
        whole: the network with all blocks, in evaluation mode.
        current: the network without the blocks that are dropped so far, this run among them.
        run: the run.
        host: path of the host in ``current``.
        batches: the probes.
        positions: largest number of positions of each batch that are used.
        generator: draws the positions.
    """
    moments: Moments | None = None
    for batch in batches:
        attended = attended_positions(whole, batch)
        wanted = _output_of(whole, run.last, batch)
        m, total = _host_of(current, host, run.writer, batch)
        tokens = m.dim() < 4
        rows = [_rows(at_attended(attended, each), tokens) for each in (m, total.value, wanted)]
        chosen = sample_positions(len(rows[0]), positions, generator)
        if chosen is not None:
            rows = [each[chosen.to(each.device)] for each in rows]
        p, s, stream = rows
        target, weights = missing(s, stream, total, by_length=m.dim() == 3)
        if moments is None:
            moments = Moments.zeros(p.shape[1], p.shape[1], p.device)
        add_weighted(moments, p, target, weights)
        give_back()
    assert moments is not None
    return moments


def add_weighted(
    moments: Moments,
    p: Float[Tensor, "positions regressors"],
    r: Float[Tensor, "positions targets"],
    weights: Float[Tensor, " positions"],
) -> None:
    """Add weighted positions: the sums of ``w p``, ``w r``, ``w p p^T``, ``w p r^T``, ``w r^2``; the mean of w is 1."""
    w = (weights / weights.mean())[:, None]
    root = w.sqrt()
    moments.add(p * root, r * root)
    moments.p += ((w - root) * p).sum(0, dtype=torch.float64)
    moments.r += ((w - root) * r).sum(0, dtype=torch.float64)


def missing(
    s: Float[Tensor, "positions channels"], stream: Float[Tensor, "positions channels"], total: Sum, by_length: bool
) -> tuple[Float[Tensor, "positions channels"], Float[Tensor, " positions"]]:
    """What is missing in a sum ``s``, such that the stream after its tail is as wanted, and the positions' weights.

    Nothing follows the sum: ``stream - s``. Layers after it see tokens through a norm, which divides each position by
    its length. So positions are weighted ``by_length``, ``1 / |stream|^2``, or a few large ones would decide alone.

    A ReLU follows: the sum is wanted where the stream is positive, and any sum below zero elsewhere.

    A layer norm follows: the sum that has the mean and deviation of ``s`` and which the norm turns into the stream.
    """
    ones = torch.ones_like(s[:, 0])
    if total.tail == "relu":
        return torch.where(stream > 0, stream - s, -s.clamp_min(0)), ones
    if total.tail == "layer_norm":
        plain = stream if total.shift is None else stream - total.shift
        if total.scale is not None:
            small = 1e-2 * total.scale.abs().mean()
            plain = torch.where(
                total.scale.abs() > small, plain / total.scale, (s - s.mean(1, True)) / s.std(1, keepdim=True)
            )
        deviation, mean = torch.std_mean(s, 1, unbiased=False, keepdim=True)
        return plain * deviation + mean - s, ones
    if not by_length:
        return stream - s, ones
    power = stream.square().mean(1)
    return stream - s, 1 / power.clamp_min(1e-12 * power.mean().clamp_min(1e-30))


def _rows(tensor: Tensor, tokens: bool) -> Float[Tensor, "positions channels"]:
    """Channels last, positions flattened: images have channels on their second axis."""
    tensor = tensor.detach()
    return (tensor if tokens else tensor.movedim(1, -1)).reshape(-1, tensor.shape[-1 if tokens else 1])


class _Enough(Exception):
    """Raised to end a forward pass early."""


def _output_of(model: nn.Module, path: str, batch: ExampleInputs) -> Tensor:
    """The first tensor output of a module."""
    found: list[Tensor] = []

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_float(output)
        assert tensor is not None
        found.append(tensor)
        raise _Enough

    with model.get_submodule(path).register_forward_hook(leave), torch.no_grad():
        _call(model, batch)
    return found[0]


def _host_of(model: nn.Module, host: str, writer: Writer, batch: ExampleInputs) -> tuple[Tensor, Sum]:
    """The output of a host's writer, and the host's sum."""
    watch, made, found = SumInterceptor(), [], []
    watch.active = False
    block = model.get_submodule(host)

    def enter(module: nn.Module, args: Any) -> None:
        watch.active = True

    def wrote(module: nn.Module, args: Any, output: Any) -> None:
        made.append(output.clone())

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        watch.active = False
        tensor = first_float(output)
        assert tensor is not None
        found.append(watch.sum_of(tensor))
        raise _Enough

    with (
        block.register_forward_pre_hook(enter),
        block.get_submodule(writer.output).register_forward_hook(wrote),
        block.register_forward_hook(leave),
        torch.no_grad(),
        watch,
    ):
        _call(model, batch)
    return made[0], found[0]


def _call(model: nn.Module, batch: ExampleInputs) -> None:
    try:
        batch.cloned().call(model)
    except _Enough:
        return
