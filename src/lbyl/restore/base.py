"""The base class of restorers, the problem that they get, and the result that they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lbyl.graph import Graph
from lbyl.moments import Probes
from lbyl.moments.accumulate import ConsumerMoments
from lbyl.restore.error_terms import Terms
from lbyl.runtime.inputs import ExampleInputs
from lbyl.runtime.output_error import Assessment
from lbyl.runtime.progress import Progress
from lbyl.selection.select import ByCriterion, Choose, Selection
from lbyl.surgery.masking import Masks


@dataclass(frozen=True)
class Restored:
    """The outcome of restoration for one group."""

    group: str
    terms: Terms | None
    seconds: float
    note: str
    errors: tuple[float, float] | None = None
    """Relative error of the consumers' outputs on the probes: after plain pruning, after restoration."""


@dataclass(frozen=True)
class Restoration:
    """The result of a restorer.

    Attributes:
        values: new values of parameters and buffers, by name, at their unpruned shapes. Dropped columns are zero.
        groups: one entry for each choice of the selection, in its order.
        assessment: the error of the network's outputs; None if not measured.
        notes: what the user should know.
        seconds: the time of each stage.
        masks: changes that set further weights to zero when the uncut network runs with dropped channels masked.
        held_out_errors: relative error of the network's outputs on held-out probes, by the way the consumers were
            solved: "pruned", "all at once", "halfway between", "in turn".
    """

    values: dict[str, Tensor]
    groups: tuple[Restored, ...]
    assessment: Assessment | None = None
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)
    held_out_errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RestorationProblem:
    """The problem that a restorer solves.

    Attributes:
        model: the unpruned network in evaluation mode. Nothing in it may be changed.
        inputs: the example inputs.
        graph: the network's channel graph.
        selection: the kept and dropped channels of each group.
        seed: seed of all random numbers.
        progress: called as ``progress(stage, done, total)``.
        probes: probes from an earlier call of :meth:`Restorer.make_probes`; None if they must be made now.
        consumer_moments: the result of :meth:`Restorer.measure` on these probes, by the names of consumers' weights.
        reference: the result of :meth:`Restorer.reference` on these probes; None if there is none.
    """

    model: nn.Module
    inputs: ExampleInputs
    graph: Graph
    selection: Selection
    seed: int
    progress: Progress | None = None
    probes: Probes | None = None
    consumer_moments: Mapping[str, ConsumerMoments] = field(default_factory=dict)
    reference: object = None


class Restorer(ABC):
    """Computes new weights for the consumers of dropped channels.

    A new restorer only has to define :meth:`restore`. A restorer that works group by group from the weights alone
    should derive from :class:`lbyl.ClosedFormRestorer` and only has to define ``deliver``.
    """

    chooses: bool = False
    """Whether it chooses the kept channels itself. Then no criterion is used, and budgets are not possible."""

    @property
    def settings(self) -> object:
        """The dataclass whose fields are written into the plan, except those with ``repr=False``."""
        return self

    @property
    def runs_network(self) -> bool:
        """Whether it runs the network on probes, which takes far longer than the weights alone."""
        return False

    @property
    def keeps_inputs_private(self) -> bool:
        """Whether its probes are the user's data, which must not be written to disk."""
        return False

    def choose(self, by: ByCriterion) -> Choose:
        """The function that chooses kept channels: by the criterion, unless the restorer chooses them itself."""
        return by

    @property
    def takes_probes(self) -> bool:
        """Whether it needs probes from :meth:`make_probes`."""
        return False

    def takes_lifelike_probes(self, inputs: ExampleInputs) -> bool:
        """Whether its probes are like real inputs, so that criteria may use them."""
        return False

    def make_probes(
        self, model: nn.Module, inputs: ExampleInputs, seed: int, progress: Progress | None = None
    ) -> Probes:
        """Make the probes on which moments are measured. They may be used for several budgets."""
        raise NotImplementedError(f"{type(self).__name__} takes no probes")

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
        """Measure moments of the inputs of some groups' consumers, in at most ``limit`` bytes, for several budgets."""
        return {}

    def reference(self, model: nn.Module, probes: Probes, several: bool = False) -> object:
        """What restorations for all budgets are held against, which may measure it at first use; None for nothing.

        ``several`` says whether there will be more than one, so that it may keep what all of them compute.
        """
        return None

    @abstractmethod
    def restore(self, problem: RestorationProblem) -> Restoration:
        """Compute new weights for the consumers of dropped channels."""
