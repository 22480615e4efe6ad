"""Cases that take turns: a ratio of two is one of calls seconds apart, whatever else the machine does."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.sync_cost import quartiles


def take_turns(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every case in every round, from the first rank that begins to the last that ends.

    Args:
        cases: by name; the same on every rank of the process group, which calls them together.
        rounds: that count; one before them warms up. The order changes from round to round.
    """
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    order = list(cases)
    for round_ in range(rounds + 1):
        turn = (round_ * 2) % len(order)
        for case in (*order[turn:], *order[:turn])[:: -1 if round_ % 2 else 1]:
            torch.distributed.barrier()
            begun = time.perf_counter()
            cases[case]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            torch.distributed.barrier()
            if round_:  # the first one warms up
                seconds[case].append(time.perf_counter() - begun)
    return seconds


def ratio(seconds: dict[str, list[float]], case: str, base: str) -> str:
    """Quartiles of the ratios of two cases, round by round."""
    return quartiles([a / b for a, b in zip(seconds[case], seconds[base], strict=True)])
