"""The two-point step: how a loss changes along K random directions, and one move along each."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import distributed

from hybrid_lora_plugin.training.zeroth_order.weights import Move, PerturbedWeights


@dataclass(frozen=True)
class TwoPointStep:
    """What came of one step.

    Attributes:
        moves: that were made, in their order.
        losses: (f(w + εz), f(w − εz)) of each of the K directions.
        skipped: directions whose slope was no number; nothing moved along them.
        seconds: of the whole step on this rank.
    """

    moves: tuple[Move, ...]
    losses: tuple[tuple[float, float], ...]
    skipped: int
    seconds: float

    @property
    def mean_slope(self) -> float:
        """Mean of c over the directions that moved, loss per unit of weight; 0 without one."""
        return statistics.fmean(move.slope for move in self.moves) if self.moves else 0.0

    @property
    def slope_rms(self) -> float:
        """Root mean square of c over the directions that moved: about the norm of the gradient; 0 without one."""
        return math.sqrt(statistics.fmean(move.slope**2 for move in self.moves)) if self.moves else 0.0


def direction_seed(seed: int, step: int, direction: int) -> int:
    """Seed of one direction, below 2**48, by the seed of the run, the step and the number of the direction."""
    digest = hashlib.sha256(f"zeroth order/{seed}/{step}/{direction}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def two_point_step(
    weights: PerturbedWeights,
    measure: Callable[[], float],
    *,
    seed: int,
    step: int,
    rate: float,
    directions: int = 1,
) -> TwoPointStep:
    """Measure K slopes at the same weights and take the mean of K moves.

    The mean of ``c · z`` over all z is the gradient, but for terms in ε². Its variance is that of one direction by K,
    so a rate means the same at every K.

    Args:
        weights: what moves; ``weights.epsilon`` is ε. The model holds the moved weights when this returns, and those
            from before where ``measure`` raises.
        measure: the loss f of the model as it is, mean over the data of all ranks, and the same number on every rank
            (``mean_over_ranks``); on the same data each time, without dropout. It is called 2·K times without autograd
            and leaves no weight gathered.
        seed: of the run.
        step: optimizer step, a part of each direction's seed.
        rate: learning rate of the frozen weights.
        directions: K.
    """
    begun, moves, losses = time.perf_counter(), [], []
    try:
        with torch.no_grad():
            for number in range(directions):
                z = direction_seed(seed, step, number)
                pair = []
                for sign in (1, -1):
                    weights.perturb(z, sign)
                    pair.append(float(measure()))
                losses.append((pair[0], pair[1]))
                move = Move(step, z, (pair[0] - pair[1]) / (2 * weights.epsilon), rate / directions)
                if math.isfinite(move.slope) and math.isfinite(move.length):
                    moves.append(move)
        weights.move(moves)
    finally:
        weights.restore()
    return TwoPointStep(tuple(moves), tuple(losses), directions - len(moves), time.perf_counter() - begun)


def mean_over_ranks(
    total: float,
    weight: float,
    device: torch.device | str = "cpu",
    group: distributed.ProcessGroup | None = None,
) -> float:
    """``Σ total / Σ weight`` over all ranks, the same bits on each: added up in the order of the ranks.

    Args:
        total: sum of the losses of this rank's data.
        weight: what they count: rows, or tokens.
        device: that the ranks' collectives need.
        group: of the ranks; the default group, or this process alone where there is none.
    """
    own = torch.tensor([total, weight], dtype=torch.float64, device=device)
    parts = [own]
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1:
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(parts, own, group=group)
    pairs = [part.tolist() for part in parts]
    counted = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / counted if counted else math.nan
