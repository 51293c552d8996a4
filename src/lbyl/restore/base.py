"""What every restorer is given and what it returns."""

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
    """What restoration did for one group."""

    group: str
    terms: Terms | None
    seconds: float
    note: str
    errors: tuple[float, float] | None = None
    """Relative error of the consumers' outputs on the probes: after plain pruning, after restoration."""


@dataclass(frozen=True)
class Restoration:
    """What a restorer returns.

    Attributes:
        values: new values of parameters and buffers, by name, at their unpruned shapes. Dropped columns are zero.
        groups: one entry for each choice of the selection, in its order.
        assessment: the error of the network's outputs, where it was measured.
        notes: what the user should know.
        seconds: how long each stage took.
        masks: what sets further weights to zero where the uncut network has to run with dropped channels masked.
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
    """What a restorer is given.

    Attributes:
        model: the unpruned network in evaluation mode. Nothing in it may be changed.
        inputs: what it is called with.
        graph: its channel graph.
        selection: which channels stay.
        seed: for whatever is drawn at random.
        progress: called as ``progress(stage, done, total)``.
        probes: inputs that the restorer made before by :meth:`Restorer.make_probes`; None where it is to make them now.
        consumer_moments: what :meth:`Restorer.measure` found on them, by the names of the consumers' weights.
    """

    model: nn.Module
    inputs: ExampleInputs
    graph: Graph
    selection: Selection
    seed: int
    progress: Progress | None = None
    probes: Probes | None = None
    consumer_moments: Mapping[str, ConsumerMoments] = field(default_factory=dict)


class Restorer(ABC):
    """Computes new weights for the consumers of dropped channels.

    :meth:`restore` is all that a new restorer needs. One that works group by group from the weights alone derives from
    :class:`lbyl.ClosedFormRestorer` and needs ``deliver`` only.
    """

    chooses: bool = False
    """Whether it chooses the kept channels itself, so that no criterion is asked and no budget can be met."""

    @property
    def settings(self) -> object:
        """What is written into the plan: a dataclass, whose fields that are shown become plain data."""
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
        """How kept channels are chosen: by the criterion, unless the restorer does it itself."""
        return by

    @property
    def takes_probes(self) -> bool:
        """Whether :meth:`make_probes` gives inputs that moments are measured on."""
        return False

    def takes_lifelike_probes(self, inputs: ExampleInputs) -> bool:
        """Whether these inputs are like real ones, so that they tell which channels matter."""
        return False

    def make_probes(
        self, model: nn.Module, inputs: ExampleInputs, seed: int, progress: Progress | None = None
    ) -> Probes:
        """Inputs to measure moments on, made once for several budgets."""
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
        """Moments of what the consumers of some groups read, in at most ``limit`` bytes, for several budgets."""
        return {}

    @abstractmethod
    def restore(self, problem: RestorationProblem) -> Restoration:
        """New weights for the consumers of the dropped channels."""
