"""Greedy, budget-constrained assignment of modules (paper Algorithm 2, Eq. 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybrid_lora_plugin.allocation.budget_modes import FIXED, BudgetRecord, Shortage, budget_mode
from hybrid_lora_plugin.allocation.placement import AUTO, FULL, LORA, unless_full
from hybrid_lora_plugin.candidates import Candidate, tie_break
from hybrid_lora_plugin.config import BudgetConfig
from hybrid_lora_plugin.errors import AllocationError
from hybrid_lora_plugin.scoring.module_scores import ModuleScores


@dataclass(frozen=True)
class Assignment:
    """Who is fully fine-tuned.

    Attributes:
        modules: module name -> ``"full"``, ``"lora"`` or ``"frozen"``, in candidate order.
        budget: what was asked, allowed and spent.
    """

    modules: dict[str, str]
    budget: BudgetRecord

    @property
    def full_names(self) -> list[str]:
        """Names of the fully fine-tuned modules, in candidate order."""
        return [name for name, how in self.modules.items() if how == FULL]

    @property
    def lora_names(self) -> list[str]:
        """Names of the LoRA modules, in candidate order."""
        return [name for name, how in self.modules.items() if how == LORA]


def allocate(
    candidates: Sequence[Candidate],
    scores: Sequence[float],
    budget: BudgetConfig,
    direction: str = "lowest",
    signal: Sequence[bool] | None = None,
    means: Sequence[float] | None = None,
    *,
    rank: int = 16,
    fixed: Sequence[bool] | None = None,
    places: Sequence[str] | None = None,
) -> Assignment:
    """Send modules to full fine-tuning in score order as long as they fit into the budget.

    Overflow ``stop`` ends at the first module that does not fit; ``skip`` passes over it and goes on.

    Args:
        candidates: the M candidates.
        scores: ``[M]``, a tensor or a sequence.
        budget: mode ``parameters`` (Eq. 4), ``modules`` or ``total_trainable``; overflow ``stop`` or ``skip``.
        direction: ``lowest`` or ``highest`` score first.
        signal: ``[M]``; a module without signal is never selected. Default: score is not exactly 0.
        means: ``[M]``; breaks ties of the score before layer and type do.
        rank: LoRA rank r of the other modules, for mode ``total_trainable``.
        fixed: ``[M]``; the modules to tune fully, taken as they are: scores and budget do not count then.
        places: ``[M]``, from ``placement.places_of``; the budget is of those at ``auto``. Default: all.

    Returns:
        The assignment of every candidate.

    Raises:
        AllocationError: lengths differ, a score is not finite, a setting is not supported, or nothing would
            be fully fine-tuned.
    """
    count = len(candidates)
    score = torch.tensor([float(value) for value in scores], dtype=torch.float64)
    mean = torch.zeros_like(score) if means is None else torch.tensor([float(m) for m in means], dtype=torch.float64)
    usable = score != 0 if signal is None else torch.tensor([bool(value) for value in signal])
    named = None if fixed is None else torch.tensor([bool(value) for value in fixed])
    for label, values in (("scores", score), ("signal", usable), ("means", mean), ("fixed", named), ("places", places)):
        if values is not None and len(values) != count:
            raise AllocationError(f"{label}: {len(values)} values for {count} candidates; give one for each")
    return assign(
        candidates, ModuleScores(score, usable, mean, torch.zeros_like(score), named), budget, direction, rank, places
    )


def assign(
    candidates: Sequence[Candidate],
    scored: ModuleScores,
    budget: BudgetConfig,
    direction: str,
    rank: int,
    places: Sequence[str] | None = None,
) -> Assignment:
    """As ``allocate``, for the scores of a criterion, each of their tensors ``[M]``."""
    places = [AUTO] * len(candidates) if places is None else places
    placed = [place == FULL for place in places]
    for candidate, value in zip(candidates, scored.scores.tolist(), strict=True):
        if not math.isfinite(value):
            raise AllocationError(f"scores: {value} for {candidate.name}; give finite scores")
    if scored.fixed is not None:
        if not scored.fixed.any():
            raise AllocationError("criterion: names no candidate to tune fully; choose another criterion")
        for candidate, named, place in zip(candidates, scored.fixed.tolist(), places, strict=True):
            if named and place not in (FULL, AUTO):
                raise AllocationError(
                    f"placement.{candidate.component}: the criterion names {candidate.name} to be tuned fully, and by "
                    f"the placement it is {place}; change one of the two"
                )
        full = [named or by_hand for named, by_hand in zip(scored.fixed.tolist(), placed, strict=True)]
        return _assignment(candidates, full, BudgetRecord(FIXED, 0.0, budget.overflow, 0, 0, rank), places)
    if AUTO not in places:
        if not any(placed):
            raise AllocationError(
                "placement: no component is full or auto, so nothing would be fully fine-tuned; give auto or full to "
                "one, or train LoRA alone without hybrid_lora, by target_modules"
            )
        return _assignment(candidates, placed, BudgetRecord(FIXED, 0.0, budget.overflow, 0, 0, rank), places)
    if direction not in ("lowest", "highest"):
        raise AllocationError(f"direction: {direction!r}; choose one of lowest, highest")
    if budget.overflow not in ("stop", "skip"):
        raise AllocationError(f"budget.overflow: {budget.overflow!r} is not supported; choose one of stop, skip")
    mode, amount = budget_mode(budget.mode), budget.amount
    account = mode.account(candidates, amount, rank, places)
    mode.require_room(account, rank)

    order = [index for index in order_of_preference(candidates, scored, direction) if places[index] == AUTO]
    if not order:
        raise AllocationError("scores: no candidate has a signal; raise probe.warmup_steps or check probe.files")
    full, spent = list(placed), account.start
    for index in order:
        if spent + account.costs[index] <= account.limit:
            full[index] = True
            spent += account.costs[index]
        elif budget.overflow == "stop":
            break
    if not any(full[index] for index in order):
        # With `skip` every module was tried, so the one that misses by least decides.
        stop = budget.overflow == "stop"
        first = order[0] if stop else min(order, key=lambda index: account.costs[index])
        place = "first in score order" if stop else "the smallest with a signal"
        smallest = min(candidates[index].parameters for index in order)
        short = Shortage(amount, account, candidates[first].name, account.costs[first], place, smallest)
        raise AllocationError(mode.shortage(short))
    return _assignment(
        candidates, full, BudgetRecord(mode.name, float(amount), budget.overflow, account.limit, spent, rank), places
    )


def order_of_preference(candidates: Sequence[Candidate], scored: ModuleScores, direction: str) -> list[int]:
    """Indices of the candidates with a signal, most preferred for full fine-tuning first."""
    sign = 1 if direction == "lowest" else -1
    scores, means = (sign * scored.scores).tolist(), (sign * scored.means).tolist()
    usable = [index for index, signal in enumerate(scored.signal.tolist()) if signal]
    return sorted(usable, key=lambda index: (scores[index], means[index], *tie_break(candidates[index])))


def _assignment(
    candidates: Sequence[Candidate], full: Sequence[bool], asked: BudgetRecord, places: Sequence[str]
) -> Assignment:
    how = [
        FULL if is_full else unless_full(place, candidate)
        for candidate, is_full, place in zip(candidates, full, places, strict=True)
    ]
    modules = dict(zip((candidate.name for candidate in candidates), how, strict=True))
    return Assignment(modules, budget_mode(asked.mode).expected(asked, candidates, full, places))
