"""The settings of restoration by least squares, and checks of their values."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from lbyl.errors import InputError
from lbyl.moments import ClassDream, ClosedFormSource, Dream, ProbeSource
from lbyl.runtime.checks import check_number, check_switch
from lbyl.runtime.memory import ROOM


@dataclass(frozen=True)
class Settings:
    """The settings of :class:`lbyl.LeastSquares`, whose documentation explains them."""

    moments: ProbeSource | ClosedFormSource = field(default_factory=Dream)
    solve: str = "patch"
    ridge: float | None = None
    prior: float | None = None
    renorm: bool = True
    attach_norms: bool = True
    sequential: bool | None = None
    budget: int = 512 * 2**20
    memory: int = ROOM
    positions: int = 20_000

    def __post_init__(self) -> None:
        if self.solve not in ("mix", "patch"):
            raise InputError(f"LeastSquares(solve={self.solve!r}): choose 'mix' or 'patch'")
        check_number("LeastSquares(ridge={})", self.ridge, least=0, optional=True)
        check_number("LeastSquares(prior={})", self.prior, least=0, most=1, optional=True)
        check_switch("LeastSquares(renorm={})", self.renorm)
        check_switch("LeastSquares(sequential={})", self.sequential, optional=True)
        check_number("LeastSquares(budget={})", self.budget, least=0, unit="bytes")
        check_number("LeastSquares(memory={})", self.memory, least=1, unit="byte")
        check_number("LeastSquares(positions={})", self.positions, whole=True, least=1)
        if self.sequential and isinstance(self.moments, ClosedFormSource):
            name = type(self.moments).__name__
            raise InputError(
                f"LeastSquares(sequential=True): {name} has no probes; choose Noise, Photographs, Dream or Data"
            )
        if isinstance(self.moments, type):
            name = self.moments.__name__
            raise InputError(f"LeastSquares(moments={name}) is a class; pass an object, {name}()")
        if not isinstance(self.moments, ProbeSource | ClosedFormSource):
            raise InputError(
                f"LeastSquares(moments=...) is a {type(self.moments).__name__}: "
                "choose Weights, Gaussian, Noise, Photographs, Dream or Data"
            )

    def for_lifelike_probes(self, texts: bool) -> Settings:
        """The settings for probes that are like real inputs: without a prior, unless the user chose one.

        ``texts`` says whether inputs are tokens.
        """
        kind = _ForTexts if texts else Settings
        known = {each.name: getattr(self, each.name) for each in fields(Settings)}
        return kind(**{**known, "prior": 0.0 if self.prior is None else self.prior})

    def strength(self, steadied: bool, unknowns: float = 0.0) -> float:
        """The relative ridge; ``steadied`` says whether a prior is mixed in.

        ``unknowns`` is the number of regressors for each sample. Only the ridge for texts depends on it: positions in
        an image are so alike that their number says little.
        """
        if self.ridge is not None:
            return self.ridge
        if isinstance(self.moments, ClosedFormSource):
            return 0.1
        if isinstance(self.moments, ClassDream) and not steadied:
            return 3e-3  # half of these probes are noise, which moves every channel, so little has to be held back
        return 1e-3 if steadied else 0.3


class _ForTexts(Settings):
    """Settings for texts. Each token is a sample, so that there usually are many, and the ridge is smaller."""

    def strength(self, steadied: bool, unknowns: float = 0.0) -> float:
        """The relative ridge, as in :class:`Settings`; the fewer tokens, the closer a layer stays to plain pruning."""
        if self.ridge is None and not steadied:
            return 0.03 * (1 + unknowns)
        return super().strength(steadied, unknowns)
