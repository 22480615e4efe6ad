"""Intervals of a mean over a few seeds, by resampling them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "not distinguished"


@dataclass(frozen=True)
class Difference:
    """Arm A minus arm B at the same starts.

    Attributes:
        mean: of the differences, in the unit of the held-out value.
        low, high: interval of ``mean``; None of a single seed, which has none.
        better: starts at which A has the better value. starts: that both have.
        seeds: that were resampled.
        level: of the interval.
        verdict: one of ``SUPPORTED`` (A is better), ``CONTRADICTED`` (B is) and ``UNDECIDED``.
    """

    mean: float
    low: float | None
    high: float | None
    better: int
    starts: int
    seeds: int
    level: float
    verdict: str


def difference(by_seed: Sequence[Sequence[float]], lower_is_better: bool, level: float, resamples: int) -> Difference:
    """Compare A with B.

    The starts of one seed stay together: whole seeds are resampled, since bases and tasks are the same ones anyhow.
    The interval is that of percentiles, moved out as far as Student's interval is wider than the normal one for that
    many seeds (the "expanded" percentiles of Hesterberg, The American Statistician 69, 2015). No resample reaches
    beyond the seeds themselves, which hold the true mean of n seeds in 1 − 2^(1 − n) of the cases only; where the
    percentiles asked for lie out there or close to it, with five seeds or fewer at 95 %, it is Student's own interval.

    Args:
        by_seed: A minus B at each start of each seed, as many for every seed.
        lower_is_better: of the value.
        level: of the interval, e.g. 0.95.
        resamples: how many.
    """
    values = np.asarray(by_seed, dtype=np.float64)
    means = values.mean(axis=1)
    mean, better = float(means.mean()), int((values < 0).sum() if lower_is_better else (values > 0).sum())
    if len(means) < 2:
        return Difference(mean, None, None, better, values.size, len(means), level, UNDECIDED)
    count, tail = len(means), expanded_tail(len(means), level)
    # Of n^n resamples one is the smallest value n times.
    if tail < 10 * count**-count:
        reach = student_quantile(0.5 + level / 2, count - 1) * float(means.std(ddof=1)) / math.sqrt(count)
        low, high = mean - reach, mean + reach
    else:
        drawn = _draws(count, resamples) @ means / count
        low, high = (float(value) for value in np.percentile(drawn, [100 * tail, 100 * (1 - tail)]))
    ahead, behind = (high < 0, low > 0) if lower_is_better else (low > 0, high < 0)
    verdict = SUPPORTED if ahead else CONTRADICTED if behind else UNDECIDED
    return Difference(mean, low, high, better, values.size, len(means), level, verdict)


@lru_cache(16)
def _draws(count: int, resamples: int) -> np.ndarray:
    """How often each of ``count`` seeds is in each resample, ``[resamples, count]``; the same for every comparison."""
    return np.random.default_rng(0).multinomial(count, [1 / count] * count, size=resamples).astype(np.float64)


@lru_cache(64)
def expanded_tail(count: int, level: float) -> float:
    """Share below the lower end of an interval of the mean of ``count`` values, by resamples of them."""
    quantile = student_quantile(0.5 + level / 2, count - 1)
    return NormalDist().cdf(-quantile * math.sqrt(count / (count - 1)))


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t for a probability above 0.5, to about 1e-9.

    Args:
        probability: in (0.5, 1).
        freedom: degrees of freedom, 1 or more.
    """
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        if _student_cdf(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return high


def _student_cdf(t: float, freedom: int) -> float:
    """Of Student's t, by the finite series of whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom % 2:
        term, total = cosine, 0.0
        for k in range(1, freedom - 1, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        within = (angle + sine * total) * 2 / math.pi
    else:
        term, total = 1.0, 0.0
        for k in range(0, freedom - 1, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        within = sine * total
    return 0.5 + within / 2
