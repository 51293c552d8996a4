"""`calibration_batches`: the probes that the default restorer would use, as inputs for quantizers and other tools."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lbyl.errors import InputError
from lbyl.pipeline.prepare import check_values, check_weights, first_probes, plain_module
from lbyl.pipeline.result import Inputs
from lbyl.restore.registry import choose_restorer, fallbacks
from lbyl.runtime.batches import batch_size, join_all, split
from lbyl.runtime.checks import check_number, check_seed
from lbyl.runtime.contexts import alone, own_settings, undisturbed
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress, cancelable
from lbyl.runtime.recursion import deep_calls
from lbyl.runtime.seeding import generator_for


@cancelable
@own_settings()
def calibration_batches(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Any]:
    """Inputs that stand for real ones, for calibrating a network without data, such as for static quantization.

    They are the probes on which :func:`lbyl.compress` collects moments by default: dreams and crops of photographs for
    image networks with batch norms, generated text for language models, and so on. All kinds are mixed in every batch,
    so that the first few batches are like the others. Pass the network that will be quantized, such as the smaller one.

    Args:
        model: the network; it is not changed.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        batch_size: inputs in each batch; a last batch of fewer is left out. None uses the batch size of the example
            inputs if the network takes no other one, and otherwise batches as large as those of the probes.
        seed: seed of all random numbers; equal seeds give equal batches.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        Batches in the form of ``example_inputs``: tensors, tuples or dicts.

    Raises:
        InputError: an argument can't be used, or fewer inputs than ``batch_size`` were made.
        RestorationError: the network does not run on any inputs that can be made.

    Examples:
        >>> import torch, lbyl
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> batches = lbyl.calibration_batches(net, torch.randn(1, 3, 8, 8), batch_size=16)
        >>> batches[0].shape
        torch.Size([16, 3, 8, 8])
    """
    check_number("calibration_batches(batch_size={})", batch_size, whole=True, least=1, optional=True)
    check_seed(seed)
    inner = plain_module(model)
    inputs = ExampleInputs.of(example_inputs)
    check_weights(inner)
    check_values(inputs)
    with deep_calls(inner), alone(inner), undisturbed(inner):
        inputs = inputs.with_rows(inner)
        first = choose_restorer(inner, inputs)[0]
        _, made = first_probes(inner, inputs, (first, *fallbacks(first)), int(seed), progress)
    size = batch_size or inputs.rows
    batches = _mixed(made.batches, size, generator_for(int(seed), "calibration"))
    # Probes are channels-last images, and other tools may want the values in the order of the axes.
    return [_plain(batch.map(torch.Tensor.contiguous), example_inputs) for batch in batches]


def _mixed(batches: tuple[ExampleInputs, ...], size: int | None, generator: torch.Generator) -> list[ExampleInputs]:
    """The inputs of all batches in random order, in batches of this size; None for the size that they have.

    Batches whose tensors do not have a row for each input, or have other shapes, are left as they are.

    Raises:
        InputError: there are fewer inputs than one batch.
    """
    shapes = {tuple((t.shape[1:], t.dtype) for t in batch.tensors()) for batch in batches}
    rows = all(t.dim() and len(t) == batch_size(batch) for batch in batches for t in batch.tensors())
    if len(shapes) > 1 or not rows:
        return list(batches)
    whole = join_all(batches)
    count, size = batch_size(whole), size or max(map(batch_size, batches))
    if count < size:
        raise InputError(f"batch_size={size}: only {count} inputs were made for this network; ask for fewer")
    order = torch.randperm(count, generator=generator)[: count // size * size]
    return split(whole.map(lambda t: t[order.to(t.device)]), [size] * (count // size))


def _plain(batch: ExampleInputs, form: Inputs) -> Any:
    """A batch in the form in which the user passed the example inputs."""
    if isinstance(form, torch.Tensor):
        return batch.args[0]
    if isinstance(form, ExampleInputs):
        return batch
    return dict(batch.kwargs) if batch.kwargs else batch.args
