"""The predicted damage in plain words."""

from __future__ import annotations

from dataclasses import dataclass

from lbyl.io.report.format import percent
from lbyl.runtime.output_error import DESTROYED, Assessment

SLIGHT, STRONG = 0.1, 0.5
"""An output error up to the first is called slight, one above the second strong."""


@dataclass(frozen=True)
class Verdict:
    """A tone ("good", "fair", "bad" or "none"), a headline, and the details."""

    tone: str
    headline: str
    detail: str


def verdict(assessment: Assessment | None) -> Verdict:
    """The assessment in words, with the caution that it is not an accuracy.

    >>> verdict(Assessment(pruned=0.4, restored=0.05)).headline
    'The outputs are nearly what they were.'
    """
    if assessment is None:
        return Verdict(
            "none",
            "Damage was not predicted.",
            "These settings look at weights alone, not at outputs. Evaluate the network on your own data.",
        )
    pruned, restored = assessment.pruned, assessment.restored
    detail = f"Error of the outputs on held-out probes: {percent(restored)}; {percent(pruned)} without restoration."
    caution = " This is no accuracy: evaluate the network on your own data."
    if not restored <= DESTROYED:  # NaN included
        advice = " Prune less, or give real inputs (lbyl.Data)."
        return Verdict("bad", "The network is likely destroyed.", detail + advice)
    if restored > STRONG:
        return Verdict("bad", "The outputs are changed strongly.", detail + caution)
    if restored > SLIGHT:
        return Verdict("fair", "The outputs are changed.", detail + caution)
    return Verdict("good", "The outputs are nearly what they were.", detail + caution)
