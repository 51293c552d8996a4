"""Recalibration: corrects batch-norm statistics for the changes that pruning causes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lbyl.runtime.forward import ConsumerCall, run_intercepted
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.layer_norms import NormMasks
from lbyl.runtime.memory import give_back
from lbyl.runtime.seeding import generator_for, sample_positions

_DEAD = 1e-3
"""Channels whose deviation on the probes is below this share of the trained one are not recalibrated."""
_LARGEST_RATIO = 4.0
POSITIONS = 16384
"""How many outputs of a consumer are sampled for the regression of its change on its output."""


Statistics = Mapping[tuple[str, str], tuple[Tensor, Tensor]]
"""Mean and variance at the input of each batch norm, by the names of its running mean and variance."""


@dataclass(frozen=True)
class Look:
    """Measurements from one pass over some probes.

    Attributes:
        statistics: mean and variance at the input of every batch norm.
        outputs: outputs of observed consumers at sampled positions, which are the same in every pass.
    """

    statistics: Statistics
    outputs: Mapping[str, Float[Tensor, "positions channels"]]


def renormalize(
    state: Mapping[str, Tensor], values: Mapping[str, Tensor], original: Statistics, pruned: Statistics
) -> dict[str, Tensor]:
    """New values in which every batch norm's statistics are corrected for the pruned network.

    The new statistics are ``mean + (mean_pruned - mean_original)`` and ``var * var_pruned / var_original``, both
    measured on the same probes with batch statistics. (With running statistics, the shifts would accumulate from layer
    to layer.) Channels that are inactive on the probes keep their statistics, and no variance changes by more than a
    factor of 4.
    """
    moved = dict(values)
    for (mean_name, var_name), (mean, var) in original.items():
        if (mean_name, var_name) not in pruned:
            continue
        new_mean, new_var = pruned[mean_name, var_name]
        old_mean, old_var = state[mean_name], state[var_name]
        alive, ratio = variance_change(var, new_var, old_var)
        mean_now = values.get(mean_name, old_mean)
        moved[mean_name] = torch.where(alive, old_mean + (new_mean - mean), mean_now).to(old_mean.dtype)
        moved[var_name] = torch.where(alive, old_var * ratio, old_var).to(old_var.dtype)
    return moved


def variance_change(
    before: Float[Tensor, " channels"], after: Float[Tensor, " channels"], trained: Float[Tensor, " channels"]
) -> tuple[Bool[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Which channels are active on the probes, and the factor by which pruning changed the variance of each."""
    ratio = (after / before.clamp_min(1e-30)).clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO)
    return before > _DEAD * trained, ratio


def expected_shift(
    before: Float[Tensor, "positions channels"],
    after: Float[Tensor, "positions channels"],
    gap: Float[Tensor, " channels"],
) -> Float[Tensor, " channels"]:
    """The correction of ``E[after - before]``, measured on probes, if the real mean of ``before`` is ``gap`` higher.

    The change of an output depends on the output itself. A regression on the probes gives the change for another mean:
    ``Cov(after - before, before) Cov(before)^-1 gap``, with a ridge of 1% of each variance.
    """
    return Regression.on(before, gap).of(_precise(after) - _precise(before))


@dataclass(frozen=True)
class Regression:
    """A regression of changes of an output on the output, as far as it does not depend on the change.

    Attributes:
        along: ``Cov(before)^-1 gap`` in the direction of each position, without its largest factor.
        scale: that factor.
    """

    along: Float[Tensor, " positions"]
    scale: Float[Tensor, ""]

    @staticmethod
    def on(before: Float[Tensor, "positions channels"], gap: Float[Tensor, " channels"]) -> Regression:
        """The regression on an output; see :func:`expected_shift`."""
        # As precise as the activations are, which is far below the ridge: this takes most of the time.
        y = _precise(before)
        y = y - y.mean(0)
        own = (y.T @ y).double()
        spread = own.diagonal()
        steadied = own + torch.diag(0.01 * spread + 1e-9 * spread.max().clamp_min(1e-30))
        share = torch.linalg.solve(steadied, gap.double())
        scale = share.abs().max().clamp_min(1e-30)  # of outputs that hardly vary, it is beyond float32
        return Regression(y @ (share / scale).to(y.dtype), scale)

    def of(self, change: Float[Tensor, "positions channels"]) -> Float[Tensor, " channels"]:
        """What this change shifts."""
        change = change - change.mean(0)
        return (change.T @ self.along).double() * self.scale


