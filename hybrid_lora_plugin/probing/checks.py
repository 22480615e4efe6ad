"""What a model's candidates must allow before a probe of them begins: adapters of this rank, and this budget."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_lora_plugin.allocation.budget import allocate
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import BudgetConfig
from hybrid_lora_plugin.errors import ProbeError


def check_shapes(candidates: Sequence[Candidate], rank: int) -> None:
    """Refuse a rank at which an adapter would not be smaller than the weight it adapts.

    Raises:
        ProbeError: naming the narrowest module and the largest rank that makes sense for it.
    """

    def largest(candidate: Candidate) -> int:
        weight = candidate.in_features * candidate.out_features
        return (weight - 1) // (candidate.in_features + candidate.out_features)

    narrowest = min(candidates, key=largest)
    if rank > largest(narrowest):
        raise ProbeError(
            f"lora.rank: {rank} makes the adapter of {narrowest.name} ({narrowest.in_features} × "
            f"{narrowest.out_features}) as large as its weight; give {largest(narrowest)} or less"
        )


def check_budget(candidates: Sequence[Candidate], budget: BudgetConfig, rank: int) -> None:
    """Refuse a budget that admits no module at all, before hours are spent on scores.

    Raises:
        AllocationError: as ``allocate``.
    """
    allocate(candidates, [float(candidate.parameters) for candidate in candidates], budget, "lowest", rank=rank)
