"""The data of a report: a row for each group, and the totals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lbyl.runtime.bench import Timing
from lbyl.runtime.forecast import Forecast
from lbyl.runtime.output_error import Assessment


@dataclass(frozen=True)
class Row:
    """One pruned group.

    ``re``, ``be`` and ``ae`` are the paper's residual, batch-norm and activation errors, as means over the dropped
    channels; None if the weights-only form does not apply. ``errors`` are relative errors of the consumers' outputs
    after plain pruning and after restoration, on the moments that restoration solved with. They describe single solves,
    and not the loss of the network, because later layers compensate for much of it.
    """

    group: str
    before: int
    after: int
    re: float | None
    be: float | None
    ae: float | None
    seconds: float
    note: str = ""
    errors: tuple[float, float] | None = None


@dataclass(frozen=True)
class Dropped:
    """One dropped block.

    ``alone`` is the effect on the network's outputs when this block alone is skipped, ``together`` that of this block
    and all that were chosen before it, both before restoration. The note says what makes up for it.
    """

    block: str
    alone: float
    together: float
    note: str = ""


@dataclass(frozen=True)
class Evaluation:
    """The results of the user's own function, called ``name``, for the network before and after compression."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class ReportData:
    """The fields of :class:`lbyl.Report`, whose documentation explains them."""

    rows: tuple[Row, ...]
    left: tuple[tuple[str, str], ...]
    barriers: tuple[str, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    verified: float | None
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()
    assessment: Assessment | None = None
    latency: Timing | None = None
    held_out_errors: Mapping[str, float] = field(default_factory=dict)
    forecast: Forecast | None = None
    evaluation: Evaluation | None = None
    blocks: tuple[Dropped, ...] = ()

    @property
    def probed(self) -> bool:
        """Whether errors of the consumers were measured on probes."""
        return any(row.errors for row in self.rows)

    @property
    def has_terms(self) -> bool:
        """Whether there are the paper's errors (RE, BE, AE)."""
        return any(value is not None for row in self.rows for value in (row.re, row.be, row.ae))
