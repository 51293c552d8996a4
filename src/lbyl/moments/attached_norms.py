"""Batch norms for networks without any: they are attached to a copy, recalibrated after the cut, and folded away.

A batch norm stores the mean and variance of a layer's output in training, and recalibrating it corrects the output
after the layers before it were cut. A network without batch norms, or with folded ones, lacks both. So each layer of a
copy gets a batch norm. Its running statistics are measured on probes, and its ``gamma`` and ``beta`` are chosen such
that it is the identity. Everything that uses batch norms then works for these networks as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lbyl.graph import Graph, Norm, Producer
from lbyl.runtime.attended import Attended, at_attended, attended_positions
from lbyl.runtime.batch_norms import norms_cover
from lbyl.runtime.copying import sharing_copy, tensors_of
from lbyl.runtime.forward import channel_statistics, run_intercepted
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.memory import a_few, give_back

LayerStatistics = Mapping[str, tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]]
"""Mean and variance of each layer's output channels, by the layer's name."""

_EPS = 1e-5
_GAMMA, _BETA, _MEAN, _VAR = (f"lbyl_attached_{part}" for part in ("gamma", "beta", "mean", "var"))
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def with_norms(model: nn.Module, statistics: LayerStatistics) -> nn.Module:
    """A copy that shares the network's parameters, with a batch norm after each layer in ``statistics``."""
    copy = sharing_copy(model)
    for layer, (mean, var) in statistics.items():
        _attach(copy.get_submodule(layer), mean, var)
    return copy


def normed_graph(graph: Graph, statistics: LayerStatistics) -> Graph:
    """The network's graph with the attached batch norms after the layers in ``statistics``."""

    def normed(producer: Producer) -> Producer:
        if producer.layer not in statistics or producer.weight.dim != 0 or producer.stages:
            return producer
        gamma, beta, mean, var = _names(producer.layer)
        return replace(producer, stages=(Norm(f"{producer.layer} (attached)", gamma, beta, mean, var, _EPS),))

    groups = tuple(replace(group, producers=tuple(map(normed, group.producers))) for group in graph.groups)
    return replace(graph, groups=groups)


