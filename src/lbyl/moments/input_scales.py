"""Estimates the mean and deviation of a network's inputs from its first batch norm or from the example inputs."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from lbyl.moments.feature_scales import feature_scales
from lbyl.moments.integers import find_integers
from lbyl.moments.preprocessing import standardization
from lbyl.moments.scale import KEPT, UNIT, InputScales, Scale, by_feature, feature_axes
from lbyl.moments.synthesis import pink
from lbyl.runtime.batch_norms import batch_norms
from lbyl.runtime.batches import with_rows
from lbyl.runtime.copying import tensors_of
from lbyl.runtime.forward import CONVOLVED, ConsumerCall, run_intercepted
from lbyl.runtime.inputs import ExampleInputs, outputs_if_taken
from lbyl.runtime.sentinels import meaningful

_FAR = 3.0
"""In a network with batch norms, inputs keep unit scale unless the estimate differs by more than this factor."""
_NORMALIZED = 2.2
"""Inputs of unit variance have a larger range than this."""
_RANGES = ((0.0, 1.0), (-0.5, 0.5), (-1.0, 1.0), (0.0, 255.0))
"""Usual ranges of pixel values."""


def input_scales(model: nn.Module, inputs: ExampleInputs) -> InputScales:
    """Estimate the scales of a model's inputs.

    Where a batch norm normalizes the input itself, its running statistics are the answer, channel by channel. So are
    the numbers by which the code standardizes it, if they differ from channel to channel.

    Where the first layer is followed by a batch norm, its stored statistics tell: with the weights summed over their
    taps, ``running_mean = W m + b`` gives the mean of each input channel, and the running variance next to the one that
    natural images of unit variance cause gives the deviation. They are used where they are far from 0 and 1, for batch
    norms bring the rest to scale. Where there are no batch norms, the example has to tell, unless it is constant: one
    scale for all features, or one for each where they are clearly apart. So it has to where it is bounded and the
    network refuses inputs of unit scale: an assertion, or a logarithm. Masks that are added to scores stay as they are.
    """
    tensors = inputs.tensors()
    scales = [UNIT] * len(tensors)
    told: list[str] = []
    for index, tensor in enumerate(tensors):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if not bool(meaningful(tensor).all()):
            scales[index] = KEPT  # a mask that is added to scores
            continue
        told_by_example = feature_scales(tensor) or _from_example(tensor)
        scale, whence = told_by_example, "the example"
        exact = _standardized(model, inputs, index, told_by_example)
        if exact is not None:
            scale, whence = exact
        elif batch_norms(model):
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
    the deviation of one example is taken to be a quarter of that range, and the mean halfway between the example's mean
    and the middle of it. Of n examples, the range counts as one more example for the mean, and as one of n for the
    variance.
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
    rows = len(tensor) if tensor.dim() > 1 else 1
    middle, quarter = (low + high) / 2, (high - low) / 4
    mean = (rows * mean + middle) / (rows + 1)
    return _scale(mean, math.sqrt(((rows - 1) * deviation**2 + quarter**2) / rows), low, high)


def _within_example(tensor: Tensor) -> Scale:
    """The example's own mean, deviation and bounds; unit scale where it is constant or not finite."""
    values = tensor.detach().double()
    low, high = float(values.min()), float(values.max())
    if not low < high or not bool(torch.isfinite(values).all()):
        return UNIT
    return _scale(float(values.mean()), float(values.std(unbiased=False)), low, high)


def _scale(mean: float, deviation: float, low: float = -math.inf, high: float = math.inf) -> Scale:
    numbers = torch.tensor([[mean], [deviation]], dtype=torch.float32)
    return Scale(numbers[0], numbers[1], low, high)


def _standardized(
    model: nn.Module, inputs: ExampleInputs, index: int, told_by_example: Scale
) -> tuple[Scale, str] | None:
    """The scale by which a batch norm or the code standardizes the input, and where it is from; None if none does."""
    norm = _from_norm_on_input(model, inputs, index) if batch_norms(model) else None
    scale = norm or standardization(model, inputs, index)
    if scale is None:
        return None
    # Pixels stay within their range.
    bounded = replace(scale, low=told_by_example.low, high=told_by_example.high)
    return bounded, "the batch norm on the input" if norm else "what the code subtracts and divides by"


def _with_unit_noise(inputs: ExampleInputs, index: int) -> tuple[ExampleInputs, Tensor]:
    """The inputs with noise of zero mean and unit variance for one of them, and this noise: at least 4 rows."""
    example = inputs.tensors()[index]
    unit = pink((max(4, len(example)), *example.shape[1:]), torch.Generator().manual_seed(0)).to(example)
    return with_rows(inputs, index, unit), unit


def _from_norm_on_input(model: nn.Module, inputs: ExampleInputs, index: int) -> Scale | None:
    """The running mean and deviation of the batch norm that normalizes an input itself; None if there is none."""
    if inputs.tensors()[index].dim() < 2:
        return None
    replaced, unit = _with_unit_noise(inputs, index)
    numbers = {axis: torch.var_mean(by_feature(unit, axis), 0, unbiased=False) for axis in feature_axes(unit)}
    found: list[tuple[str, str, int]] = []

    def on_norm(mean_name: str, var_name: str, mean: Tensor, var: Tensor) -> None:
        # Compared by value, because the input may have been transposed or flattened.
        for axis, expected in numbers.items():
            pairs = zip((var.double().cpu(), mean.double().cpu()), expected, strict=True)
            if all(len(a) == len(b) and torch.allclose(a, b, 1e-3, 1e-4) for a, b in pairs):
                found.append((mean_name, var_name, axis))
                return

    try:
        with torch.no_grad():
            run_intercepted(model, replaced, on_norm=on_norm)
    except Exception:  # a user's model may raise anything
        return None
    if not found:
        return None
    state, (mean_name, var_name, axis) = tensors_of(model), found[0]
    mean, var = (state[name].detach().float().cpu() for name in (mean_name, var_name))
    if not bool(var.any()):
        return None
    # Of a feature that was always the same, only the mean is known, so it hardly varies.
    return Scale(mean, var.clamp_min(float(var[var > 0].min())).sqrt(), axis=axis)


def _from_first_norm(model: nn.Module, inputs: ExampleInputs, index: int) -> Scale | None:
    """Estimate the scale from the batch norm directly after the first convolution; None if there is none."""
    example = inputs.tensors()[index]
    if example.dim() < 3:
        return None
    replaced, unit = _with_unit_noise(inputs, index)
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
