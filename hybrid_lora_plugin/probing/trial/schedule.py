"""The rounds of a trial, and what they cost, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: of a trained entry: float32 and both of AdamW's moments
STATE_BYTES = 12


@dataclass(frozen=True)
class Round:
    """One round of successive halving.

    Attributes:
        steps: that each candidate has taken when it ends, those of earlier rounds included.
        candidates: how many take part.
    """

    steps: int
    candidates: int


def rounds_of(candidates: int, steps: int, rounds: int, keep: float) -> list[Round]:
    """The rounds of a trial of ``candidates``.

    The number of steps grows by 1 / ``keep`` as the number of candidates falls, so that rounds cost about the same. Two
    candidates at least stay, so that the last round compares. One candidate alone needs no round.
    """
    if candidates < 2:
        return []
    found = []
    for number in range(rounds):
        found.append(Round(round(steps / keep**number), candidates))
        candidates = max(2, min(candidates - 1, math.ceil(round(candidates * keep, 9))))
    return found


@dataclass(frozen=True)
class Cost:
    """What a trial takes.

    Attributes:
        steps: optimizer steps of all candidates and the control.
        evaluations: passes forward over all held-out rows.
        loads: how often a model is made.
        kept: states on disk at a time, at most.
    """

    steps: int
    evaluations: int
    loads: int
    kept: int


def cost_of(rounds: Sequence[Round], control: bool, continues: bool) -> Cost:
    """The cost of these rounds.

    Args:
        rounds: of the trial.
        control: whether LoRA is trained beside the candidates, in every round.
        continues: whether survivors go on from their state, and not from the start.
    """
    steps, before = 0, 0
    for one in rounds:
        steps += (one.candidates + control) * (one.steps - (before if continues else 0))
        before = one.steps
    runs = sum(one.candidates + control for one in rounds)
    # Of a round the best so far, as many as may stay, and the one that is being trained.
    kept = max((following.candidates for following in rounds[1:]), default=0) + 1 + control
    # The loss before the first step is measured once, on the first candidate.
    return Cost(steps, runs + bool(runs), runs, kept if continues else 1)