def folded(model: nn.Module, statistics: LayerStatistics, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold changed batch norms into the weights and biases of their layers.

    ``w' = s w`` and ``b' = s (b - mean) + beta`` with ``s = gamma / sqrt(var + eps)``, for each output channel.

    Args:
        model: the copy from :func:`with_norms`.
        statistics: the statistics that it was made with.
        values: new values of parameters and buffers, including those of the attached batch norms.

    Returns:
        New values of the network's own parameters and buffers, without attached batch norms.
    """
    state, own = tensors_of(model), dict(values)
    for layer in statistics:
        names = _names(layer)
        moved = any(name in values for name in names)
        gamma, beta, mean, var = (own.pop(name, state[name]).double() for name in names)
        if not moved:
            continue
        scale = gamma / (var + _EPS).sqrt()
        weight, bias = (values.get(name, state[name].detach()) for name in (f"{layer}.weight", f"{layer}.bias"))
        rows = scale.reshape(-1, *[1] * (weight.dim() - 1))
        own[f"{layer}.weight"] = (weight.double() * rows).to(weight.dtype)
        own[f"{layer}.bias"] = ((bias.double() - mean) * scale + beta).to(bias.dtype)
    return own


def measure_statistics(
    model: nn.Module, batches: Sequence[ExampleInputs], batch_statistics: bool = False
) -> LayerStatistics:
    """Measure mean and variance of the outputs of all convolutions and linear layers that have a bias and run once.

    Layers whose output is the network's output are left out, because outputs are not recalibrated. The result is empty
    for a network with enough batch norms (see :func:`lbyl.runtime.batch_norms.norms_cover`).

    Args:
        model: the network in evaluation mode.
        batches: the probes.
        batch_statistics: whether the few batch norms that there are normalize with each batch's own statistics. It must
            be so wherever the network runs on these probes, or recalibration corrects for the difference.
    """
    if norms_cover(model):
        return {}
    copy = sharing_copy(model)
    first = batches[0]
    few = a_few(copy, first) if first.rows is None else first.taking([n % first.size for n in range(first.rows)])
    names = _layers_that_run_once(copy, few)
    if not names:
        return {}
    count = 0
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    # A network that takes a fixed number of inputs runs several times for a batch.
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    attended: Attended = {}
    for name in names:

        def note(layer: nn.Module, _: object, out: Tensor, name: str = name) -> None:
            mean, var = channel_statistics(at_attended(attended, _channels_second(layer, out)))
            calls.setdefault(name, []).append((mean.double(), var.double() + mean.double().square()))

        copy.get_submodule(name).register_forward_hook(note)
    with torch.no_grad():
        for batch in batches:
            rows = len(batch.tensors()[0])
            count += rows
            calls.clear()
            attended = attended_positions(copy, batch)
            run_intercepted(copy, batch, batch_statistics=batch_statistics)
            for name, seen in calls.items():
                now = [rows * torch.stack(part).mean(0) for part in zip(*seen, strict=True)]
                old = sums.get(name, (torch.zeros_like(now[0]), torch.zeros_like(now[1])))
                sums[name] = old[0] + now[0], old[1] + now[1]
            give_back()
    found = {name: (first / count, second / count) for name, (first, second) in sums.items()}
    return {name: (mean, (square - mean.square()).clamp_min(0)) for name, (mean, square) in found.items()}


def _names(layer: str) -> tuple[str, str, str, str]:
    prefix = f"{layer}." if layer else ""
    return f"{prefix}{_GAMMA}", f"{prefix}{_BETA}", f"{prefix}{_MEAN}", f"{prefix}{_VAR}"


def _layers_that_run_once(model: nn.Module, inputs: ExampleInputs) -> list[str]:
    """The layers that run once, share neither weight nor bias with others, and don't give the network's output."""
    calls: dict[str, int] = {}
    given: dict[str, weakref.ref[Tensor]] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _LAYERS) and name}
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    hooks = []
    for name, module in layers.items():

        def note(_: nn.Module, __: object, out: Tensor, name: str = name) -> None:
            calls[name] = calls.get(name, 0) + 1
            given[name] = weakref.ref(out)

        hooks.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            outs = output_tensors(inputs.cloned().call(model))
    finally:
        for hook in hooks:
            hook.remove()
    return [
        name
        for name, module in layers.items()
        if calls.get(name) == 1
        and not any(given[name]() is tensor for tensor in outs)
        and type(module._parameters.get("weight")) is nn.Parameter
        and type(module._parameters.get("bias")) is nn.Parameter
        and users[id(module._parameters["weight"])] == users[id(module._parameters["bias"])] == 1
    ]


def _attach(layer: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Attach a batch norm with these statistics that is the identity."""
    bias = layer.bias
    assert isinstance(bias, Tensor)
    mean, var = mean.detach().to(bias), var.detach().to(bias)
    layer.register_buffer(_MEAN, mean)
    layer.register_buffer(_VAR, var)
    layer.register_buffer(_GAMMA, (var + _EPS).sqrt())
    layer.register_buffer(_BETA, mean.clone())
    layer.register_forward_hook(_normalize)


def _normalize(layer: nn.Module, inputs: object, out: Tensor) -> Tensor:
    """A forward hook that applies the attached batch norm to a layer's output."""
    gamma, beta, mean, var = (layer.get_buffer(name) for name in (_GAMMA, _BETA, _MEAN, _VAR))
    x = _channels_second(layer, out)
    normed = functional.batch_norm(x, mean, var, gamma, beta, False, 0.0, _EPS)
    return normed if x is out else normed.reshape(out.shape)


def _channels_second(layer: nn.Module, out: Tensor) -> Tensor:
    """A layer's output with the channels on axis 1: positions of a linear layer, which has them last, become rows.

    Other outputs are not reshaped, because residual sums are recognized by the identity of their operands.
    """
    return out.flatten(0, -2) if isinstance(layer, nn.Linear) and out.dim() > 2 else out