def _precise(x: Tensor) -> Tensor:
    """Activations in their own precision, at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def recenter(
    values: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    original: Sequence[Look],
    pruned: Sequence[Look],
    norms: Mapping[str, str],
) -> dict[str, Tensor]:
    """New running means that are corrected for the difference between probes and real inputs.

    Pruning changes the mean of a consumer's output, and this change is measured on probes. The real mean of the
    original output is known: it is the running mean. If the probes' mean differs from it, the measured change is
    corrected by :func:`expected_shift`.

    Args:
        values: new values of parameters and buffers.
        state: the original ones.
        original: measurements of the original network, batch by batch.
        pruned: measurements of the pruned network on the same probes.
        norms: the running mean of the batch norm after each consumer, by the name of the consumer's weight.
    """
    shifts = {}
    means = {mean_name: mean for (mean_name, _), (mean, _) in averaged(original).items()}
    for weight, mean_name in norms.items():
        before, after = (
            [each.outputs[weight] for each in looks if weight in each.outputs] for looks in (original, pruned)
        )
        if not before or not after or mean_name not in means:
            continue
        gap = state[mean_name].double() - means[mean_name]
        shifts[mean_name] = expected_shift(torch.cat(before), torch.cat(after), gap)
    return shifted(values, state, shifts)


def shifted(
    values: Mapping[str, Tensor], state: Mapping[str, Tensor], shifts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """New values in which ``shifts`` are added to some running means."""
    moved = dict(values)
    for name, shift in shifts.items():
        now = values.get(name, state[name])
        moved[name] = (now.double() + shift).to(now.dtype)
    return moved


def transplant(values: Mapping[str, Tensor], state: Mapping[str, Tensor], original: Statistics) -> dict[str, Tensor]:
    """New values in which batch norms have the probes' statistics, with the changes that ``values`` make.

    Probes may differ so much from the training data that running statistics distort the activations. With statistics
    as if the network was trained on the probes, outputs on the probes can be compared nevertheless.
    """
    moved = dict(values)
    for (mean_name, var_name), (mean, var) in original.items():
        old_mean, old_var = state[mean_name], state[var_name]
        moved[mean_name] = (mean + (values.get(mean_name, old_mean) - old_mean)).to(old_mean.dtype)
        ratio = values.get(var_name, old_var) / old_var.clamp_min(1e-30)
        moved[var_name] = (var * ratio).to(old_var.dtype)
    return moved


def averaged(looks: Sequence[Look]) -> Statistics:
    """The mean statistics of several passes, with equal weights."""
    statistics = {}
    for key in looks[0].statistics:
        found = [each.statistics[key] for each in looks if key in each.statistics]
        mean, var = (torch.stack(parts).mean(0) for parts in zip(*found, strict=True))
        statistics[key] = mean, var
    return statistics


class Observer:
    """Collects the measurements of a :class:`Look`; :func:`lbyl.runtime.forward.run_intercepted` calls its methods.

    Args:
        consumers: names of the weights of consumers whose outputs are sampled.
        positions: number of sampled positions of each output.
    """

    def __init__(self, consumers: Collection[str] = (), positions: int = POSITIONS) -> None:
        self.consumers, self.positions = consumers, positions
        self.calls: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
        self.outputs: dict[str, Tensor] = {}

    def on_norm(self, mean_name: str, var_name: str, mean: Tensor, var: Tensor) -> None:
        """Record the statistics at a batch norm's input."""
        self.calls.setdefault((mean_name, var_name), []).append((mean.double(), var.double()))

    def on_consumer(self, call: ConsumerCall) -> None:
        """Record some of a consumer's outputs."""
        if call.weight not in self.consumers:
            return
        out = call.out if call.op == "linear" else call.out.flatten(2).transpose(1, 2)
        out = out.reshape(-1, out.shape[-1])
        # Seeded by the consumer's name, so that the positions are the same in every pass.
        chosen = sample_positions(len(out), self.positions, generator_for(0, f"{call.weight}#outputs"))
        self.outputs[call.weight] = out.clone() if chosen is None else out[chosen.to(out.device)]

    def look(self) -> Look:
        """The measurements."""
        return Look({names: _of_all(calls) for names, calls in self.calls.items()}, self.outputs)


def _of_all(calls: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and variance over several calls of equal size: a network with a fixed batch size runs more than once."""
    means, variances = (torch.stack(each) for each in zip(*calls, strict=True))
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


def look(
    model: nn.Module,
    values: Mapping[str, Tensor],
    batch: ExampleInputs,
    consumers: Collection[str] = (),
    positions: int = POSITIONS,
    kept: NormMasks | None = None,
) -> Look:
    """Run a batch with batch statistics, and measure every batch norm's input and some consumers' outputs.

    ``kept`` gives the kept channels at layer norms, as in :func:`lbyl.runtime.forward.run_intercepted`.
    """
    observer = Observer(consumers, positions)
    on_norm, on_consumer = observer.on_norm, observer.on_consumer
    run_intercepted(
        model, batch, values=values, on_norm=on_norm, on_consumer=on_consumer, batch_statistics=True, kept=kept
    )
    give_back()
    return observer.look()
