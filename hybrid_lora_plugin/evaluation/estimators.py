"""What a run is worth, from the right and wrong responses to each problem, and how far chance reaches.

A benchmark has P problems with n = k · r responses each: r repeats of k. A problem's value in one repeat is whether any
of its k responses is right (the paper's §4.2), and its value is the mean over the repeats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: quantile of the normal distribution for an interval of 95 %
Z = 1.959963984540054
#: discordant problems, all in one direction, from which an exact two-sided test goes below 5 %: 2 · 0.5^6 = 0.03
FEWEST = 6


def any_of_k(correct: Sequence[bool], k: int) -> list[bool]:
    """Whether any of k responses is right, for each repeat.

    Args:
        correct: [n] of one problem; the first k are the first repeat.
        k: responses of a repeat.

    Raises:
        ValueError: n is no multiple of k.
    """
    if k < 1 or not correct or len(correct) % k:
        raise ValueError(f"{len(correct)} responses are no whole number of repeats of {k}")
    return [any(correct[start : start + k]) for start in range(0, len(correct), k)]


def unbiased_pass_at_k(responses: int, correct: int, k: int) -> float:
    """Chance that k of a problem's responses, drawn without replacement, hold a right one: ``1 - C(n-c, k) / C(n, k)``.

    Its mean over draws of the responses is pass@k whatever n is, where any-of-k needs n = k (Chen et al. 2021,
    arXiv 2107.03374).

    Args:
        responses: n ≥ k.
        correct: c of them.
        k: how many may be tried.
    """
    if not 0 <= correct <= responses or not 1 <= k <= responses:
        raise ValueError(f"{correct} of {responses} right, k = {k}")
    # Whole numbers until the one division: exact where products of floats drift.
    return 1 - math.comb(responses - correct, k) / math.comb(responses, k)


def effective_problems(values: Sequence[float], repeats: int) -> float:
    """How many right-or-wrong problems tell as much of the mean as these values do.

    It is p(1-p) over the variance between problems, times P: P itself for one repeat, more where repeats have averaged
    part of the chance of sampling away, and never more than P times the repeats. A problem that is never solved and one
    that always is are thought beside the others, so that a few values that happen to be near each other claim less.

    Args:
        values: [P] in [0, 1], the mean over the repeats for each problem.
        repeats: r.
    """
    count = len(values) + 2
    mean = (math.fsum(values) + 1) / count
    variance = (math.fsum((value - mean) ** 2 for value in values) + mean**2 + (1 - mean) ** 2) / count
    return len(values) * min(mean * (1 - mean) / variance, repeats)


def wilson_interval(mean: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; at 0 and at 1, and for 30 problems, it still means something.

    Args:
        mean: in [0, 1].
        trials: that it is of, n > 0; need not be whole.
    """
    square = Z * Z / trials
    centre = (mean + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(mean * (1 - mean) / trials + square / (4 * trials))
    # The formula gives these ends exactly; rounding would leave them by 1e-17.
    low = 0.0 if mean == 0 else max(0.0, centre - half)
    return low, 1.0 if mean == 1 else min(1.0, centre + half)


def interval(values: Sequence[float], repeats: int) -> tuple[float, float]:
    """95 % interval of the mean over problems of this kind: ``wilson_interval`` of the effective number of problems.

    It covers the chance of the problems and that of sampling. Arguments as of ``effective_problems``.
    """
    return wilson_interval(math.fsum(values) / len(values), effective_problems(values, repeats))


def distinguishable(values: Sequence[float], repeats: int) -> float:
    """Least difference to another run, whose results per problem nobody has, that is larger than chance gives.

    ``1.96 · √(2 p (1-p) / n)``, the half width of the interval of a difference of two such shares; p is moved off 0
    and 1 by half a problem. Arguments as of ``effective_problems``.
    """
    trials = effective_problems(values, repeats)
    mean = (math.fsum(values) + 0.5) / (len(values) + 1)
    return Z * math.sqrt(2 * mean * (1 - mean) / trials)
