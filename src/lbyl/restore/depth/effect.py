"""The effect of a change on a network's final output, on held-out probes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lbyl.moments.class_dream import class_scores
from lbyl.moments.generated import writes_text
from lbyl.runtime.attended import at_attended, attended_positions
from lbyl.runtime.contexts import undisturbed
from lbyl.runtime.inputs import ExampleInputs, output_tensors
from lbyl.runtime.memory import give_back
from lbyl.runtime.output_error import error_of_parts

DIVERGENCE, ERROR = "divergence", "relative error"


def divergence(
    before: Float[Tensor, "positions classes"], after: Float[Tensor, "positions classes"]
) -> Float[Tensor, " positions"]:
    """The Kullback-Leibler divergence ``sum p (log p - log q)`` of softmax outputs, in nats.

    >>> logits = torch.tensor([[0.0, 1.0]])
    >>> float(divergence(logits, logits))
    0.0
    """
    p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True)
class Effect:
    """Measures how far the outputs of a network are from those of the original.

    Attributes:
        original: the original network.
        parts: the probes, in parts that fit into memory.
        measure: "divergence" for logits of classes or tokens, else "relative error".
        expected: the original's outputs.
    """

    original: nn.Module
    parts: tuple[ExampleInputs, ...]
    measure: str
    expected: list[list[Tensor]] = field(repr=False)

    @staticmethod
    def of(original: nn.Module, inputs: ExampleInputs, parts: tuple[ExampleInputs, ...]) -> Effect:
        """The effect on these probes; ``inputs`` are the example inputs, which tell what the outputs are."""
        with undisturbed(original), torch.no_grad():
            classifies = (
                writes_text(original, inputs) or class_scores(inputs.cloned().call(original), inputs) is not None
            )
        effect = Effect(original, parts, DIVERGENCE if classifies else ERROR, [])
        effect.expected.extend(effect._outputs(original))
        return effect

    def __call__(self, network: nn.Module) -> float:
        """The mean divergence in nats, or the relative error of the outputs; infinite if they are not finite."""
        if self.measure == ERROR:
            return self.error(network)
        total, count = 0.0, 0
        for before, after in zip(self.expected, self._outputs(network), strict=True):
            found = divergence(before[0].flatten(0, -2), after[0].flatten(0, -2))
            total, count = total + float(found.sum(dtype=torch.float64)), count + len(found)
        mean = total / max(count, 1)
        return mean if mean == mean else float("inf")

    @property
    def told(self) -> str:
        """The measure in words, with its unit."""
        return f"{self.measure} in nats" if self.measure == DIVERGENCE else self.measure

    def error(self, network: nn.Module) -> float:
        """The relative error of the same outputs, whatever the measure."""
        return error_of_parts(self.expected, self._outputs(network))

    @staticmethod
    def bytes_of(network: nn.Module, inputs: ExampleInputs) -> int:
        """The bytes of the outputs for each row of a batch."""
        with undisturbed(network), torch.no_grad():
            made = output_tensors(inputs.cloned().call(network))
        return sum(tensor.numel() * tensor.element_size() for tensor in made) // max(1, inputs.size)

    def _outputs(self, network: nn.Module) -> Iterator[list[Tensor]]:
        for part in self.parts:
            with undisturbed(network), torch.no_grad():
                made = output_tensors(part.cloned().call(network))
            if self.measure == DIVERGENCE:
                made = [next(t for t in made if t.is_floating_point() and t.dim() in (2, 3))]
            attended = attended_positions(self.original, part)
            yield [at_attended(attended, tensor.detach()) for tensor in made]
            give_back()
