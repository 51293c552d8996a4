"""Moving batch-norm statistics by what pruning changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lbyl.moments import Probes
from lbyl.probing import run
from lbyl.surgery import tensors_of

_DEAD = 1e-3
"""A channel whose spread on the probes is less than this share of its trained spread tells nothing."""
_LARGEST_RATIO = 4.0


Statistics = Mapping[tuple[str, str], tuple[Tensor, Tensor]]
"""Mean and variance at the input of each batch norm, by the names of its running mean and variance."""


def renormalize(
    model: nn.Module, values: Mapping[str, Tensor], probes: Probes, original: Statistics
) -> dict[str, Tensor]:
    """New values in which every batch norm's statistics follow the pruned network.

    ``mean + (mean_pruned - mean_original)`` and ``var * var_pruned / var_original``, both measured on the same
    probes with batch statistics: with running ones the shifts would pile up from layer to layer. Channels that
    the probes leave dead keep their statistics, and no variance changes by more than a factor of 4. ``original``
    is what :func:`statistics` gives for the network itself.
    """
    pruned = statistics(model, values, probes)
    state = tensors_of(model)
    moved = dict(values)
    for (mean_name, var_name), (mean, var) in original.items():
        if (mean_name, var_name) not in pruned:
            continue
        new_mean, new_var = pruned[mean_name, var_name]
        old_mean, old_var = state[mean_name], state[var_name]
        alive = var > _DEAD * old_var
        ratio = (new_var / var.clamp_min(1e-30)).clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO)
        mean_now = values.get(mean_name, old_mean)
        moved[mean_name] = torch.where(alive, old_mean + (new_mean - mean), mean_now).to(old_mean.dtype)
        moved[var_name] = torch.where(alive, old_var * ratio, old_var).to(old_var.dtype)
    return moved


def transplant(values: Mapping[str, Tensor], state: Mapping[str, Tensor], original: Statistics) -> dict[str, Tensor]:
    """The same change of batch-norm statistics, made to the probes' statistics instead of the running ones.

    Probes may look unlike anything that the network was trained on, and then its running statistics throw its
    activations off. As if the probes were the training data, outputs on them can be compared all the same.
    """
    moved = dict(values)
    for (mean_name, var_name), (mean, var) in original.items():
        old_mean, old_var = state[mean_name], state[var_name]
        moved[mean_name] = (mean + (values.get(mean_name, old_mean) - old_mean)).to(old_mean.dtype)
        ratio = values.get(var_name, old_var) / old_var.clamp_min(1e-30)
        moved[var_name] = (var * ratio).to(old_var.dtype)
    return moved


def statistics(model: nn.Module, values: Mapping[str, Tensor], probes: Probes) -> Statistics:
    """Mean and variance of each batch norm's input, averaged over the batches."""
    sums: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def on_norm(mean_name: str, var_name: str, mean: Tensor, var: Tensor) -> None:
        found = mean.double(), var.double()
        known = sums.get((mean_name, var_name))
        sums[mean_name, var_name] = found if known is None else (known[0] + found[0], known[1] + found[1])

    for batch in probes.batches:
        run(model, batch, values=values, on_norm=on_norm, batch_statistics=True)
    count = len(probes.batches)
    return {key: (mean / count, var / count) for key, (mean, var) in sums.items()}
