"""Estimates the mean and deviation of a network's inputs from its first batch norm or from the example inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lbyl.moments.integers import find_integers
from lbyl.moments.scale import UNIT, InputScales, Scale
from lbyl.moments.synthesis import pink
from lbyl.runtime.batch_norms import batch_norms
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.forward import CONVOLVED, ConsumerCall, run_intercepted
from lbyl.runtime.inputs import ExampleInputs, outputs_if_taken

_FAR = 3.0
"""In a network with batch norms, inputs keep unit scale unless the estimate differs by more than this factor."""
_NORMALIZED = 2.2
"""Inputs of unit variance have a larger range than this."""
_RANGES = ((0.0, 1.0), (-0.5, 0.5), (-1.0, 1.0), (0.0, 255.0))
"""Usual ranges of pixel values."""


def input_scales(model: nn.Module, inputs: ExampleInputs) -> InputScales:
    """Estimate the scales of a model's inputs.

    Where the first layer is followed by a batch norm, its stored statistics tell: with the weights summed over their
    taps, ``running_mean = W m + b`` gives the mean of each input channel, and the running variance next to the one that
    natural images of unit variance cause gives the deviation. They are used where they are far from 0 and 1, for batch
    norms bring the rest to scale. Where there are no batch norms, the example has to tell, unless it is constant. So it
    has to where it is bounded and the network refuses inputs of unit scale: an assertion, or a logarithm.
    """
    tensors = inputs.tensors()
    scales = [UNIT] * len(tensors)
    told: list[str] = []
    for index, tensor in enumerate(tensors):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        told_by_example = _from_example(tensor)
        scale, whence = told_by_example, "the example"
        if batch_norms(model):
            first = _from_first_norm(model, inputs, index)
            if first is not None:
                scale, whence = first, "the first batch norm's statistics"
            elif float(scale.deviation.max()) <= _FAR:
                scale = UNIT
            scale = scale if _is_far(scale) else UNIT
        for bounded in (told_by_example, _within_example(tensor)):
            if _takes(model, inputs, index, scale):
                break
            if bounded is not UNIT:
                scale, whence = bounded, "the example"
        scales[index] = scale
        if scale is not UNIT:
            numbers = f"mean {_said(scale.mean)} and deviation {_said(scale.deviation)}"
            told.append(f"probes have {numbers}, estimated from {whence}")
    integers, note = find_integers(model, inputs)
    told += [note] if note else []
    return InputScales(tuple(scales), "; ".join(dict.fromkeys(told)), integers)


def _takes(model: nn.Module, inputs: ExampleInputs, index: int, scale: Scale) -> bool:
    """Whether the network runs on noise of this scale, and gives finite numbers."""
    example = inputs.tensors()[index]
    unit = scale.of(pink(tuple(example.shape), torch.Generator().manual_seed(0))).to(example)
    found = outputs_if_taken(model, inputs.map(lambda t: unit if t is example else t))
    return found is not None and all(
        bool(torch.isfinite(tensor).all()) for tensor in found if tensor.is_floating_point()
    )


def _said(values: Tensor) -> str:
    return ", ".join(f"{value:.3g}" for value in values[:4].tolist()) + (", ..." if len(values) > 4 else "")


def _is_far(scale: Scale) -> bool:
    spread = scale.deviation
    off = bool((spread > _FAR).any() or (spread < 1 / _FAR).any())
    return off or bool((scale.mean.abs() > _FAR * spread).any())


def _from_example(tensor: Tensor) -> Scale:
    """Estimate the scale from an example input: unit scale if its values look normalized, or if it is constant.

    One example is a poor estimate of mean and deviation, but a good one of the range. For values within a usual range,
    the deviation is a quarter of that range, and the mean is halfway between the example's mean and the middle of it.
    """
    values = tensor.detach().double()
    if not bool(torch.isfinite(values).all()):
        return UNIT
    mean, deviation = float(values.mean()), float(values.std(unbiased=False))
    low, high = float(values.min()), float(values.max())
    if deviation < 1e-6 * max(1.0, abs(mean)):
        return UNIT
    if high - low > _NORMALIZED and abs(mean) < 1.5 and 0.4 < deviation < 2:
        return UNIT
    # The expected range of this many normal values. Values with a much narrower range are bounded.
    normal = 2 * math.sqrt(2 * math.log(max(values.numel(), 2))) * deviation
    if high - low > 0.75 * normal:
        return _scale(mean, deviation)
    fitting = (span for span in _RANGES if span[0] <= low and high <= span[1])
    low, high = next((span for span in fitting if span[1] - span[0] < 2 * (high - low)), (low, high))
    return _scale((mean + (low + high) / 2) / 2, (high - low) / 4, low, high)


def _within_example(tensor: Tensor) -> Scale:
    """The example's own mean, deviation and bounds; unit scale where it is constant or not finite."""
    values = tensor.detach().double()
    low, high = float(values.min()), float(values.max())
    if not low < high or not bool(torch.isfinite(values).all()):
        return UNIT
    return _scale(float(values.mean()), float(values.std(unbiased=False)), low, high)


def _scale(mean: float, deviation: float, *bounds: float) -> Scale:
    numbers = torch.tensor([[mean], [deviation]], dtype=torch.float32)
    return Scale(numbers[0], numbers[1], *bounds)


def _from_first_norm(model: nn.Module, inputs: ExampleInputs, index: int) -> Scale | None:
    """Estimate the scale from the batch norm directly after the first convolution; None if there is none."""
    example = inputs.tensors()[index]
    if example.dim() < 3:
        return None
    generator = torch.Generator().manual_seed(0)
    unit = pink((max(4, len(example)), *example.shape[1:]), generator).to(example)
    replaced = inputs.map(lambda t: unit if t is example else _as_many(t, example, len(unit)))
    seen: list[ConsumerCall] = []
    found: list[tuple[str, str, Tensor, Tensor]] = []

    def on_consumer(call: ConsumerCall) -> None:
        # Compared by value, because the network gets a copy.
        if not seen and not found and call.op in CONVOLVED and torch.equal(call.x, unit):
            seen.append(call)

    def on_norm(mean_name: str, var_name: str, mean: Tensor, var: Tensor) -> None:
        if seen and not found:
            found.append((mean_name, var_name, mean, var))

    try:
        with torch.no_grad():
            run_intercepted(model, replaced, on_consumer=on_consumer, on_norm=on_norm)
    except Exception:  # a user's model may raise anything
        return None
    state = tensors_of(model)
    if not seen or not found or len(found[0][2]) != len(state[seen[0].weight]):
        return None
    mean_name, var_name, mean, var = found[0]
    weight = state[seen[0].weight].detach().double()
    if weight.shape[1] != example.shape[1] or len(weight) < weight.shape[1]:
        return None
    sums = weight.flatten(2).sum(2)
    missing = (state[mean_name].double() - mean.double())[:, None]
    shift = torch.linalg.lstsq(sums, missing, driver="gelsd").solution[:, 0]
    ratio = (state[var_name].double() / var.double().clamp_min(1e-12)).sqrt()
    return Scale(shift.float().cpu(), ratio.median().float().reshape(1).cpu())


def _as_many(tensor: Tensor, example: Tensor, count: int) -> Tensor:
    """Another input with ``count`` rows, if it has a row for each example; otherwise unchanged."""
    if not tensor.dim() or len(tensor) != len(example):
        return tensor
    return tensor[:1].expand(count, *tensor.shape[1:])
