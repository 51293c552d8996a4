"""Least squares on measured moments: the paper's objective with the network's real second moments in it."""

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
from lbyl.restore.least_squares.settings import Settings
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.progress import Progress


@dataclass(frozen=True)
class LeastSquares(Settings, Restorer):
    """Fit what the kept channels must do so that each consumer's output stays what it was.

    The paper's least squares assumes a white-noise input and no activation. Both assumptions go away when the
    second moments ``G`` of the consumer's real input stand in for ``V V^T``; the activation error is then inside
    the objective. Moments come from inputs made without data of the user's (:class:`lbyl.Noise`,
    :class:`lbyl.Photographs`, :class:`lbyl.Dream`), from the weights alone (:class:`lbyl.Weights`,
    :class:`lbyl.Gaussian`), or from the user's own unlabelled inputs (:class:`lbyl.Data`).

    Attributes:
        moments: where the second moments come from.
        solve: "patch" fits the consumer's whole kernel to the dropped channels' share of its output; "mix" fits
            one number a channel pair (the delivery matrix S). They are the same for 1x1 kernels.
        ridge: penalty on what is added to the kept weights, relative to the mean of the moments' diagonal. None
            takes 0.3 for probed moments, 0.1 for closed forms, which no sample of inputs makes noisy, and 0.001
            where a prior already steadies probed ones.
        prior: between 0 and 1: how far probed moments are drawn towards the ones that the weights alone suggest
            (the paper's ``V V^T``, each filter centered). None takes 0.5 where probes
            are unlike real inputs and no batch norm keeps channels at their mean and spread, and 0 elsewhere.
        renorm: move the batch-norm statistics downstream by what pruning changed, where that helps.
        attach_norms: where the network has no batch norms, give each layer one of its own for as long as restoration
            takes, with the statistics that are measured on the probes; it is folded into the layer at the end. Then
            ``renorm``, ``sequential`` and dreams do for such a network what they do for others.
        sequential: solve consumers in turn, and the layers in between with them, each on what the network gives it once
            all before it is cut, and let those that go into a residual sum make up for what the sum's other operand has
            lost. None tries it on dreams and real inputs, where there are batch norms and residual sums, with as many
            of the probes as ``memory`` holds, unless these are less than 4 of a batch. This solution, the one of all
            consumers at once, or their average is kept, whichever has the lowest error on held-out probes; the report
            says which. True keeps the solution in turn whatever the error, False never tries.
        budget: bytes that one consumer's patch moments may take; a larger consumer is solved by "mix", which the
            report says.
        memory: bytes that activations may take while moments are collected, consumers are solved in turn and errors are
            measured; :class:`lbyl.Dream` has its own. Copies of the model, moments and the probes come on top.
        positions: at most so many positions of each consumer enter the moments, a batch.
    """

    @property
    def runs_network(self) -> bool:
        """True: even with closed-form moments, solving takes long, so what can be cut is found out first."""
        return True

    @property
    def keeps_inputs_private(self) -> bool:
        """Whether moments are collected on data of the user's."""
        return isinstance(self.moments, Data)

    @property
    def takes_probes(self) -> bool:
        """Whether moments are collected, not taken in closed form."""
        return isinstance(self.moments, ProbeSource)

    def takes_lifelike_probes(self, inputs: ExampleInputs) -> bool:
        """Whether the moment source says so of its probes."""
        return self.takes_probes and is_lifelike(self.moments, inputs)

    def make_probes(
        self, model: nn.Module, inputs: ExampleInputs, seed: int, progress: Progress | None = None
    ) -> Probes:
        """The probes of the moment source, in batches that ``memory`` allows."""
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
        """Moments of what the consumers of some groups read, for :meth:`restore` to take parts of."""
        return measure(model, graph, groups, probes, self, seed, limit, progress)

    def restore(self, problem: RestorationProblem) -> Restoration:
        """Probe the network, solve each consumer, recalibrate the batch norms, and measure the outputs' error."""
        return fit(problem, self)
