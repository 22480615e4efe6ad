"""What held-out rows can tell apart: paired differences of losses, their intervals, and the candidate that is taken.

The interval is of the rows alone. Another order of the data or another init of the adapters may move a loss by more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hybrid_lora_plugin.allocation.schema import LossDifference

RESAMPLES, SEED = 10_000, 0


def mean_loss(sums: Sequence[float], tokens: Sequence[int]) -> float:
    """Mean over the tokens of all rows, from the sum of each row's losses ``[N]`` and its number of tokens ``[N]``."""
    return float(np.sum(np.asarray(sums, dtype=np.float64)) / np.sum(np.asarray(tokens, dtype=np.float64)))


def loss_difference(first: Sequence[float], second: Sequence[float], tokens: Sequence[int]) -> LossDifference:
    """Loss of the first minus that of the second, in nats a token, with its 95 % interval.

    N rows are drawn with replacement ``RESAMPLES`` times, each with both of its losses; percentiles of the ratio of
    sums.

    Args:
        first, second: ``[N]``, the sum over each row's tokens.
        tokens: ``[N]``, how many it has.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    weights = np.asarray(tokens, dtype=np.float64)
    count = len(weights)
    drawn = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    values = (drawn @ difference) / (drawn @ weights)
    low, high = np.percentile(values, [2.5, 97.5])
    return LossDifference(float(difference.sum() / weights.sum()), float(low), float(high))


def is_clear(difference: LossDifference) -> bool:
    """Whether the interval is on one side of 0."""
    return difference.low > 0 or difference.high < 0


def ranked(losses: Mapping[str, Sequence[float]], tokens: Sequence[int]) -> list[str]:
    """Names by their loss, the lowest first; equal losses in the order of ``losses``.

    Args:
        losses: name -> ``[N]`` sums of each row, or nothing of a candidate that diverged, which comes last.
        tokens: ``[N]``.
    """
    return sorted(losses, key=lambda name: mean_loss(losses[name], tokens) if len(losses[name]) else float("inf"))


def alike(losses: Mapping[str, Sequence[float]], tokens: Sequence[int]) -> list[str]:
    """The best of the names and those that the rows cannot tell from it, in the order of ``losses``."""
    best = ranked(losses, tokens)[0]
    return [
        name
        for name, sums in losses.items()
        if name == best or (len(sums) and not is_clear(loss_difference(sums, losses[best], tokens)))
    ]
