"""Forecasts how well a smaller network agrees with the original on real inputs, from held-out probes.

A forecast maps measurements on probes to real inputs. The constants of this map were fitted on networks for which real
inputs are available:

    python benchmarks/forecast.py --data DIR --fit
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lbyl.runtime.sentinels import meaningful

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
    """A forecast of how well the smaller network agrees with the original on real inputs.

    Attributes:
        measure: what is forecast: "agreement" (of classifiers), "positions" (agreement of dense outputs), "perplexity"
            (of language models), "cosine" (of embeddings), "error" (of other outputs), or "unknown".
        agreement: share of inputs, or of positions, at which both networks have the same top class; None for other
            measures.
        perplexity: ratio of the smaller network's perplexity to the original's; None for other measures.
        cosine: cosine between both networks' outputs; None for other measures.
        error: relative error of the outputs up to a common factor; None for other measures.
        low: lower end of the 90% interval of the measure.
        high: upper end of the 90% interval.
        inputs: number of inputs that the forecast is based on.
        real: whether these were real inputs from the user.
        why: the reason if no forecast is possible, else "".
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
        """The forecast value of the measure; None if no forecast is possible."""
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
        """The expected loss of accuracy of a classifier: below 1 - agreement, since some changed answers were wrong."""
        return None if self.measure != AGREEMENT or self.agreement is None else _LOST * (1 - self.agreement)


@dataclass(frozen=True)
class Map:
    """The map from probes of one kind to real inputs, as fitted by ``benchmarks/forecast.py``.

    ``logit(real agreement) = shift + error * mean(clearness(error)) + agreement * logit(agreement on probes)``

    The mean is over the batches of probes.

    Attributes:
        shift: the constant term.
        error: coefficient of the :func:`clearness` of the scores' errors on probes.
        agreement: coefficient of the logit of the agreement on probes.
        spread: standard deviation of the residual, in logits.
    """

    shift: float
    error: float
    agreement: float
    spread: float

    def logit(self, errors: Sequence[float], share: float | None, count: int) -> float:
        """The forecast logit of the agreement on real inputs; without a share on probes, from the errors alone."""
        told = 0.0 if share is None else self.agreement * logit(share, count)
        return self.shift + self.error * fmean(map(clearness, errors)) + told


MAPS = {
    "dreamed": Map(1.49, 1.26, 0.19, 0.77),
    "photographs": Map(1.55, 0.77, 0.2, 1.68),
    "sure": Map(1.49, 1.29, 0.02, 1.02),
}
"""The maps by kind of probes."""
UNSURE = Map(1.3, 1.1, 0.0, 1.3)
"""The map if only the errors of the scores are informative: more cautious than that for dreams, and less certain."""
_LOST = 0.65
"""The share of changed answers that were right before."""
_GROWTH, _GROWTH_SPREAD = 1.0, 0.4
"""Ratio of the relative error on real inputs to the largest one on probes, and the deviation of its logarithm."""
NINE_IN_TEN = 1.645
"""Half the width of the 90% interval of a normal distribution, in standard deviations."""


def same_answers(
    reference: Float[Tensor, "inputs classes ..."], found: Float[Tensor, "inputs classes ..."]
) -> Bool[Tensor, "inputs ..."]:
    """Whether both networks give the highest score to the same class, for each input and position."""
    return reference.argmax(1) == found.argmax(1)


def scores_error(reference: Float[Tensor, "inputs classes ..."], found: Float[Tensor, "inputs classes ..."]) -> float:
    """``min_a |a f'(x) - f(x)| / |f(x) - E f|``: the error of a classifier's scores, relative to their variation.

    The mean over classes is subtracted first, and a common factor ``a`` is free, because neither changes an answer.
    Unlike in :func:`~lbyl.runtime.output_error.outputs_error`, a shift of single classes' scores counts as an error,
    because it changes answers.
    """
    here = meaningful(reference)
    count = here.sum(1, keepdim=True).clamp_min(1)
    scores = (torch.where(here, t, 0).double() for t in (reference, found))  # masked classes are no answers
    f, g = (torch.where(here, t - t.sum(1, keepdim=True) / count, 0) for t in scores)
    factor = float((f * g).sum()) / max(float(g.square().sum()), 1e-30)
    axes = [axis for axis in range(f.dim()) if axis != 1]
    own = float((f - f.mean(axes, keepdim=True)).square().sum())
    return math.sqrt(float((max(0.0, factor) * g - f).square().sum()) / max(own, 1e-30))


