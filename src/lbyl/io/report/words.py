"""Puts the forecast and the user's own measurement into words, which every form of the report starts with."""

from __future__ import annotations

from dataclasses import dataclass

from lbyl.io.report.rows import Evaluation
from lbyl.runtime.forecast import AGREEMENT, COSINE, PERPLEXITY, POSITIONS, Forecast

NOT_KNOWN = "What was lost is not known"
_GOOD, _FAIR = 0.95, 0.8
"""Smallest agreement or cosine that counts as good, and as fair."""
_SMALL, _LARGE = 0.1, 0.3
"""Largest error, or relative increase of perplexity, that counts as good, and as fair."""


@dataclass(frozen=True)
class Words:
    """A tone ("good", "fair", "bad" or "none"), a headline, and the details."""

    tone: str
    headline: str
    detail: str

    @property
    def text(self) -> str:
        """Headline and details as one line."""
        return f"{self.headline} {self.detail}".strip()


def expectation(forecast: Forecast | None) -> Words:
    """The forecast for real inputs, in words.

    >>> expectation(Forecast("agreement", agreement=0.94, low=0.91, high=0.96, inputs=96)).headline
    'Expected to give the same answer for about 94 of 100 inputs (91 to 96).'
    >>> expectation(None).headline
    'What was lost is not known.'
    """
    value = None if forecast is None else forecast.value
    if forecast is None or value is None or forecast.low is None or forecast.high is None:
        why = forecast.why if forecast else ""
        headline = f"{NOT_KNOWN}: {why}." if why else f"{NOT_KNOWN}."
        return Words("none", headline, "Evaluate the network on your own data.")
    low, high = forecast.low, forecast.high
    if forecast.measure in (AGREEMENT, POSITIONS):
        where = "for about {} of 100 inputs" if forecast.measure == AGREEMENT else "at about {} of 100 positions"
        told = f"the same answer {where.format(_hundredths(value))} ({_hundredths(low)} to {_hundredths(high)})"
        return Words(_tone(value, _GOOD, _FAIR), f"Expected to give {told}.", _source(forecast))
    if forecast.measure == PERPLEXITY:
        told = f"about {value:.2f} times the original's ({low:.2f} to {high:.2f})"
        return Words(_tone(-value, -1 - _SMALL, -1 - _LARGE), f"Expected perplexity: {told}.", _source(forecast))
    if forecast.measure == COSINE:
        told = f"about {value:.2f} ({low:.2f} to {high:.2f})"
        headline = f"Expected cosine between its outputs and the original's: {told}."
        return Words(_tone(value, _GOOD, _FAIR), headline, _source(forecast))
    told = f"about {value:.0%} ({low:.0%} to {high:.0%})"
    return Words(_tone(-value, -_SMALL, -_LARGE), f"Expected relative error of the outputs: {told}.", _source(forecast))


def evaluation(found: Evaluation | None) -> str:
    """The user's own measurement before and after, in words; "" if there is none.

    >>> evaluation(Evaluation("judge.py:accuracy", 0.931, 0.912))
    'Measured by judge.py:accuracy: 0.931 before, 0.912 after.'
    """
    return "" if found is None else f"Measured by {found.name}: {found.before:.4g} before, {found.after:.4g} after."


def _tone(value: float, good: float, fair: float) -> str:
    return "good" if value >= good else "fair" if value >= fair else "bad"


def _hundredths(share: float) -> str:
    """A share in hundredths, as text; "100" and "0" only if they are exact.

    >>> _hundredths(0.94), _hundredths(0.997), _hundredths(1.0)
    ('94', 'more than 99', '100')
    """
    if 0.995 <= share < 1:
        return "more than 99"
    return "less than 1" if 0 < share < 0.005 else f"{100 * share:.0f}"


def _source(forecast: Forecast) -> str:
    if forecast.real:
        return f"Measured on {forecast.inputs} of your inputs that were not used for restoration."
    return (
        f"This is a forecast from {forecast.inputs} probes that were not used for restoration, with a 90% interval in "
        "parentheses. Evaluate the network on your own data to be sure."
    )
