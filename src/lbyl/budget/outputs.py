"""What cuts change at a network's outputs: tried one by one, or for large networks to first order, by gradients."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lbyl.moments import Probes
from lbyl.moments.generated import writes_text
from lbyl.runtime.attended import at_attended, attended_positions
from lbyl.runtime.batches import first_rows, in_parts
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.forward import frozen, run_intercepted
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.macs import count_macs
from lbyl.runtime.memory import ROOM, a_few, give_back, held_at_once, made_bytes
from lbyl.runtime.output_error import outputs_error
from lbyl.runtime.seeding import generator_for

Key = TypeVar("Key", bound=Hashable)
Cut = tuple[Key, Mapping[str, Tensor]]
"""A cut: what it is called, and the weights that it changes, by their names."""

_SHARES = (0.125, 0.5, 0.875)
"""Shares of a group's channels that are cut to measure it. Errors of outputs are bounded, so what half of the channels
are worth says little about an eighth of them, and the other way around."""
_SHARE, _SMALL_SHARE = (0.5,), (0.25,)
"""What is cut where only one cut of each group is tried, and where gradients say what it changes: less there, because
they are only exact for small changes."""
_TRIED, _FEW = 12, 4
"""Number of held-out probes, and of those on which cuts of larger networks are tried."""
_TRIALS, _FEW_TRIALS = 5e11, 2e12
"""Largest number of multiply-accumulates for trying cuts one by one, and for trying them on few probes."""
_GRADIENTS, _DRAWS = 4e12, 4
"""Largest number of multiply-accumulates for gradients that are drawn several times, and how often. Drawn once, they
may cost ten times as many."""
_TOGETHER = 2**30
"""Bytes of changed weights for which gradients are taken in one go."""


class Measure(Protocol):
    """Measures what cuts change at the outputs, as squared relative errors or divergences.

    Attributes:
        shares: the shares of each group's channels that are to be cut for it.
    """

    shares: Sequence[float]

    @property
    def note(self) -> str:
        """What the report has to say."""
        ...

    def __call__(self, cuts: Iterable[Cut[Key]]) -> dict[Key, float]:
        """What each cut changes; {} if that can't be measured."""
        ...


def measure_for(
    model: nn.Module, inputs: ExampleInputs, probes: Probes, state: Mapping[str, Tensor], groups: int, seed: int
) -> Measure:
    """The most accurate way to measure cuts of so many groups on held-out probes that does not take too long."""
    some, few = (replace(probes, held_out=a_few(model, probes.held_out, count)) for count in (_TRIED, _FEW))
    each, least = (groups * _macs(model, inputs, given.held_out) for given in (some, few))
    if each * len(_SHARES) <= _TRIALS:
        return Trials(model, some, _SHARES)
    if least <= _FEW_TRIALS:
        return Trials(model, few, _SHARES if least * len(_SHARES) <= _FEW_TRIALS else _SHARE)
    each = _macs(model, inputs, some.held_out)
    # A backward pass takes twice as long as a forward pass.
    draws = _DRAWS if each * (1 + 2 * _DRAWS) <= _GRADIENTS else 1
    with undisturbed(model):
        fits = held_at_once(ROOM, made_bytes(model, first_rows(probes.held_out))) > 0
    if not fits or each * 3 > 10 * _GRADIENTS:
        return Unmeasured()
    return Gradients(model, inputs, some, state, draws, seed)


