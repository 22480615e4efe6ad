"""The order in which a criterion prefers modules for full fine-tuning: who has a score, ranks, and the cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_lora_plugin.allocation.budget import FULL
from hybrid_lora_plugin.allocation.budget_modes import budget_mode
from hybrid_lora_plugin.allocation.schema import Allocation, ModuleRecord
from hybrid_lora_plugin.candidates import tie_break

#: Below this many modules a rank correlation says nothing.
FEWEST_FOR_RANKS = 3


def chosen_by_rule(allocation: Allocation) -> bool:
    """Whether a rule or a list chose the modules, so that what stands in ``score`` rates none of them."""
    # These are held to the budget, but the scores of `spread` are only places in an even order over the depth, and
    # those of `trial` say which modules the best candidate has.
    return not budget_mode(allocation.budget.mode).limits or allocation.selection.criterion in ("spread", "trial")


def by_preference(allocation: Allocation) -> list[ModuleRecord]:
    """The modules with a signal, most preferred for full fine-tuning first, ties broken as ``allocate`` does.

    Empty for an allocation without scores: chosen by rule, or no two modules that differ in score.
    """
    sign = 1 if allocation.selection.direction == "lowest" else -1
    modules = [module for module in allocation.modules if module.signal]
    if chosen_by_rule(allocation) or len({module.score for module in modules}) < 2:
        return []
    return sorted(modules, key=lambda m: (sign * m.score, sign * m.mean, *tie_break(m)))


def average_ranks(values: Sequence[float]) -> Tensor:
    """Ranks from 1 ``[n] -> [n]``, float64; equal values share the mean of their ranks."""
    tensor = torch.as_tensor(values, dtype=torch.float64)
    _, group, counts = torch.unique(tensor, sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation of two equally long sequences: Pearson's, of the average ranks.

    None where it is not defined: fewer than three values, or all of one sequence equal.
    """
    if len(first) < FEWEST_FOR_RANKS:
        return None
    one, two = (ranks - ranks.mean() for ranks in (average_ranks(first), average_ranks(second)))
    scale = (one.square().sum() * two.square().sum()).sqrt().item()
    return (one @ two).item() / scale if scale > 0 else None


@dataclass(frozen=True)
class Cut:
    """Where full fine-tuning ends in the order of preference.

    Attributes:
        last: the least preferred module that is fully fine-tuned.
        next: the module after it, which is not.
        place: number of modules up to and including ``last``.
        passed_over: modules before ``last`` that are not fully fine-tuned (overflow ``skip``).
        relative: whether gaps are ratios (all scores positive) rather than differences.
        gap: ``larger / smaller - 1`` if relative, else ``|difference| / (max - min)`` of all scores.
        larger_gaps: neighbours in the order that lie further apart than the two at the cut.
        neighbours: pairs of neighbours.
    """

    last: ModuleRecord
    next: ModuleRecord
    place: int
    passed_over: int
    relative: bool
    gap: float
    larger_gaps: int
    neighbours: int


def find_cut(allocation: Allocation) -> Cut | None:
    """The cut; None without scores, or where all scored modules or none of them are fully fine-tuned."""
    order = by_preference(allocation)
    full = [index for index, module in enumerate(order) if module.assignment == FULL]
    if not full or full[-1] + 1 == len(order):
        return None
    at = full[-1]
    scores = [module.score for module in order]
    relative = min(scores) > 0
    heights = [math.log(score) for score in scores] if relative else scores
    gaps = [abs(after - before) for before, after in zip(heights, heights[1:], strict=False)]
    gap = math.expm1(gaps[at]) if relative else gaps[at] / (max(scores) - min(scores))
    return Cut(
        last=order[at],
        next=order[at + 1],
        place=at + 1,
        passed_over=at + 1 - len(full),
        relative=relative,
        gap=gap,
        larger_gaps=sum(other > gaps[at] for other in gaps),
        neighbours=len(gaps),
    )
