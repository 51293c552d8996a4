"""One row a group: what was cut and what it cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One pruned group.

    ``re``, ``be`` and ``ae`` are the paper's residual, batch-norm and activation errors, means over the
    dropped channels (None where the weights-only form does not apply). ``errors`` are relative errors of the
    consumers' outputs on the moments that were solved with: after plain pruning, after restoration.
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
