"""What a model's candidates must allow before a probe of them begins: adapters of this rank, and this budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid_lora_plugin.allocation.budget import allocate
from hybrid_lora_plugin.allocation.placement import AUTO, placement_record, places_of
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import WITHOUT_PROBE
from hybrid_lora_plugin.errors import AllocationError, ProbeError


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


def check_budget(candidates: Sequence[Candidate], config: Any) -> None:
    """Refuse a budget that admits no module at all, or a placement that leaves none, before hours are spent on scores.

    Args:
        candidates: the M candidates.
        config: a ``config.SelectionConfig`` with ``lora.rank``.

    Raises:
        AllocationError: as ``placement_record`` and ``allocate``; or nothing is left to a criterion that probes, or a
            trial would have to leave modules frozen.
    """
    record = placement_record(config.placement, candidates)
    places = places_of(record, candidates)
    if AUTO not in places and config.criterion not in WITHOUT_PROBE:
        raise AllocationError(
            f"placement: it leaves no component to criterion {config.criterion!r}, which would probe for nothing; give "
            f"auto to one, or criterion=random, which probes nothing"
        )
    if config.criterion == "trial" and (record is not None or not all(one.takes_adapter for one in candidates)):
        raise AllocationError(
            "criterion: 'trial' compares allocations in which every module trains, and here some would be frozen; give "
            "another criterion, or placement.preset=all with a model all of attention"
        )
    sizes = [float(candidate.parameters) for candidate in candidates]
    allocate(candidates, sizes, config.budget, "lowest", rank=config.lora.rank, places=places)