def clearness(error: float) -> float:
    """``log(sqrt(1 - e^2) / e)``, the log ratio of signal and error in scores of relative error e; it is bounded."""
    return 0.5 * math.log(max(1 - error**2, _LEAST_LEFT)) - math.log(max(error, _SMALLEST_ERROR))


def logit(share: float, count: int) -> float:
    """The logit of a share of ``count`` inputs, which is finite even for shares of 0 and 1."""
    return math.log((share * count + 0.5) / ((1 - share) * count + 0.5))


_SMALLEST_ERROR, _LEAST_LEFT = 0.01, 0.05


def foretell_agreement(
    share: float | None, errors: Sequence[float], count: int, chosen: Map, *, measure: str = AGREEMENT
) -> Forecast:
    """Forecast the agreement on real inputs from both networks' scores on probes.

    Args:
        share: agreement on the probes; None if it is not informative.
        errors: error of the scores on each batch of probes, from :func:`scores_error`.
        count: number of probes that ``share`` is taken over.
        chosen: the map for this kind of probes, one of ``MAPS``, or ``UNSURE``.
        measure: "agreement" or "positions".
    """
    middle = chosen.logit(errors, share, count)
    # The sampling error of a share of few inputs: its variance, converted to logits.
    even = (share * count + 0.5) / (count + 1) if share is not None else 0.5
    spread = math.sqrt(chosen.spread**2 + chosen.agreement**2 / (count * even * (1 - even)))
    low, value, high = (_share(middle + sign * NINE_IN_TEN * spread) for sign in (-1, 0, 1))
    return Forecast(measure, agreement=value, low=low, high=high, inputs=count)


def with_real_answers(forecast: Forecast, share: float, count: int, *, measure: str = AGREEMENT) -> Forecast:
    """Combine a forecast from probes with the agreement on held-out real inputs.

    The forecast counts as a number of inputs: as many as would give an interval of the same width. The result has
    Wilson's interval for the sum of both.

    Args:
        forecast: the forecast from probes; its measure is "unknown" if there is none.
        share: agreement on the real inputs.
        count: number of real inputs.
        measure: "agreement" or "positions".
    """
    z, believed, prior = NINE_IN_TEN, 0.0, 0.0
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
    """Forecast the relative error on real inputs from the errors on several kinds of probes.

    Args:
        errors: relative error of the outputs for each kind.
        count: number of probes of each kind.
        real: whether the probes are real inputs themselves.
    """
    value = min(1.0, max(errors) * (1.0 if real else _GROWTH))
    factor = math.exp(NINE_IN_TEN * (count**-0.5 if real else _GROWTH_SPREAD))
    low, high = value / factor, min(1.0, value * factor)
    return Forecast(ERROR, error=value, low=low, high=high, inputs=count, real=real)


def foretell_cosine(errors: list[float], count: int, *, real: bool = False) -> Forecast:
    """Forecast the cosine of embeddings, sqrt(1 - r^2), from errors r as in :func:`foretell_error`."""
    error = foretell_error(errors, count, real=real)
    assert error.error is not None
    assert error.low is not None
    assert error.high is not None
    low, value, high = (math.sqrt(max(0.0, 1 - each**2)) for each in (error.high, error.error, error.low))
    return Forecast(COSINE, cosine=value, low=low, high=high, inputs=count, real=real)


def foretell_perplexity(before: Float[Tensor, " texts"], after: Float[Tensor, " texts"]) -> Forecast:
    """Forecast the ratio of perplexities from the mean loss of each held-out text in both networks, in nats."""
    change = (after - before).double()
    middle = float(change.mean())
    error = float(change.std()) / math.sqrt(len(change)) if len(change) > 1 else abs(middle)
    half = NINE_IN_TEN * math.sqrt(error**2 + (_PERPLEXITY_SPREAD * middle) ** 2)
    low, value, high = (math.exp(each) for each in (middle - half, middle, middle + half))
    return Forecast(PERPLEXITY, perplexity=value, low=low, high=high, inputs=len(change))


_PERPLEXITY_SPREAD = 0.5
"""Relative standard deviation of the logarithm of that ratio between generated and real text."""


def _share(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
