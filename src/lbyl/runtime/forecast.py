"""What a smaller network keeps of the original's answers at real inputs, foretold from probes that no solve saw.

The map from probes to real inputs has a few constants, fitted on networks whose real inputs are known:

    python benchmarks/forecast.py --data DIR --fit
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

AGREEMENT, POSITIONS, PERPLEXITY, COSINE, ERROR, UNKNOWN = (
    "agreement",
    "positions",
    "perplexity",
    "cosine",
    "error",
    "unknown",
)


@dataclass(frozen=True)
class Forecast:
    """What the smaller network is expected to keep at real inputs.

    Attributes:
        measure: what is foretold: "agreement" (of classifiers), "positions" (agreement of dense outputs), "perplexity"
            (of language models), "cosine" (of embeddings), "error" (of other outputs), or "unknown".
        agreement: share of inputs, or of positions, at which the first answer is the original's; None for other
            measures.
        perplexity: of the smaller network over the original's.
        cosine: between both networks' outputs.
        error: relative error of the outputs, a common factor left free.
        low: with ``high``, the bounds that the measure stays within nine times in ten.
        high: the upper bound.
        inputs: how many inputs it was read off.
        real: whether these were real inputs of the user's.
        why: where nothing can be said, why not.
    """

    measure: str = UNKNOWN
    agreement: float | None = None
    perplexity: float | None = None
    cosine: float | None = None
    error: float | None = None
    low: float | None = None
    high: float | None = None
    inputs: int = 0
    real: bool = False
    why: str = ""

    @property
    def value(self) -> float | None:
        """The measure's value; None where nothing can be said."""
        return {
            AGREEMENT: self.agreement,
            POSITIONS: self.agreement,
            PERPLEXITY: self.perplexity,
            COSINE: self.cosine,
            ERROR: self.error,
        }.get(self.measure)

    @property
    def kept(self) -> float | None:
        """What stays, as one share for all measures: what ``Budget(agreement=...)`` bounds.

        The agreement of classifiers and dense outputs; the cosine of embeddings; of language models the (geometric)
        mean share of the probability that each token had, which is 1 over the ratio of perplexities; of other outputs
        the share of their variance, ``1 - error^2``. None where nothing can be said.
        """
        value = self.value
        if value is None or self.measure in (AGREEMENT, POSITIONS, COSINE):
            return value
        return min(1.0, 1 / max(value, 1e-12)) if self.measure == PERPLEXITY else max(0.0, 1 - value**2)

    @property
    def loss(self) -> float | None:
        """The share of right answers that a classifier is expected to lose: of those that change, some were wrong."""
        return None if self.measure != AGREEMENT or self.agreement is None else _LOST * (1 - self.agreement)


@dataclass(frozen=True)
class Map:
    """From probes of a kind to real inputs, as ``benchmarks/forecast.py`` found it.

    Attributes:
        shift: logit of the agreement at real inputs where probes agree by half and half of the scores' power is left.
        error: slope of that logit on what is left of the scores over their error on probes, by :func:`clearness`.
        agreement: slope of it on the logit of the agreement on probes.
        spread: deviation of what is left over, in logits.
    """

    shift: float
    error: float
    agreement: float
    spread: float

    def logit(self, error: float, share: float | None, count: int) -> float:
        """The logit of the agreement at real inputs; without a share on probes, from the error alone."""
        told = 0.0 if share is None else self.agreement * logit(share, count)
        return self.shift + self.error * clearness(error) + told


MAPS = {
    "dreamed": Map(1.52, 1.29, 0.17, 0.78),
    "photographs": Map(1.78, 1.11, 0.15, 1.1),
    "sure": Map(1.27, 1.19, 0.08, 0.61),
}
"""By the kind of the probes."""
UNSURE = Map(1.3, 1.1, 0.0, 1.3)
"""Where only the scores tell something: with the smallest constants of the maps above and more open than any."""
_LOST = 0.65
"""The share of changed answers that were right."""
_GROWTH, _GROWTH_SPREAD = 1.0, 0.4
"""Relative error at real inputs over the largest on plain probes, and the deviation of its logarithm."""
_NINE_IN_TEN = 1.645
"""Deviations that a normal variable stays within nine times in ten."""


def same_answers(
    reference: Float[Tensor, "inputs classes ..."], found: Float[Tensor, "inputs classes ..."]
) -> Bool[Tensor, "inputs ..."]:
    """Where the first answer is the same: the class with the highest score, at each position."""
    return reference.argmax(1) == found.argmax(1)


