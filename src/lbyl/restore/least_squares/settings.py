"""Least squares on measured moments: the paper's objective with the network's real second moments in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lbyl.errors import InputError
from lbyl.moments import ClosedFormSource, Dream, ProbeSource
from lbyl.runtime.memory import ROOM


@dataclass(frozen=True)
class LeastSquares:
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
            (the paper's ``V V^T``, each filter centered). None takes 0.5 for channels that no batch norm
            keeps at their trained mean and spread, and 0 for the others.
        renorm: move the batch-norm statistics downstream by what pruning changed, where that helps.
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

    moments: ProbeSource | ClosedFormSource = field(default_factory=Dream)
    solve: str = "patch"
    ridge: float | None = None
    prior: float | None = None
    renorm: bool = True
    sequential: bool | None = None
    budget: int = 512 * 2**20
    memory: int = ROOM
    positions: int = 20_000

    def __post_init__(self) -> None:
        if self.solve not in ("mix", "patch"):
            raise InputError(f"LeastSquares(solve={self.solve!r}): choose 'mix' or 'patch'")
        if self.ridge is not None and not self.ridge >= 0:
            raise InputError(f"LeastSquares(ridge={self.ridge}): must be at least 0")
        if self.prior is not None and not 0 <= self.prior <= 1:
            raise InputError(f"LeastSquares(prior={self.prior}): must lie between 0 and 1")
        if self.memory < 1:
            raise InputError(f"LeastSquares(memory={self.memory}): must be at least 1 byte")
        if self.sequential and isinstance(self.moments, ClosedFormSource):
            name = type(self.moments).__name__
            raise InputError(
                f"LeastSquares(sequential=True): {name} runs no network; choose Noise, Photographs, Dream or Data"
            )
        if not isinstance(self.moments, ProbeSource | ClosedFormSource):
            raise InputError(
                f"LeastSquares(moments={self.moments!r}): choose Weights, Gaussian, Noise, Photographs, Dream or Data"
            )

    def strength(self, steadied: bool) -> float:
        """The relative ridge, given whether a prior is mixed in."""
        if self.ridge is not None:
            return self.ridge
        if isinstance(self.moments, ClosedFormSource):
            return 0.1
        return 1e-3 if steadied else 0.3
