"""Greedy, budget-constrained assignment of modules (paper Algorithm 2, Eq. 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from hybrid_lora_plugin.allocation.errors import AllocationError
from hybrid_lora_plugin.candidates import TYPE_ORDER, Candidate
from hybrid_lora_plugin.config import BudgetConfig

FULL, LORA = "full", "lora"


@dataclass(frozen=True)
class Assignment:
    """Who is fully fine-tuned.

    Attributes:
        modules: module name -> ``"full"`` or ``"lora"``, in candidate order.
        total: parameters of all candidates.
        limit: parameters the budget allows, ``floor(ratio * total)``.
        used: parameters of the ``"full"`` modules.
    """

    modules: dict[str, str]
    total: int
    limit: int
    used: int

    @property
    def full_names(self) -> list[str]:
        """Names of the fully fine-tuned modules, in candidate order."""
        return [name for name, how in self.modules.items() if how == FULL]

    @property
    def lora_names(self) -> list[str]:
        """Names of the LoRA modules, in candidate order."""
        return [name for name, how in self.modules.items() if how == LORA]


def budget_limit(total: int, ratio: float) -> int:
    """``floor(ratio * total)`` in exact arithmetic, reading ``ratio`` as the decimal the user wrote.

    ``int(0.29 * 100)`` is 28 in floating point; this gives 29.
    """
    return math.floor(Fraction(repr(float(ratio))) * total)


def allocate(
    candidates: Sequence[Candidate],
    scores: Sequence[float],
    budget: BudgetConfig,
    direction: str = "lowest",
    signal: Sequence[bool] | None = None,
    means: Sequence[float] | None = None,
) -> Assignment:
    """Send modules to full fine-tuning in score order until the first one that no longer fits.

    Args:
        candidates: the M candidates.
        scores: ``[M]``, a tensor or a sequence.
        budget: mode ``parameters``, a ratio in (0, 1], overflow ``stop``.
        direction: ``lowest`` or ``highest`` score first.
        signal: ``[M]``; a module without signal is never selected. Default: score is not exactly 0.
        means: ``[M]``; breaks ties of the score before layer and type do.

    Returns:
        The assignment of every candidate.

    Raises:
        AllocationError: lengths differ, a score is not finite, a setting is not supported, or nothing would
            be fully fine-tuned.
    """
    count = len(candidates)
    score = [float(value) for value in scores]
    mean = [0.0] * count if means is None else [float(value) for value in means]
    usable = [value != 0 for value in score] if signal is None else [bool(value) for value in signal]
    for label, values in (("scores", score), ("signal", usable), ("means", mean)):
        if len(values) != count:
            raise AllocationError(f"{label}: {len(values)} values for {count} candidates; give one for each")
    for candidate, value in zip(candidates, score, strict=True):
        if not math.isfinite(value):
            raise AllocationError(f"scores: {value} for {candidate.name}; give finite scores")
    if direction not in ("lowest", "highest"):
        raise AllocationError(f"direction: {direction!r}; choose one of lowest, highest")
    if budget.mode != "parameters" or budget.overflow != "stop":
        raise AllocationError(
            f"budget: mode {budget.mode!r} with overflow {budget.overflow!r} is not supported; "
            f"use mode 'parameters' with overflow 'stop'"
        )
    if not 0 < budget.ratio <= 1:
        raise AllocationError(f"budget.ratio: {budget.ratio!r}; give a fraction in (0, 1], e.g. 0.1")

    total = sum(candidate.parameters for candidate in candidates)
    limit = budget_limit(total, budget.ratio)
    sign = 1 if direction == "lowest" else -1

    def position(index: int) -> tuple:
        candidate = candidates[index]
        return (sign * score[index], sign * mean[index], candidate.layer, TYPE_ORDER.index(candidate.type))

    order = sorted((index for index in range(count) if usable[index]), key=position)
    if not order:
        raise AllocationError("scores: no candidate has a signal; raise probe.warmup_steps or check probe.files")
    chosen, used = set(), 0
    for index in order:
        if used + candidates[index].parameters > limit:
            break
        chosen.add(index)
        used += candidates[index].parameters
    if not chosen:
        raise AllocationError(_too_small(budget, limit, total, candidates, candidates[order[0]]))
    modules = {candidate.name: FULL if index in chosen else LORA for index, candidate in enumerate(candidates)}
    return Assignment(modules, total, limit, used)


def _too_small(budget: BudgetConfig, limit: int, total: int, candidates: Sequence[Candidate], first: Candidate) -> str:
    smallest = min(candidates, key=lambda candidate: candidate.parameters)
    # Rounded up at the sixth decimal, so that the ratio shown is enough.
    enough = math.ceil(Fraction(first.parameters, total) * 10**6) / 10**6
    return (
        f"budget.ratio: {budget.ratio} allows {limit:,} of {total:,} parameters, but {first.name}, first in score "
        f"order, has {first.parameters:,} (the smallest candidate has {smallest.parameters:,}), so nothing would be "
        f"fully fine-tuned; give at least {enough:g}"
    )
