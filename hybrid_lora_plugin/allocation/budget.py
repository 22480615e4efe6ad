"""Greedy, budget-constrained assignment of modules (paper Algorithm 2, Eq. 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from hybrid_lora_plugin.candidates import TYPE_ORDER, Candidate
from hybrid_lora_plugin.config import BudgetConfig
from hybrid_lora_plugin.errors import AllocationError

FULL, LORA = "full", "lora"
# The mode of an assignment whose modules were named instead of ranked: no budget was applied.
FIXED = "fixed"
MODES = ("parameters", "modules", "total_trainable")


@dataclass(frozen=True)
class Assignment:
    """Who is fully fine-tuned.

    Attributes:
        modules: module name -> ``"full"`` or ``"lora"``, in candidate order.
        total: parameters of all candidates.
        limit: what the budget allows, in the unit of its mode: parameters of ``"full"`` modules
            (``parameters``, ``fixed``), ``"full"`` modules (``modules``), or trainable parameters, LoRA
            included (``total_trainable``).
        used: what of it is spent, in the same unit.
        mode: that of the budget, or ``"fixed"``.
        ratio: the share asked for; in the modes ``total_trainable`` and ``fixed``, which ask for none, the share
            of candidate parameters that became ``"full"``.
    """

    modules: dict[str, str]
    total: int
    limit: int
    used: int
    mode: str
    ratio: float

    @property
    def full_names(self) -> list[str]:
        """Names of the fully fine-tuned modules, in candidate order."""
        return [name for name, how in self.modules.items() if how == FULL]

    @property
    def lora_names(self) -> list[str]:
        """Names of the LoRA modules, in candidate order."""
        return [name for name, how in self.modules.items() if how == LORA]


@dataclass(frozen=True)
class Account:
    """A budget as one sum that must stay within a limit, whatever its unit.

    Attributes:
        limit: the largest sum.
        start: the sum when every candidate has LoRA.
        costs: what each of the M candidates adds when it becomes fully fine-tuned.
    """

    limit: int
    start: int
    costs: list[int]


def budget_limit(total: int, ratio: float) -> int:
    """``floor(ratio * total)`` in exact arithmetic, reading ``ratio`` as the decimal the user wrote.

    ``int(0.29 * 100)`` is 28 in floating point; this gives 29.
    """
    return math.floor(Fraction(repr(float(ratio))) * total)


def open_account(candidates: Sequence[Candidate], mode: str, ratio: float, total: int | None, rank: int) -> Account:
    """The account of a budget mode, before any module is fully fine-tuned.

    Args:
        candidates: the M candidates.
        mode: one of ``MODES``.
        ratio: the share, for ``parameters`` and ``modules``.
        total: the largest number of trainable parameters, for ``total_trainable``.
        rank: LoRA rank r, for ``total_trainable``.

    Raises:
        AllocationError: an unknown mode, or what the mode needs is missing or out of range.
    """
    sizes = [candidate.parameters for candidate in candidates]
    if mode in ("parameters", "modules") and not 0 < ratio <= 1:
        raise AllocationError(f"budget.ratio: {ratio!r}; give a fraction in (0, 1], e.g. 0.1")
    if mode == "parameters":
        return Account(budget_limit(sum(sizes), ratio), 0, sizes)
    if mode == "modules":
        return Account(budget_limit(len(sizes), ratio), 0, [1] * len(sizes))
    if mode != "total_trainable":
        raise AllocationError(f"budget.mode: {mode!r} is not supported; choose one of {', '.join(MODES)}")
    if total is None or total < 1:
        raise AllocationError(f"budget.total: {total!r}; give the largest number of trainable parameters")
    for candidate in candidates:
        if candidate.in_features < 1 or candidate.out_features < 1:
            raise AllocationError(
                f"budget.mode: 'total_trainable' needs the dimensions of {candidate.name}, which an artifact of an "
                f"earlier version does not hold; probe again with hybrid-lora-probe, or use mode 'parameters'"
            )
    lora = [candidate.lora_parameters(rank) for candidate in candidates]
    return Account(total, sum(lora), [size - less for size, less in zip(sizes, lora, strict=True)])


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
    named = [False] * count if fixed is None else [bool(value) for value in fixed]
    for label, values in (("scores", score), ("signal", usable), ("means", mean), ("fixed", named)):
        if len(values) != count:
            raise AllocationError(f"{label}: {len(values)} values for {count} candidates; give one for each")
    for candidate, value in zip(candidates, score, strict=True):
        if not math.isfinite(value):
            raise AllocationError(f"scores: {value} for {candidate.name}; give finite scores")
    if fixed is not None:
        if not any(named):
            raise AllocationError("criterion: names no candidate to tune fully; choose another criterion")
        return _assignment(candidates, {index for index in range(count) if named[index]}, FIXED)
    if direction not in ("lowest", "highest"):
        raise AllocationError(f"direction: {direction!r}; choose one of lowest, highest")
    if budget.overflow not in ("stop", "skip"):
        raise AllocationError(f"budget.overflow: {budget.overflow!r} is not supported; choose one of stop, skip")

    account = open_account(candidates, budget.mode, budget.ratio, budget.total, rank)
    if account.start > account.limit:
        raise AllocationError(
            f"budget.total: {account.limit:,}, but LoRA of rank {rank} on every candidate alone has "
            f"{account.start:,} parameters; give more than that, or a smaller lora.rank"
        )
    sign = 1 if direction == "lowest" else -1

    def position(index: int) -> tuple:
        candidate = candidates[index]
        return (sign * score[index], sign * mean[index], candidate.layer, TYPE_ORDER.index(candidate.type))

    order = sorted((index for index in range(count) if usable[index]), key=position)
    if not order:
        raise AllocationError("scores: no candidate has a signal; raise probe.warmup_steps or check probe.files")
    chosen, spent = set(), account.start
    for index in order:
        if spent + account.costs[index] <= account.limit:
            chosen.add(index)
            spent += account.costs[index]
        elif budget.overflow == "stop":
            break
    if not chosen:
        raise AllocationError(_too_small(budget, account, candidates, order))
    if budget.mode == "total_trainable":
        return _assignment(candidates, chosen, budget.mode, limit=account.limit, used=spent)
    return _assignment(candidates, chosen, budget.mode, limit=account.limit, used=spent, ratio=float(budget.ratio))


def _assignment(
    candidates: Sequence[Candidate],
    chosen: set[int],
    mode: str,
    limit: int | None = None,
    used: int | None = None,
    ratio: float | None = None,
) -> Assignment:
    """An assignment; what the mode does not say is derived from the parameters of the chosen modules."""
    total = sum(candidate.parameters for candidate in candidates)
    full = sum(candidates[index].parameters for index in chosen)
    return Assignment(
        modules={candidate.name: FULL if index in chosen else LORA for index, candidate in enumerate(candidates)},
        total=total,
        limit=full if limit is None else limit,
        used=full if used is None else used,
        mode=mode,
        ratio=full / total if ratio is None else ratio,
    )


def _too_small(budget: BudgetConfig, account: Account, candidates: Sequence[Candidate], order: list[int]) -> str:
    """Why nothing fits, with a budget that is enough."""
    # With `skip` every module was tried, so the one that misses by least decides.
    first = order[0] if budget.overflow == "stop" else min(order, key=lambda index: account.costs[index])
    name, cost = candidates[first].name, account.costs[first]
    place = "first in score order" if budget.overflow == "stop" else "the smallest with a signal"
    so = "so nothing would be fully fine-tuned; give at least"
    if budget.mode == "total_trainable":
        return (
            f"budget.total: {account.limit:,} leaves {account.limit - account.start:,} parameters beyond LoRA on every "
            f"candidate, but {name}, {place}, adds {cost:,}, {so} {account.start + cost}"
        )
    whole = sum(account.costs)
    # Rounded up at the sixth decimal, so that the ratio shown is enough.
    enough = f"{math.ceil(Fraction(cost, whole) * 10**6) / 10**6:g}"
    if budget.mode == "modules":
        return f"budget.ratio: {budget.ratio} allows {account.limit} of {whole} modules, {so} {enough}"
    smallest = min(candidate.parameters for candidate in candidates)
    return (
        f"budget.ratio: {budget.ratio} allows {account.limit:,} of {whole:,} parameters, but {name}, {place}, has "
        f"{cost:,} (the smallest candidate has {smallest:,}), {so} {enough}"
    )
