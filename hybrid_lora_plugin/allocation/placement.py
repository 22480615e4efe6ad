"""Where training may go: each component of a decoder trains fully, by LoRA, not at all, or as the criterion decides.

Nothing follows from how a model is built: which components are worth training is the user's to say, and to measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hybrid_lora_plugin.candidates import COMPONENTS, Candidate
from hybrid_lora_plugin.config_selection import PLACEMENT_PRESETS, PlacementConfig
from hybrid_lora_plugin.errors import AllocationError

FULL, LORA, FROZEN, AUTO = "full", "lora", "frozen", "auto"


def placement_record(placement: PlacementConfig, candidates: Sequence[Candidate]) -> dict[str, str] | None:
    """The place of each component that a model has: ``full``, ``lora``, ``frozen``, or ``auto`` for the criterion's.

    Args:
        placement: what was asked.
        candidates: of the model.

    Returns:
        By component; None where the criterion decides about all of them.

    Raises:
        AllocationError: a component is named that the model does not have, or none is trained.
    """
    there = [component for component in COMPONENTS if any(one.component == component for one in candidates)]
    chosen = PLACEMENT_PRESETS[placement.preset]
    has = f"this model has no such modules; its components are {', '.join(there)}"
    if placement.preset != "all" and (absent := [component for component in chosen if component not in there]):
        raise AllocationError(f"placement.preset: {placement.preset!r} names {absent[0]}, and {has}")
    for component in COMPONENTS:
        if (place := getattr(placement, component)) is not None and component not in there:
            raise AllocationError(f"placement.{component}: {place!r}, and {has}; leave it out")
    found = {
        component: getattr(placement, component) or (AUTO if component in chosen else FROZEN) for component in there
    }
    if set(found.values()) == {FROZEN}:
        raise AllocationError("placement: every component is frozen, so nothing would train; leave one to be trained")
    return None if set(found.values()) == {AUTO} else found


def places_of(record: Mapping[str, str] | None, candidates: Sequence[Candidate]) -> list[str]:
    """The place of each of the M candidates: ``full``, ``lora``, ``frozen`` or ``auto``.

    A module that takes no adapter is frozen where its component gets LoRA.

    Args:
        record: from ``placement_record``.
        candidates: the M candidates.
    """
    return [_place((record or {}).get(candidate.component, AUTO), candidate) for candidate in candidates]


def _place(place: str, candidate: Candidate) -> str:
    return FROZEN if place == LORA and not candidate.takes_adapter else place


def unless_full(place: str, candidate: Candidate) -> str:
    """What becomes of a candidate that is not fully tuned: ``lora`` or ``frozen``."""
    return LORA if place != FROZEN and candidate.takes_adapter else FROZEN


def placement_in_words(record: Mapping[str, str]) -> str:
    """One line, e.g. ``attention by the criterion, mlp frozen``."""
    words = {FULL: "fully fine-tuned", LORA: "LoRA", FROZEN: "frozen", AUTO: "by the criterion"}
    return ", ".join(f"{component} {words[place]}" for component, place in record.items())
