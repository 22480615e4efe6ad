"""Whether two runs on the same problems differ: by how much, in which interval, and how likely by chance alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from hybrid_lora_plugin.evaluation.estimators import FEWEST

RESAMPLES = 10_000
LEVEL = 0.05


@dataclass(frozen=True)
class PairedDifference:
    """Run B minus run A on P problems.

    Attributes:
        problems: P.
        mean: of the differences, in [-1, 1].
        low, high: 95 % interval of ``mean``, by a bootstrap over problems that keeps each problem's pair together.
        better, worse: problems on which B has the higher or the lower value.
        p: of the exact two-sided test that each problem's difference may as well have the other sign. For one repeat
            it is McNemar's exact test, the sign test of the discordant problems.
        needed: least mean, with as many and as large differences as there are, that the test would call a difference;
            None where none would be, since too few problems differ.
    """

    problems: int
    mean: float
    low: float
    high: float
    better: int
    worse: int
    p: float
    needed: float | None


def paired_difference(first: Sequence[Fraction], second: Sequence[Fraction], seed: int = 0) -> PairedDifference:
    """Compare two runs.

    Args:
        first, second: [P] values of A and of B, of the same problems in the same order.
        seed: of the bootstrap.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} values")
    differences = [b - a for a, b in zip(first, second, strict=True)]
    count, total = len(differences), sum(differences, Fraction(0))
    low, high = bootstrap(differences, seed)
    unit = _unit(differences)
    sums = sign_flip_distribution([abs(int(value / unit)) for value in differences])
    reached = int(abs(total) / unit)
    tail = np.cumsum(sums[::-1])[::-1]
    # Both tails; the sum of zero is in both.
    two_sided = np.minimum(1.0, 2 * tail[len(sums) // 2 :])
    significant = np.flatnonzero(two_sided < LEVEL)
    # A sum that cannot be reached is no difference that anybody could see.
    possible = [int(value) for value in significant if sums[len(sums) // 2 + value] > 0]
    return PairedDifference(
        problems=count,
        mean=float(total / count),
        low=low,
        high=high,
        better=sum(value > 0 for value in differences),
        worse=sum(value < 0 for value in differences),
        p=float(two_sided[reached]),
        needed=float(possible[0] * unit / count) if possible else None,
    )


def bootstrap(differences: Sequence[Fraction], seed: int) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the mean over ``RESAMPLES`` draws of P problems with replacement."""
    values, counts = np.unique([float(value) for value in differences], return_counts=True)
    total = counts.sum()
    # Problems with the same difference are alike, so that their numbers are drawn in place of themselves.
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=RESAMPLES)
    low, high = np.percentile(drawn @ values / total, [2.5, 97.5])
    return float(low), float(high)


def sign_flip_distribution(sizes: Sequence[int]) -> np.ndarray:
    """Chances of each sum of whole numbers whose signs are drawn, exact but for rounding.

    Args:
        sizes: the numbers without their signs.

    Returns:
        float64 [2 S + 1], of the sums -S to S, where S is the sum of ``sizes``.
    """
    chances = np.ones(1)
    for size in sizes:
        if size:
            wider = np.zeros(len(chances) + 2 * size)
            wider[: len(chances)] += 0.5 * chances
            wider[2 * size :] += 0.5 * chances
            chances = wider
    return chances


def _unit(differences: Sequence[Fraction]) -> Fraction:
    """A fraction of which all differences are whole multiples."""
    return Fraction(1, math.lcm(*(value.denominator for value in differences)))


def holm(chances: Sequence[float]) -> list[float]:
    """The p of each of several tests, raised so that one in twenty families has a false difference, not one in twenty
    tests (Holm 1979)."""
    order = sorted(range(len(chances)), key=lambda index: chances[index])
    adjusted, highest = [0.0] * len(chances), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[index]))
        adjusted[index] = highest
    return adjusted


def verdict(difference: PairedDifference, p: float, first: str, second: str) -> str:
    """In words, what the comparison shows.

    Args:
        difference: B minus A.
        p: of the test, raised for the number of benchmarks.
        first, second: what A and B are called.
    """
    if not difference.better and not difference.worse:
        return "the same on every problem"
    points = 100 * abs(difference.mean)
    if p < LEVEL:
        return f"{second if difference.mean > 0 else first} is better by {points:.1f} points"
    if difference.needed is None:
        differing = difference.better + difference.worse
        return f"not distinguished: {differing} problems differ, and fewer than {FEWEST} can show nothing"
    said = f"not distinguished: {points:.1f} points, and {100 * difference.needed:.1f} would have been needed"
    return said + (", more for several benchmarks at once" if difference.p < LEVEL else "")
