"""Least squares on measured moments: the paper's objective with second moments of real activations."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from lbyl.graph import Graph
from lbyl.moments import Data, Probes, ProbeSource
from lbyl.moments.accumulate import ConsumerMoments
from lbyl.moments.base import is_lifelike
from lbyl.restore.base import Restoration, RestorationProblem, Restorer
from lbyl.restore.least_squares.fit import fit, make_probes, measure
from lbyl.restore.least_squares.judge import Reference
from lbyl.restore.least_squares.settings import Settings
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress


@dataclass(frozen=True)
class LeastSquares(Settings, Restorer):
    """Fit the consumers' weights so that each consumer's output changes as little as possible.

    The paper's least squares assumes white-noise inputs and no activation. Neither assumption is needed if the second
    moments ``G`` of the consumer's real inputs replace ``V V^T``; the objective then contains the activation error.
    Moments come from synthetic inputs (:class:`lbyl.Noise`, :class:`lbyl.Photographs`, :class:`lbyl.Dream`), from the
    weights alone (:class:`lbyl.Weights`, :class:`lbyl.Gaussian`), or from the user's own unlabelled inputs
    (:class:`lbyl.Data`).

    Attributes:
        moments: the source of second moments.
        solve: "patch" fits the consumer's whole kernel to the dropped channels' contribution to its output; "mix" fits
            one number for each pair of channels (the delivery matrix S). They are equal for 1x1 kernels.
        ridge: penalty on the change of the kept weights, relative to the mean of the moments' diagonal. None chooses
            0.3 for measured moments (on texts ``0.03 (1 + k/n)`` for k kept neurons and n tokens, and 0.003 on
            dreams of classes), 0.1 for closed forms, which have no sampling error, and 0.001 for measured moments
            with a prior.
        prior: weight, between 0 and 1, of the moments that follow from the weights alone (the paper's ``V V^T`` with
            centered filters) in a mixture with measured ones. None chooses 0.5 if the probes are not like real inputs
            and no batch norm normalizes the channels, else 0.
        renorm: recalibrate batch norms after the cut layers, if this lowers the error on held-out probes.
        attach_norms: give each layer of a network without batch norms a temporary one, with statistics measured on the
            probes, which is folded into the layer at the end. ``renorm``, ``sequential`` and dreams then work for such
            networks as well.
        sequential: solve consumers, and the layers between them, one after the other, each with the inputs that it has
            after all earlier layers are cut. Consumers in a residual connection then also compensate for the error of
            the other operand. None tries this for dreams and real inputs, if there are batch norms and residual
            connections and ``memory`` holds at least 4 probes of each batch in both networks. It keeps this solution,
            the solution for all consumers at once, or their average, whichever has the lowest error on held-out probes;
            the report says which. True always keeps the sequential solution, and False never tries it.
        budget: bytes that one consumer's patch moments may take. Larger consumers are solved by "mix", and the report
            says so. So are those whose kernels have more than 32 taps and patches of more than 2,048 entries.
        memory: bytes that activations may take while moments are collected, consumers are solved sequentially, and
            errors are measured. Copies of the model, moments and probes are extra, and :class:`lbyl.Dream` has its own
            setting. A sweep keeps outputs of the unpruned network in two fifths of it more, at most 1 GiB and a quarter
            of what is available.
        positions: largest number of positions that enter the moments, for each call of a consumer on a batch. 3x3
            convolutions may take all of up to four times as many, which takes no more time.
    """

    @property
    def runs_network(self) -> bool:
        """True: even with closed-form moments solving takes long, so the cut is checked first."""
        return True

    @property
    def keeps_inputs_private(self) -> bool:
        """Whether moments are measured on the user's data."""
        return isinstance(self.moments, Data)

    @property
    def takes_probes(self) -> bool:
        """Whether moments are measured on probes, and not computed in closed form."""
        return isinstance(self.moments, ProbeSource)

    def takes_lifelike_probes(self, inputs: ExampleInputs) -> bool:
        """Whether the moment source's probes are like real inputs."""
        return self.takes_probes and is_lifelike(self.moments, inputs)

    def make_probes(
        self, model: nn.Module, inputs: ExampleInputs, seed: int, progress: Progress | None = None
    ) -> Probes:
        """The probes of the moment source, in batches that fit into ``memory``."""
        return make_probes(model, inputs, self, seed, progress)

    def measure(
        self,
        model: nn.Module,
        graph: Graph,
        groups: Collection[int],
        probes: Probes,
        seed: int,
        limit: int,
        progress: Progress | None = None,
    ) -> dict[str, ConsumerMoments]:
        """Measure moments of the inputs of some groups' consumers, from which :meth:`restore` uses parts."""
        return measure(model, graph, groups, probes, self, seed, limit, progress)

    def reference(self, model: nn.Module, probes: Probes, several: bool = False) -> Reference:
        """The outputs of the unpruned network on probes, which errors are measured against.

        For ``several`` restorations, outputs of its layers are kept as well.
        """
        return Reference.of(model, probes, self.memory, several)

    def restore(self, problem: RestorationProblem) -> Restoration:
        """Probe the network, solve each consumer, recalibrate the batch norms, and measure the outputs' error."""
        return fit(problem, self)
