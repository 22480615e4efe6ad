"""How far the rollout engine's policy stands from the trainer's, in units of the trainer's way from the base model.

Trainer and engine compute log-probabilities of the same tokens twice: under the base model (t0, e0) and under the
present weights (t1, e1). The trainer's way is a = t1 − t0, the engine's b = e1 − e0. Over all tokens,

    V        = Σ a²                          where the trainer computes in float32
             = Σ (t1 − e0)² − (t0 − e0)²     where it rounds what it computes, too
    slope    = Σ a·b / V                     1: the engine has gone all of the way
    KL ratio = Σ (t1 − e1)² − (t0 − e0)² / V

The ratio is KL(trainer ‖ rollout) / KL(trainer ‖ base) to second order, ½E[d²] for a difference d of log-probabilities,
on tokens of a fixed text instead of tokens drawn from the policy. Each end rounds activations in its own way, which
moves a log-probability in 16 bits by some hundredths of a nat with no update at all. What two passes of one end have
in common cancels in a and b; of two ends, it is independent, so it adds nothing to a product of a and b in the mean,
and what it adds to a square of t − e is measured at the base, where both ends hold the same weights, and taken off. A
plain Σ a² would hold the rounding of a trainer in 16 bits as well and make the slope too small.

Errors come from a jackknife over blocks of consecutive tokens: neighbours share the keys and values before them, and a
few tokens carry much of the move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: blocks of the jackknife
BLOCKS = 16
#: standard errors that a verdict has to stand away from its limit: a run ends by it, and a run has thousands of syncs
ERRORS = 4.0


@dataclass(frozen=True)
class PolicyDistance:
    """Where the engine stands; errors are standard errors."""

    #: the engine's change of log-probability by the trainer's
    slope: float
    slope_error: float
    #: KL(trainer ‖ rollout) / KL(trainer ‖ base), may come out below 0
    kl_ratio: float
    kl_ratio_error: float
    #: the trainer's change of log-probability, root of the mean square over tokens, nats
    move: float
    #: whether that is a change, and not the rounding of either end
    moved: bool

    def judged(self, limit: float) -> bool:
        """Whether a slope that is off by twice ``limit`` or more would be noticed."""
        return self.moved and ERRORS * self.slope_error <= limit

    def fault(self, limit: float) -> str:
        """In words what is beyond ``limit`` and beyond chance, "" where nothing is."""
        if not self.moved:
            return ""
        if abs(self.slope - 1) > limit + ERRORS * self.slope_error:
            return (
                f"the rollout engine's policy has gone {self.slope:.2f} ± {self.slope_error:.2f} of the trainer's way "
                "from the base model"
            )
        if self.kl_ratio > limit + ERRORS * self.kl_ratio_error:
            return (
                f"the rollout engine's policy stands {self.kl_ratio:.2f} ± {self.kl_ratio_error:.2f} of the trainer's "
                "way (by KL) from the trainer's"
            )
        return ""


def policy_distance(
    trainer_base: Sequence[float],
    trainer: Sequence[float],
    engine_base: Sequence[float],
    engine: Sequence[float],
    trainer_rounds: bool,
) -> PolicyDistance | None:
    """Compare two policies by log-probabilities of N tokens, in their order in the texts.

    Args:
        trainer_base, trainer: [N] of the base model and of the present weights, in the trainer, nats.
        engine_base, engine: [N] the same in the rollout engine.
        trainer_rounds: whether the trainer computes in 16 bits.

    Returns:
        The distance, or None where the policy has not moved or fewer than 2·BLOCKS tokens say so.

    Raises:
        ValueError: the four differ in length.
    """
    if len({len(trainer_base), len(trainer), len(engine_base), len(engine)}) != 1:
        raise ValueError("policy_distance: all four need a log-probability of every token")
    t0, t1, e0, e1 = (torch.tensor(v, dtype=torch.float64) for v in (trainer_base, trainer, engine_base, engine))
    count, floor = len(t0), (t0 - e0).square()
    moved = (t1 - e0).square() - floor if trainer_rounds else (t1 - t0).square()
    terms = torch.stack([moved, (t1 - t0) * (e1 - e0), (t1 - e1).square() - floor])
    whole = terms.sum(1)
    if count < 2 * BLOCKS or not whole[0] > 0:
        return None
    block = torch.arange(count) * BLOCKS // count
    without = whole[:, None] - torch.zeros(3, BLOCKS, dtype=torch.float64).index_add_(1, block, terms)

    def error(values: torch.Tensor) -> float:
        return math.sqrt((BLOCKS - 1) * (values - values.mean()).square().mean())

    return PolicyDistance(
        slope=(whole[1] / whole[0]).item(),
        slope_error=error(without[1] / without[0]),
        kl_ratio=(whole[2] / whole[0]).item(),
        kl_ratio_error=error(without[2] / without[0]),
        move=math.sqrt(whole[0] / count),
        # A ratio is worth its error only where what it divides by is known not to be 0.
        moved=not trainer_rounds or whole[0].item() > ERRORS * error(without[0]),
    )