def scores_error(reference: Float[Tensor, "inputs classes ..."], found: Float[Tensor, "inputs classes ..."]) -> float:
    """``min_a |a f'(x) - f(x)| / |f(x) - E f|``: the error of a classifier's scores, next to what tells inputs apart.

    What is the same for all classes is taken off first, for it changes no answer; so is a common factor. Unlike
    :func:`~lbyl.runtime.output_error.outputs_error`, a shift of some classes' scores counts, for it changes answers.
    """
    f, g = (t.double() - t.double().mean(1, keepdim=True) for t in (reference, found))
    factor = float((f * g).sum()) / max(float(g.square().sum()), 1e-30)
    axes = [axis for axis in range(f.dim()) if axis != 1]
    own = float((f - f.mean(axes, keepdim=True)).square().sum())
    return math.sqrt(float((max(0.0, factor) * g - f).square().sum()) / max(own, 1e-30))


def clearness(error: float) -> float:
    """The logarithm of what is left of the scores over their error: ``log(sqrt(1 - e^2) / e)``, within bounds."""
    return 0.5 * math.log(max(1 - error**2, _LEAST_LEFT)) - math.log(max(error, _SMALLEST_ERROR))


def logit(share: float, count: int) -> float:
    """The logit of a share of so many, which stays finite where it is all or none of them."""
    return math.log((share * count + 0.5) / ((1 - share) * count + 0.5))


_SMALLEST_ERROR, _LEAST_LEFT = 0.01, 0.05


def foretell_agreement(
    share: float | None, error: float, count: int, chosen: Map, *, measure: str = AGREEMENT
) -> Forecast:
    """From what both networks say to probes to the agreement at real inputs.

    Args:
        share: agreement on the probes; None where it tells nothing.
        error: of the scores there, by :func:`scores_error`.
        count: how many probes there were.
        chosen: the map for probes of their kind, one of ``MAPS``.
        measure: "agreement" or "positions".
    """
    middle = chosen.logit(error, share, count)
    # What so few inputs leave open: the variance of a share, carried over to its logit.
    even = (share * count + 0.5) / (count + 1) if share is not None else 0.5
    spread = math.sqrt(chosen.spread**2 + chosen.agreement**2 / (count * even * (1 - even)))
    low, value, high = (_share(middle + sign * _NINE_IN_TEN * spread) for sign in (-1, 0, 1))
    return Forecast(measure, agreement=value, low=low, high=high, inputs=count)


def with_real_answers(forecast: Forecast, share: float, count: int, *, measure: str = AGREEMENT) -> Forecast:
    """From real inputs that nothing was solved on, and what was foretold without them.

    A forecast counts as many inputs as would leave open what it leaves open; the interval is Wilson's.

    Args:
        forecast: what probes say; of the measure "unknown" where they say nothing.
        share: agreement on the real inputs.
        count: how many these were.
        measure: "agreement" or "positions".
    """
    z, believed, prior = _NINE_IN_TEN, 0.0, 0.0
    if forecast.agreement is not None and forecast.low is not None and forecast.high is not None:
        prior = forecast.agreement
        deviation = max((forecast.high - forecast.low) / (2 * z), 1e-3)
        believed = max(0.0, prior * (1 - prior) / deviation**2)
    total = count + believed
    share = (share * count + prior * believed) / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Forecast(measure, agreement=share, low=low, high=high, inputs=count, real=True)


def foretell_error(errors: list[float], count: int, *, real: bool = False) -> Forecast:
    """From the relative error on several kinds of probes to that at real inputs.

    Args:
        errors: relative error of the outputs, kind by kind.
        count: how many probes there are of each kind.
        real: whether they are real inputs themselves.
    """
    value = min(1.0, max(errors) * (1.0 if real else _GROWTH))
    factor = math.exp(_NINE_IN_TEN * (count**-0.5 if real else _GROWTH_SPREAD))
    low, high = value / factor, min(1.0, value * factor)
    return Forecast(ERROR, error=value, low=low, high=high, inputs=count, real=real)


def foretell_cosine(errors: list[float], count: int, *, real: bool = False) -> Forecast:
    """The same for embeddings: an error r that a common factor can't mend leaves a cosine of sqrt(1 - r^2)."""
    error = foretell_error(errors, count, real=real)
    assert error.error is not None
    assert error.low is not None
    assert error.high is not None
    low, value, high = (math.sqrt(max(0.0, 1 - each**2)) for each in (error.high, error.error, error.low))
    return Forecast(COSINE, cosine=value, low=low, high=high, inputs=count, real=real)


def foretell_perplexity(before: Float[Tensor, " texts"], after: Float[Tensor, " texts"]) -> Forecast:
    """From the mean loss of each held-out text in both networks, in nats, to the ratio of perplexities."""
    change = (after - before).double()
    middle = float(change.mean())
    error = float(change.std()) / math.sqrt(len(change)) if len(change) > 1 else abs(middle)
    half = _NINE_IN_TEN * math.sqrt(error**2 + (_PERPLEXITY_SPREAD * middle) ** 2)
    low, value, high = (math.exp(each) for each in (middle - half, middle, middle + half))
    return Forecast(PERPLEXITY, perplexity=value, low=low, high=high, inputs=len(change))


_PERPLEXITY_SPREAD = 0.5
"""How far the logarithm of the ratio may be off on real text, relative to itself."""


def _share(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