def _macs(model: nn.Module, inputs: ExampleInputs, given: ExampleInputs) -> int:
    """The multiply-accumulates of a run on some inputs, from those on the example inputs."""
    sizes = [sum(t.numel() for t in each.tensors()) for each in (given, inputs)]
    return max(1, sizes[0] // max(1, sizes[1])) * max(1, count_macs(model, inputs))


@dataclass
class Trials:
    """Runs the network with each cut."""

    model: nn.Module
    probes: Probes
    shares: Sequence[float]
    note: str = ""

    def __call__(self, cuts: Iterable[Cut[Key]]) -> dict[Key, float]:
        """The squared relative errors of the outputs."""
        return {key: outputs_error(self._expected, self._outputs(values)) ** 2 for key, values in cuts}

    @cached_property
    def _expected(self) -> list[Tensor]:
        """The uncut network's outputs, which are the same for all passes over the probes."""
        return self._outputs({})

    def _outputs(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """The network's outputs for the held-out probes, at positions that attention masks allow."""
        given = self.probes.held_out
        found = run_intercepted(self.model, given, values=values, batch_statistics=self.probes.batch_statistics)
        attended = attended_positions(self.model, given)
        return [at_attended(attended, tensor) for tensor in output_tensors(found)]


@dataclass
class Gradients:
    """Says to first order what cuts change; see :func:`changes_at_outputs`."""

    model: nn.Module
    inputs: ExampleInputs
    probes: Probes
    state: Mapping[str, Tensor]
    draws: int
    seed: int
    shares: Sequence[float] = _SMALL_SHARE
    failed: bool = False

    @property
    def note(self) -> str:
        """What the report has to say."""
        if self.failed:
            return Unmeasured.note
        return (
            "widths: the network is too large to try what cuts of each group change at its outputs; gradients on "
            "held-out probes say it to first order"
        )

    def __call__(self, cuts: Iterable[Cut[Key]]) -> dict[Key, float]:
        """The squared relative errors of the outputs, or divergences; {} if the network works in place."""
        found: dict[Key, float] = {}
        try:
            for chunk in self._chunks(cuts):
                found |= self._changes(chunk)
        except RuntimeError:  # gradients need what the network has changed in place, say
            self.failed = True
            return {}
        return found

    def _chunks(self, cuts: Iterable[Cut[Key]]) -> Iterator[dict[Key, Mapping[str, Tensor]]]:
        """Cuts whose weights fit into memory together."""
        chunk: dict[Key, Mapping[str, Tensor]] = {}
        held = 0
        for key, values in cuts:
            chunk[key] = values
            held += sum(value.nbytes for value in values.values())
            if held >= _TOGETHER:
                yield chunk
                chunk, held = {}, 0
        if chunk:
            yield chunk

    def _changes(self, chunk: Mapping[Key, Mapping[str, Tensor]]) -> dict[Key, float]:
        weights = {name: self.state[name].detach() for values in chunk.values() for name in values}
        changes = {k: {n: value - weights[n] for n, value in values.items()} for k, values in chunk.items()}
        return changes_at_outputs(
            self.model,
            self.inputs,
            self.probes.held_out,
            changes,
            weights,
            generator_for(self.seed, "gradients"),
            draws=self.draws,
            batch_statistics=self.probes.batch_statistics,
        )


@dataclass
class Unmeasured:
    """Measures nothing, so that all groups weigh equally."""

    shares: Sequence[float] = ()
    note: str = (
        "widths: the network is too large to measure how each group's error changes its outputs; all weigh equally"
    )

    def __call__(self, cuts: Iterable[Cut[Key]]) -> dict[Key, float]:
        """Nothing."""
        return {}


def changes_at_outputs(
    model: nn.Module,
    inputs: ExampleInputs,
    held_out: ExampleInputs,
    changes: Mapping[Key, Mapping[str, Tensor]],
    values: Mapping[str, Tensor],
    generator: torch.Generator,
    *,
    draws: int = 1,
    batch_statistics: bool = False,
) -> dict[Key, float]:
    """How much each change of weights changes the outputs, to first order.

    A change ``D`` of a weight ``W`` changes a loss by ``<D, dL/dW>``. For a language model, the loss is that of tokens
    drawn from the model's own distribution. Then the expected square is twice the Kullback-Leibler divergence from it,
    because the matrix of ``E[g g^T]`` is the Fisher information (Amari 1998, "Natural gradient works efficiently in
    learning"). For other networks, the loss is the product of the outputs with random signs, and the expected square is
    the squared error of the outputs, which is divided by their sum of squares.

    Args:
        model: the network in evaluation mode; nothing in it is changed.
        inputs: its example inputs.
        held_out: inputs to look at. They are run one by one.
        changes: what is added to weights, by their names.
        values: the network's weights of these names.
        generator: draws tokens or signs.
        draws: how often, for each input. The relative error of the result is about ``sqrt(2 / draws / inputs)``.
        batch_statistics: normalize with the statistics of each batch.

    Returns:
        The squared relative error of the outputs, or the divergence in nats for each text, for each change.

    Raises:
        RuntimeError: the network changes in place what gradients need.
    """
    with torch.no_grad(), undisturbed(model):
        text = writes_text(model, inputs)
    # Copies, because these need gradients, and the network's own weights stay as they are.
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in values.items()}
    sums, whole = dict.fromkeys(changes, 0.0), 0.0
    for part in in_parts(held_out, 1):
        with frozen(model), torch.enable_grad():
            found = output_tensors(run_intercepted(model, part, values=leaves, batch_statistics=batch_statistics))
            for draw in range(draws):
                loss, size = _loss(found, text, generator)
                grads = torch.autograd.grad(
                    loss, list(leaves.values()), retain_graph=draw < draws - 1, allow_unused=True
                )
                whole += size
                given = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
                for key, change in changes.items():
                    moved = (_dot(more, given[name]) for name, more in change.items() if name in given)
                    sums[key] += sum(moved) ** 2
        del found
        give_back()
    return {key: total / whole for key, total in sums.items()}


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.detach().flatten(), b.detach().flatten()))


def _loss(outputs: Sequence[Tensor], text: bool, generator: torch.Generator) -> tuple[Tensor, float]:
    """The loss, and what the squares of its changes are relative to; see :func:`changes_at_outputs`."""
    if text:
        logits = outputs[0].flatten(0, -2).float()
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).flatten()
        return functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum"), 2.0 * len(outputs[0])
    power = sum(float(out.detach().double().square().sum()) for out in outputs)
    signs = [torch.randint(2, out.shape, generator=generator).to(out) * 2 - 1 for out in outputs]
    return torch.stack([(out * sign).sum() for out, sign in zip(outputs, signs, strict=True)]).sum(), power
