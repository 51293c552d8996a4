"""Finds what a network's own code subtracts from its inputs and divides them by, before its first layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lbyl.moments.scale import Scale, by_feature, feature_axes
from lbyl.moments.synthesis import pink
from lbyl.runtime.batches import with_rows
from lbyl.runtime.forward import ConsumerCall, run_intercepted
from lbyl.runtime.inputs import ExampleInputs

_ROWS = 4
_EXACT = 1e-3
"""Relative rounding errors of the code's arithmetic are smaller than this."""
_ROUNDING = 1e-5
"""What is added is not told apart from rounding errors below this share of the input."""
_ALIKE, _TOGETHER = 1.05, 0.1
"""Channels are treated alike if divisors differ by less than this factor, and means by less than this many of them."""


def standardization(model: nn.Module, inputs: ExampleInputs, index: int) -> Scale | None:
    """The mean and deviation by which the code in front of the first layer standardizes an input, channel by channel.

    If the first layer gets ``(x - m) / d`` with numbers ``m`` and ``d`` for each channel, real inputs have about the
    mean ``m`` and the deviation ``d``. Where the same numbers serve all channels, they may be a change of units as well
    (``x / 255``), and say nothing.

    Args:
        model: the network in evaluation mode.
        inputs: its example inputs.
        index: the number of the input.

    Returns:
        None if the first layer does not get the input, moved and scaled channel by channel.
    """
    example = inputs.tensors()[index]
    if example.dim() < 2 or not bool(torch.isfinite(example).all()):
        return None
    noise = pink((_ROWS, *example.shape[1:]), torch.Generator().manual_seed(0)).to(example)
    # Of the example's size, for sums with a mean that is far larger than the input are inexact.
    size = example.detach().abs().amax(0)
    noise = noise * torch.where(size > 0, size, size[size > 0].median() if bool(size.any()) else 1)
    first, second = (_at_first_layer(model, with_rows(inputs, index, times * noise), noise.shape) for times in (1, 2))
    if first is None or second is None:
        return None
    for axis in feature_axes(noise):
        found = _undone(*(by_feature(each.reshape(noise.shape), axis) for each in (noise, first, second)))
        if found is not None:
            return Scale(*found, axis=axis)
    return None


class _Found(Exception):
    """Raised inside of a forward pass to end it."""


def _at_first_layer(model: nn.Module, inputs: ExampleInputs, shape: torch.Size) -> Tensor | None:
    """What the first layer with weights gets, if that has this shape, flattened or not; None if it has another one."""
    seen: list[Tensor] = []

    def on_consumer(call: ConsumerCall) -> None:
        seen.append(call.x)
        raise _Found

    try:
        with torch.no_grad():
            run_intercepted(model, inputs, on_consumer=on_consumer, everywhere=True)
    except Exception:  # a user's model may raise anything
        pass
    if not seen:
        return None
    return seen[0].detach() if seen[0].shape in (shape, (shape[0], shape[1:].numel())) else None


def _undone(
    given: Float[Tensor, "values channels"],
    once: Float[Tensor, "values channels"],
    twice: Float[Tensor, "values channels"],
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]] | None:
    """Mean and deviation of inputs that come out standardized, from what comes out for noise and for twice the noise.

    None if that is not linear in each channel, or the same for all channels.
    """
    slope = (given * (twice - once)).sum(0) / given.square().sum(0)
    scaled = given * slope
    offset = (once - scaled).mean(0)
    offset[offset.abs() <= _ROUNDING * scaled.abs().amax(0)] = 0
    size = scaled.abs().amax(0) + offset.abs()
    wrong = torch.maximum((twice - once - scaled).abs().amax(0), (once - scaled - offset).abs().amax(0))
    if not bool((slope.abs() > 0).all()) or not bool((wrong <= _EXACT * size).all()):
        return None
    mean, deviation = -offset / slope, 1 / slope.abs()
    apart = float(deviation.max() / deviation.min()) > _ALIKE
    apart |= float((mean.max() - mean.min()) / deviation.min()) > _TOGETHER
    return (mean.float(), deviation.float()) if apart else None
