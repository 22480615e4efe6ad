"""Where an arm may train: how a plan says it, what follows on a base, and which arms cannot be placed that way."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hybrid_lora_plugin.allocation.placement import AUTO, FROZEN, FULL, LORA, placement_record, places_of, unless_full
from hybrid_lora_plugin.candidates import COMPONENT_OF_TYPE, Candidate
from hybrid_lora_plugin.config_selection import PLACEMENT_PRESETS, PLACES, PlacementConfig
from hybrid_lora_plugin.errors import ConfigurationError

#: options of a selection that say a placement begin so
OPTION = "placement."
#: (field of ``PlacementConfig``, value) of each field that is not its default, by name
Placement = tuple[tuple[str, str], ...]
_FIELDS = {spec.name: spec.default for spec in dataclasses.fields(PlacementConfig)}
_EXAMPLE = "give one of {presets}, or a place for each component such as {{attention: lora, mlp: frozen}}"


def read_placement(given: Any, where: str) -> Placement:
    """What a plan says of a placement: the name of a preset, or a mapping with fields of ``PlacementConfig``.

    Args:
        given: of the plan.
        where: its name in messages.

    Raises:
        ConfigurationError: neither of the two, or a field or a value that there is not.
    """
    example = _EXAMPLE.format(presets=", ".join(PLACEMENT_PRESETS))
    fields = {"preset": given} if isinstance(given, str) else given
    if not isinstance(fields, dict) or not fields:
        raise ConfigurationError(f"{where}: {given!r} is not usable; {example}")
    for name, value in fields.items():
        if name not in _FIELDS:
            raise ConfigurationError(f"{where}.{name}: is no field of a placement; give some of {', '.join(_FIELDS)}")
        if value not in (PLACEMENT_PRESETS if name == "preset" else PLACES):
            known = PLACEMENT_PRESETS if name == "preset" else PLACES
            place = where if isinstance(given, str) else f"{where}.{name}"
            raise ConfigurationError(f"{place}: {value!r} is not supported; choose one of {', '.join(known)}")
    return _without_defaults(fields)


def placement_in(selection: Mapping[str, Any]) -> Placement:
    """The placement among the options of a selection."""
    fields = {name.removeprefix(OPTION): value for name, value in selection.items() if name.startswith(OPTION)}
    return _without_defaults(fields)


def _without_defaults(fields: Mapping[str, str]) -> Placement:
    return tuple(sorted((name, value) for name, value in fields.items() if value != _FIELDS.get(name)))


def as_options(placement: Placement) -> dict[str, str]:
    """The placement as options of a selection."""
    return {OPTION + name: value for name, value in placement}


def record_of(placement: Placement, candidates: Sequence[Candidate]) -> dict[str, str] | None:
    """See ``allocation.placement.placement_record``."""
    return placement_record(PlacementConfig(**dict(placement)), candidates) if placement else None


def left_to_a_criterion(placement: Placement, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that the placement leaves to a criterion."""
    places = places_of(record_of(placement, candidates), candidates)
    return [one for one, place in zip(candidates, places, strict=True) if place == AUTO]


def trained_fully(kind: str, placement: Placement, candidates: Sequence[Candidate]) -> list[str]:
    """Names of the modules that an arm without a selection tunes fully: those left open to ``full``, none of others."""
    if kind != FULL:
        return []
    places = places_of(record_of(placement, candidates), candidates)
    return [one.name for one, place in zip(candidates, places, strict=True) if place in (AUTO, FULL)]


def left_frozen(
    kind: str, placement: Placement, candidates: Sequence[Candidate], full: Collection[str]
) -> tuple[str, ...]:
    """Names of the modules that get neither a gradient nor an adapter, in the candidates' order.

    Args:
        kind: of the arm.
        placement: of the arm.
        candidates: of a base.
        full: names of the fully tuned modules.

    Raises:
        ConfigurationError: ``full`` holds what the placement does not leave to full fine-tuning, or lacks what it
            places there: whoever chose did not look at the placement.
    """
    places, chosen = places_of(record_of(placement, candidates), candidates), set(full)
    for one, place in zip(candidates, places, strict=True) if placement else ():
        if (one.name in chosen) != (place == FULL) and place != AUTO and kind == "hybrid":
            how = "is fully tuned" if one.name in chosen else "is not fully tuned"
            raise ConfigurationError(
                f"placement.{one.component}: {one.name} {how} by what the protocol chose, and by the placement it is "
                f"{place}; let its choose follow the placement.* options of an arm's selection"
            )
    return tuple(
        one.name
        for one, place in zip(candidates, places, strict=True)
        if one.name not in chosen and (kind == FULL or unless_full(place, one) == FROZEN)
    )


def refuse_placement(
    name: str, kind: str, placement: Placement, criterion: Mapping[str, Any], candidates: Sequence[Candidate]
) -> None:
    """Refuse a placement that cannot be on a base, or that says something else than the arm's kind.

    Args:
        name, kind, placement: of the arm.
        criterion: options of the selection of a ``hybrid`` arm, ``criterion`` with them; without it where none is
            given, as nothing is left to one.
        candidates: of a base.

    Raises:
        ConfigurationError: naming the arm.
    """
    where = f"arms: {name}: "
    try:
        record = record_of(placement, candidates)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}{error}") from error
    places = dict(record or dict.fromkeys({one.component for one in candidates}, AUTO))

    def first(place: str) -> str:
        return next(component for component, found in places.items() if found == place)

    found = set(places.values())
    if kind != "hybrid":
        wrong = LORA if kind == FULL else FULL
        if wrong in found:
            raise ConfigurationError(
                f"{where}placement.{first(wrong)}: {wrong!r} is not what kind: {kind} trains; give auto or frozen, or "
                f"kind: hybrid"
            )
        return
    named = criterion.get("criterion")
    if AUTO in found and named is None:
        raise ConfigurationError(
            f"{where}placement leaves {first(AUTO)} to a criterion, and selection names none; give selection: "
            f"{{criterion: …}}, kind: lora or kind: full, or full, lora or frozen for {first(AUTO)}"
        )
    if not found & {AUTO, FULL}:
        raise ConfigurationError(f"{where}placement leaves nothing to be fully tuned; give kind: lora")
    if not found & {AUTO, LORA}:
        raise ConfigurationError(f"{where}placement leaves nothing to an adapter; give kind: full")
    if record is None:
        return
    if named == "trial":
        raise ConfigurationError(
            f"{where}criterion 'trial' compares allocations in which every module trains; leave its placement out"
        )
    if AUTO not in found and named not in (None, "random"):
        raise ConfigurationError(
            f"{where}placement leaves no component to criterion {named!r}; leave its selection out, or give auto to one"
        )
    wanted = {"attention"} if named == "lora_ffn" else set()
    if named == "spread":
        wanted = {COMPONENT_OF_TYPE.get(type_, "") for type_ in str(criterion.get("control.type", "o_proj")).split("+")}
    for component in sorted(wanted & places.keys()):
        if places[component] not in (AUTO, FULL):
            raise ConfigurationError(
                f"{where}placement.{component}: is {places[component]!r}, and {named} tunes modules of it fully; give "
                f"another placement, or another arm"
            )
